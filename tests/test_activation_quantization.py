"""Activations rounded while the model runs: against loops, in every kind of model, and together with other stages."""

import copy
import pickle

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from pqqp_lightning import load
from pqqp_lightning.algorithms.activation import outlier_columns, quantize_activation
from pqqp_lightning.calibration.collect import Collector
from pqqp_lightning.calibration.statistics import Hessian
from pqqp_lightning.callbacks import GPTQ, RTN, ActivationQuantization, LoRA
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.models import CausalLM
from pqqp_lightning.network.activation_hooks import (
    QuantizeHeads,
    QuantizeInput,
    move_transforms,
    transformed_layers,
    transforms_of,
    without_transforms,
)

MODELS = ["llama", "opt", "resnet", "deit"]


def run(tmp_path, kind, *stages, folder="run"):
    module = tiny.make_model(kind)
    tiny.trainer(tmp_path / folder, *stages).fit(module, datamodule=tiny.make_data(kind, tmp_path))
    return module.eval()


@torch.no_grad()
def outputs(module):
    if isinstance(module, CausalLM):
        return module(tiny.token_rows(4))
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return module(images)


def round_slowly(row, bits, symmetric, clip):
    """One token, entry by entry."""
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = clip * max(abs(v) for v in row) / top
        return [scale * min(max(np.round(v / scale), -top), top) if scale else 0.0 for v in row]
    lowest, highest = clip * min(0.0, *row), clip * max(0.0, *row)
    scale = (highest - lowest) / (2**bits - 1)
    zero = np.round(-lowest / scale) if scale else 0.0
    return [scale * (min(max(np.round(v / scale) + zero, 0), 2**bits - 1) - zero) if scale else 0.0 for v in row]


@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_tokens_are_rounded_as_in_a_loop(bits, symmetric, clip):
    rng = np.random.default_rng(bits)
    x = rng.normal(size=(5, 16)) * np.exp(rng.normal(size=(5, 1)))
    x[2] = 0.0
    expected = [round_slowly(row, bits, symmetric, clip) for row in x]
    actual = quantize_activation(torch.tensor(x, dtype=torch.float32), bits, symmetric=symmetric, clip=clip)
    assert np.allclose(actual.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert all(len(row.unique()) <= 2**bits for row in actual)


def test_columns_with_outliers_stay_as_they_are():
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    x[1, 2, 5], x[0, 0, 7] = 40.0, -7.0
    rounded = quantize_activation(x, 4, outliers=6.0)
    columns = outlier_columns(x, 6.0).flatten()
    assert columns.tolist() == [False] * 5 + [True, False, True]
    assert torch.equal(rounded[..., columns], x[..., columns])
    rest = [round_slowly(row, 4, True, 1.0) for row in x[..., ~columns].flatten(0, 1).double().numpy()]
    assert np.allclose(rounded[..., ~columns].flatten(0, 1).numpy(), rest, atol=1e-5)
    plain = quantize_activation(x, 4)
    assert (rounded - x).square().mean() < 0.1 * (plain - x).square().mean()


def test_more_bits_hurt_less_and_a_scale_for_each_token_less_than_one_for_all():
    x = torch.randn(64, 32) * torch.exp(torch.randn(64, 1))
    errors = [float((quantize_activation(x, bits) - x).square().mean()) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    together = quantize_activation(x, 4, dims=(0, 1))
    assert errors[2] < float((together - x).square().mean())


def test_an_image_has_one_scale():
    layer = nn.Conv2d(3, 4, 3)
    QuantizeInput(4).attach(layer)
    images = torch.randn(2, 3, 8, 8) * torch.tensor([1.0, 10.0])[:, None, None, None]
    seen = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer(images)
    for image, rounded in zip(images, seen[0], strict=True):
        expected = round_slowly(image.flatten().double().tolist(), 4, True, 1.0)
        assert np.allclose(rounded.flatten().detach().numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype):
    x = torch.randn(3, 8).to(dtype)
    assert quantize_activation(x, 8).dtype == quantize_activation(x, 8, outliers=1.0).dtype == dtype


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_computes_with_rounded_inputs_and_its_checkpoint_loads(tmp_path, kind):
    kv_bits = 8 if kind in ("llama", "opt") else None
    dense = outputs(tiny.make_model(kind).eval())
    # kept, because new statistics would change an untrained ResNet by more than the rounding
    stage = ActivationQuantization(8, kv_bits=kv_bits, batch_norm="keep")
    module = run(tmp_path, kind, stage)
    layers = stage.find_layers(module)
    assert list(transformed_layers(module, QuantizeInput)) == list(layers)
    assert len(list(transformed_layers(module, QuantizeHeads))) == (4 if kv_bits else 0)
    changed = outputs(module)
    assert not torch.equal(changed, dense)
    assert (changed - dense).abs().max() < 0.1 * dense.std()
    assert torch.equal(outputs(load(tmp_path / "run")), changed)
    assert torch.equal(outputs(copy.deepcopy(module)), changed)
    assert all(torch.equal(v, tiny.make_model(kind).state_dict()[k]) for k, v in module.state_dict().items())


def test_eight_bits_are_better_than_four():
    dense = outputs(tiny.make_model("llama").eval())

    def error(bits):
        module = tiny.make_model("llama").eval()
        ActivationQuantization(bits, kv_bits=bits).compress(module, None)
        return float((outputs(module) - dense).square().mean())

    assert error(8) < 0.1 * error(4)


def test_layers_that_read_one_input_get_one_tensor():
    q, k, v = (nn.Linear(8, 8) for _ in range(3))
    shared = QuantizeInput(4)
    for layer in (q, k, v):
        shared.attach(layer)
    collector = Collector({"q": q, "k": k, "v": v}, Hessian)
    with collector.watching():
        for _ in range(3):
            x = torch.randn(5, 8)
            with collector.forward_pass():
                q(x), k(x), v(x)
    assert [list(reading.layers) for reading in collector.readings] == [["q", "k", "v"]]
    assert int(collector.readings[0].statistic.rows) == 15


def test_what_was_rounded_is_not_kept_longer_than_its_input():
    layer, transform = nn.Linear(8, 8), QuantizeInput(4)
    transform.attach(layer)
    x = torch.randn(5, 8)
    layer(x)
    assert transform._memo is not None
    del x
    assert transform._memo is None


def test_an_input_that_was_written_to_is_rounded_anew():
    layer, transform = nn.Linear(8, 8), QuantizeInput(4)
    transform.attach(layer)
    x = torch.randn(5, 8)
    first = layer(x)
    x.mul_(3)
    assert torch.allclose(layer(x) - layer.bias, 3 * (first - layer.bias), atol=1e-5)


def test_gptq_calibrates_on_rounded_inputs(tmp_path):
    before = run(tmp_path, "llama", ActivationQuantization(3), GPTQ(4), folder="before")
    after = run(tmp_path, "llama", GPTQ(4), ActivationQuantization(3), folder="after")
    name = "model.model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(before.state_dict()[name], after.state_dict()[name])
    for folder, module in (("before", before), ("after", after)):
        assert torch.equal(outputs(load(tmp_path / folder)), outputs(module))


def test_gradients_pass_through():
    layer = nn.Linear(8, 4)
    x = torch.randn(5, 8, requires_grad=True)
    layer(x).sum().backward()
    expected, x.grad = x.grad, None
    QuantizeInput(2).attach(layer)
    QuantizeHeads(2, head_dim=2).attach(layer)
    layer(x).sum().backward()
    assert torch.equal(x.grad, expected)


def test_finetuning_trains_through_it(tmp_path):
    module = run(tmp_path, "llama", ActivationQuantization(4, epochs=1))
    dense = tiny.make_model("llama")
    assert not torch.equal(module.model.lm_head.weight, dense.model.lm_head.weight)
    assert torch.equal(outputs(load(tmp_path / "run")), outputs(module))


def test_keys_and_values_have_a_scale_for_each_token_and_head():
    layer = nn.Linear(8, 6, bias=False)
    x = torch.randn(2, 5, 8)
    plain = layer(x).detach()
    QuantizeHeads(3, head_dim=2).attach(layer)
    rounded = layer(x).detach()
    expected = [round_slowly(head, 3, True, 1.0) for head in plain.reshape(-1, 2).double().numpy()]
    assert np.allclose(rounded.reshape(-1, 2).numpy(), expected, atol=1e-5)


def test_transforms_move_with_their_layer_and_survive_pickling():
    old, new = nn.Linear(8, 4), nn.Linear(8, 4)
    QuantizeInput(4).attach(old)
    QuantizeHeads(4, head_dim=2).attach(old)
    old(torch.randn(2, 8))
    kinds = [type(t) for t in transforms_of(old)]
    move_transforms(old, new)
    assert transforms_of(old) == []
    assert [type(t) for t in transforms_of(new)] == kinds
    again = pickle.loads(pickle.dumps(new))
    x = torch.randn(2, 8)
    assert torch.equal(again(x), new(x))


def test_transforms_can_be_left_out_for_a_while():
    layer, x = nn.Linear(8, 4), torch.randn(2, 8)
    plain = layer(x)
    QuantizeInput(2).attach(layer)
    QuantizeHeads(2, head_dim=2).attach(layer)
    rounded, calls = layer(x), []
    with without_transforms(layer):
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
        assert torch.equal(layer(x), plain)
    assert torch.equal(layer(x), rounded)
    assert len(calls) == 2
    assert len(transforms_of(layer)) == 2


def test_targets_choose_layers():
    module = tiny.make_model("llama")
    ActivationQuantization(8, kv_bits=4, targets=["layers.1.self_attn"]).compress(module, None)
    assert list(transformed_layers(module, QuantizeInput)) == [
        f"model.model.layers.1.self_attn.{part}_proj" for part in "qkvo"
    ]
    assert len(list(transformed_layers(module, QuantizeHeads))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, r"bits=1 is not between 2 and 8\."),
        ({"kv_bits": 16}, r"kv_bits=16 is not between 2 and 8\."),
        ({"clip": 0.0}, r"clip=0.0 is not in \(0, 1\]"),
        ({"outliers": 0.0}, r"outliers=0.0 is not above 0"),
        (
            {"kv_bits": 8, "targets": ["mlp"]},
            r"kv_bits=8 has no effect: no layer that the stage acts on is a k_proj or v_proj",
        ),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(RecipeError, match=message):
        run(tmp_path, "llama", ActivationQuantization(**arguments))


def test_a_model_without_keys_and_values_refuses_kv_bits(tmp_path):
    with pytest.raises(RecipeError, match=r"kv_bits=8 has no effect: no layer .* Leave kv_bits out\."):
        run(tmp_path, "resnet", ActivationQuantization(8, kv_bits=8))


def test_inputs_are_rounded_once(tmp_path):
    first, second = ActivationQuantization(8, kv_bits=8), ActivationQuantization(4, kv_bits=4, targets=["layers.0"])
    first.name, second.name = "first", "second"
    with pytest.raises(RecipeError, match=r"second .* the inputs of 7 layers .* are already rounded") as error:
        run(tmp_path, "llama", first, second)
    assert any("the outputs of 2 layers" in str(problem) for problem in error.value.problems)
    first.ignore = ["layers.0"]
    module = run(tmp_path, "llama", first, second, RTN(4))
    assert len(list(transformed_layers(module, QuantizeInput))) == 14


@pytest.mark.parametrize("kind", ["llama", "resnet"])
def test_adapters_apart_read_what_their_layer_reads(tmp_path, kind):
    """A rounded input is rounded for the adapter beside the layer, too, with a convolution's scales."""
    module = run(tmp_path, kind, ActivationQuantization(2), LoRA(2, merge=False, learning_rate=0.01))
    rounded = list(transformed_layers(module, QuantizeInput))
    wrappers = {name.removesuffix(".base_layer") for name, _ in module.named_modules() if name.endswith(".base_layer")}
    assert set(rounded) == wrappers
    seen = {}
    for name in rounded[:3]:
        base = module.get_submodule(name).base_layer
        base.register_forward_hook(lambda layer, args, _, name=name: seen.update({name: (layer, args[0].detach())}))
    batch = tiny.token_rows(1, 3) if kind == "llama" else torch.randn(2, 3, 32, 32)
    module.eval()(batch)
    for layer, x in seen.values():
        scaled = x.flatten(1) if isinstance(layer, torch.nn.Conv2d) else x.flatten(0, -2)
        assert all(len(row.unique()) <= 4 for row in scaled)  # two bits, one scale a token or an image
