"""QuaRot keeps the function, removes outliers, and refuses models that it cannot rotate."""

import copy

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from pqqp_lightning import load
from pqqp_lightning.algorithms.hadamard import make_rotation
from pqqp_lightning.algorithms.quarot import mean_direction, rewrite_linear, rotate_across, rotate_gain, rotate_heads
from pqqp_lightning.callbacks import GPTQ, RTN, ActivationQuantization, LoRA, Magnitude, QuaRot
from pqqp_lightning.data import TokenData
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.models import CausalLM, ImageClassifier
from pqqp_lightning.network.activation_hooks import RotateInput, transformed_layers
from pqqp_lightning.network.structure import weightless_copy
from pqqp_lightning.surgery.decoder import describe_decoder

TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
KINDS = {
    "llama": tiny.LLAMA | UNTIED,
    "llama-tied": tiny.LLAMA | TIED,
    "llama-biases": tiny.LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama-no-hadamard": tiny.LLAMA | TIED | {"hidden_size": 72, "intermediate_size": 39},  # 9 x 8 and 39 x 1
    "mistral": tiny.LLAMA | {"model_type": "mistral"},
    "qwen3": tiny.LLAMA | {"model_type": "qwen3", "head_dim": 16},
    "opt": tiny.OPT | UNTIED,
    "opt-tied": tiny.OPT | TIED,
    "opt-no-biases": tiny.OPT | UNTIED | {"enable_bias": False},
}


def make_model(kind="llama", dtype=torch.float64):
    """Every parameter is random: norms with gains and biases, layers with biases."""
    torch.manual_seed(0)
    module = CausalLM(KINDS[kind]).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return module


@torch.no_grad()
def logits(module):
    return module(tiny.token_rows(4))


def rotate(module, **arguments):
    stage = QuaRot(**arguments)
    assert stage.check(module, None, []) == []
    return stage.compress(module, None)


def with_outliers(dtype=torch.float32):
    """A model whose layers read two channels of the residual stream with weights that are 20 times as large."""
    module = make_model("llama-tied", dtype)
    for name, parameter in module.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            parameter.data[:, [3, 17]] *= 20
    return module


def blocks_weights(module):
    return {name: layer.weight.detach() for name, layer in QuaRot().find_layers(module).items()}


@pytest.mark.parametrize("gains", ["fold", "keep"])
@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_function_stays(kind, online, gains):
    module = make_model(kind)
    before, weights = logits(module), blocks_weights(copy.deepcopy(module))
    rotate(module, online=online, gains=gains)
    # HF's RMSNorm computes in float32 whatever the model's dtype
    assert torch.allclose(logits(module), before, rtol=0, atol=1e-10 if kind.startswith("opt") else 2e-5)
    after = blocks_weights(module)
    changed = {name for name, weight in weights.items() if not torch.allclose(after[name], weight, rtol=0.1)}
    last = {name for name in weights if name.endswith(("down_proj", "fc2", "o_proj", "out_proj"))}
    assert changed | {name for name in last if gains == "keep" and not online} == set(weights)
    hooked = set(transformed_layers(module, RotateInput))
    assert hooked == (last if online else set()) | (set(weights) - last if gains == "keep" else set())


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_low_precision_weights_are_rounded_once(kind):
    exact, half = make_model(kind).bfloat16().double(), make_model(kind).bfloat16()
    rotate(exact)
    rotate(half)
    for (name, wide), narrow in zip(exact.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(wide.bfloat16(), narrow), name


def test_a_tied_embedding_stays_tied_at_the_cost_of_one_layer():
    module = make_model("llama-tied")
    before = sum(p.numel() for p in module.parameters())
    norms = sum(p.numel() for n, p in module.named_parameters() if "norm" in n)
    rotate(module)
    assert module.model.lm_head.weight is module.model.model.embed_tokens.weight
    assert sum(p.numel() for p in module.parameters()) == before - norms + 32 * 32
    assert isinstance(module.model.model.norm.gain, nn.Linear)


def test_the_layers_that_a_stage_finds_are_the_same_as_before():
    module = make_model("llama-tied")
    before = list(RTN().find_layers(module))
    rotate(module)
    assert list(RTN().find_layers(module)) == before


def test_rewriting_agrees_with_loops():
    rng = np.random.default_rng(0)
    weight, bias, gain, shift, x = (rng.normal(size=s) for s in ((6, 8), 6, 8, 8, 8))
    rotation = make_rotation(8, torch.Generator().manual_seed(0))
    heads = make_rotation(2, torch.Generator().manual_seed(0), random_signs=False)
    q, small = rotation.matrix().numpy(), heads.matrix().numpy()
    expected = np.zeros(6)
    for o in range(6):
        expected[o] = bias[o] + sum(weight[o, i] * (x[i] * gain[i] + shift[i]) for i in range(8))
    for head in range(3):
        expected[2 * head : 2 * head + 2] = expected[2 * head : 2 * head + 2] @ small
    arguments = map(torch.from_numpy, (weight, bias, gain, shift))
    new, offset = rewrite_linear(
        *(a for a, _ in zip(arguments, range(2), strict=False)),
        gain=torch.from_numpy(gain),
        shift=torch.from_numpy(shift),
        inputs=[rotation.apply],
        outputs=[rotate_heads(heads)],
    )
    assert np.allclose(new.numpy() @ (x @ q) + offset.numpy(), expected)
    matrix, moved = rotate_gain(rotation, torch.from_numpy(gain), torch.from_numpy(shift))
    assert np.allclose(matrix.numpy() @ (x @ q) + moved.numpy(), (x * gain + shift) @ q)
    mixed = rotate_across(make_rotation(4, torch.Generator().manual_seed(0)), 2)(torch.from_numpy(x))
    four = make_rotation(4, torch.Generator().manual_seed(0)).matrix().numpy()
    assert np.allclose(mixed.numpy().reshape(4, 2), four.T @ x.reshape(4, 2))
    assert np.allclose((x @ q) @ mean_direction(rotation).numpy(), x.sum() / 8**0.5)


def test_outliers_fall():
    module = with_outliers()

    def peaks():
        weights = blocks_weights(module)
        reads = [w for n, w in weights.items() if "o_proj" not in n and "down_proj" not in n]
        return torch.cat([w.abs().amax(1) / w.square().mean(1).sqrt() for w in reads]).mean()

    before = peaks()
    rotate(module)
    assert peaks() < 0.65 * before


@pytest.mark.parametrize(("bits", "factor"), [(4, 0.75), (6, 0.4), (8, 0.2)])
def test_rounding_hurts_less_after_it(bits, factor):
    def error(*, rotated):
        module = with_outliers()
        before = logits(module)
        if rotated:
            rotate(module)
        RTN(bits).compress(module, tiny_context())
        return float((logits(module) - before).square().mean())

    assert error(rotated=True) < factor * error(rotated=False)


def test_keeping_gains_spares_rounding_where_they_hide_large_channels():
    def error(**arguments):
        module = make_model("llama", torch.float32)
        module.model.model.embed_tokens.weight.data[:, 5] *= 100  # a huge channel that no norm lets through
        for name, parameter in module.named_parameters():
            if name.endswith("norm.weight"):
                parameter.data[5] = 1e-3
        before = logits(module)
        if arguments:
            rotate(module, **arguments)
        RTN(8).compress(module, tiny_context())
        return float((logits(module) - before).square().mean())

    assert error(gains="keep") < 0.5 * error(gains="fold")
    assert error(gains="keep", online=True) < error()


def test_online_rotation_lets_activations_be_rounded_with_less_error():
    def error(**arguments):
        module = make_model("llama-tied", torch.float32)
        for name, parameter in module.named_parameters():
            if name.endswith(("up_proj.weight", "gate_proj.weight")):
                parameter.data[[3, 17]] *= 5  # two large channels in front of down_proj
            if name.endswith("down_proj.weight"):
                parameter.data[:, [3, 17]] /= 25
        before = logits(module)
        rotate(module, **arguments)
        ActivationQuantization(4, targets=["down_proj"]).compress(module, None)
        return float((logits(module) - before).square().mean())

    assert error(online=True) < 0.5 * error(online=False)


def test_a_rotated_model_can_be_trained_after_it_was_measured(tmp_path):
    module, data = make_model("llama-tied", torch.float32), TokenData(**tiny.write_tokens(tmp_path))
    tiny.trainer(tmp_path / "run", QuaRot(online=True, epochs=1)).fit(module, datamodule=data)
    with torch.inference_mode():
        expected = module.eval()(tiny.token_rows(4))
    assert torch.equal(logits(load(tmp_path / "run")), expected)


@pytest.mark.parametrize("kind", ["llama-tied", "llama-no-hadamard", "opt", "opt-tied"])
@pytest.mark.parametrize("gains", ["fold", "keep"])
def test_a_checkpoint_gives_the_same_weights_and_logits(tmp_path, kind, gains):
    module = make_model(kind, torch.float32)
    data = TokenData(**tiny.write_tokens(tmp_path))
    trainer = tiny.trainer(tmp_path / "run", QuaRot(online=True, gains=gains), GPTQ(4))
    trainer.fit(module, datamodule=data)
    loaded = load(tmp_path / "run")
    assert module.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in module.state_dict().items())
    module.eval()
    assert torch.equal(logits(loaded), logits(module))
    assert torch.equal(logits(copy.deepcopy(loaded)), logits(module))


def test_the_structure_follows_from_the_plan_alone():
    module = make_model("opt-no-biases")
    plan = rotate(module, online=True)
    fresh = weightless_copy(make_model("opt-no-biases"))
    QuaRot.restructure(fresh, plan)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in module.named_parameters()}
    assert all(p.is_meta for p in fresh.parameters())
    assert list(transformed_layers(fresh, RotateInput)) == list(transformed_layers(module, RotateInput))


def test_modes_and_gradients_are_kept():
    module = make_model("llama-tied").train()
    module.requires_grad_(False)
    rotate(module)
    assert all(m.training for m in module.modules())
    assert not any(p.requires_grad for p in module.parameters())


def test_the_seed_decides():
    first, second, other = (make_model("llama") for _ in range(3))
    for module, seed in ((first, 0), (second, 0), (other, 1)):
        rotate(module, seed=seed)
    one, two, three = (blocks_weights(m) for m in (first, second, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], three[name]) for name in one if "down" not in name)


def refused(tmp_path, module, *stages):
    data = TokenData(**tiny.write_tokens(tmp_path))
    with pytest.raises(RecipeError) as error:
        tiny.trainer(tmp_path / "run", *stages).fit(module, datamodule=data)
    return str(error.value)


@pytest.mark.parametrize(
    ("earlier", "message"),
    [
        (Magnitude(0.5), "carry the mask of stage 'magnitude'. Put this stage first, or set allow_undo: true."),
        (RTN(4), "carry the grid of stage 'rtn'. Put this stage first, or set allow_undo: true."),
        (ActivationQuantization(8), "are already rounded. Put this stage first."),
        (LoRA(epochs=1, merge=False), "are adapters kept apart. Merge them first, or put this stage first."),
    ],
    ids=["mask", "grid", "activations", "adapters"],
)
def test_it_must_come_first(tmp_path, earlier, message):
    assert message in refused(tmp_path, CausalLM(tiny.LLAMA), earlier, QuaRot())


def test_once_is_enough(tmp_path):
    first, second = QuaRot(), QuaRot(seed=1)
    first.name, second.name = "first", "second"
    message = refused(tmp_path, CausalLM(tiny.LLAMA), first, second)
    assert "stages.second (QuaRot): the model is already rotated by stage 'first'. Drop one of the two." in message


def test_a_mask_may_be_given_up(tmp_path):
    module, data = CausalLM(tiny.LLAMA), TokenData(**tiny.write_tokens(tmp_path))
    tiny.trainer(tmp_path / "run", Magnitude(0.5), QuaRot(allow_undo=True)).fit(module, datamodule=data)
    assert all(weight.count_nonzero() == weight.numel() for weight in blocks_weights(module).values())


def test_other_gains_are_refused():
    assert [(p.key, p.value) for p in QuaRot(gains="drop").check_arguments()] == [("gains", "drop")]


def test_no_layer_can_be_left_out():
    (problem,) = QuaRot(targets=["q_proj"]).check_arguments()
    assert (problem.key, problem.value) == ("targets", ["q_proj"])
    assert problem.way_out == "Drop targets."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"do_layer_norm_before": False},
            r"norms behind the sublayers .* use another one or drop the stage",
        ),
        ({"word_embed_proj_dim": 16}, r"a narrower embedding \(project_in\); the residual stream cannot be rotated"),
    ],
)
def test_other_opts_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        describe_decoder(CausalLM(tiny.OPT | settings))


def test_norms_that_do_something_else_are_refused():
    gemma = tiny.LLAMA | {"model_type": "gemma", "head_dim": 8}  # multiplies by 1 + gain
    with pytest.raises(RecipeError, match=r"a GemmaRMSNorm, not an RMSNorm with a gain"):
        describe_decoder(CausalLM(gemma))


def test_a_vision_model_is_told_what_is_needed():
    module = ImageClassifier("resnet18", pretrained=False, num_classes=10)
    problem = QuaRot().check(module, None, [])[0]
    assert problem.text.startswith("needs a language model of the LLaMA or OPT family, but ImageClassifier has none")
    assert problem.way_out == "Use a CausalLM of one of them, or drop the stage."


def tiny_context():
    from pqqp_lightning.stages.stage import Context

    return Context(lambda blocks: None, progress=False)
