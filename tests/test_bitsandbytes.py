"""NF4, FP4 and INT8 against bitsandbytes itself, and its CPU kernels' trap, which our layers cannot fall into."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn

from pqqp_lightning import load
from pqqp_lightning.algorithms.codebook import levels_of
from pqqp_lightning.algorithms.grid import encode, round_to_grid
from pqqp_lightning.algorithms.rtn import quantize_codebook, quantize_int8
from pqqp_lightning.callbacks import FP4, INT8, NF4, Finetune, Magnitude
from pqqp_lightning.data import TokenData
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.models import CausalLM
from pqqp_lightning.network.activation_hooks import QuantizeInput
from pqqp_lightning.network.constraints import broken_constraints, collect_constraints, constraints_of

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
reference = bitsandbytes.functional
STAGES = {"nf4": NF4, "fp4": FP4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_weight(dtype=torch.float32, rows=96, columns=256, spread=0.05):
    """Some blocks and a row of zeros, a third of the entries pruned."""
    weight = spread * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight[torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) < 0.3] = 0
    weight[3] = 0
    weight[7, :128] = 0
    return weight.to(dtype)


def packed_codes(packed, shape):
    """The 4-bit codes of bitsandbytes: the first of two in the upper half of a byte."""
    return torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).view(shape).long()


@pytest.mark.parametrize("spread", [0.05, 1e-4, 300.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("kind", STAGES)
def test_four_bits_are_those_of_bitsandbytes(kind, block, dtype, spread):
    weight = make_weight(dtype, spread=spread)
    packed, state = reference.quantize_4bit(weight, quant_type=kind, blocksize=block, compress_statistics=False)
    ours = quantize_codebook(weight, kind, block)
    assert torch.equal(ours.weight, reference.dequantize_4bit(packed, state))
    assert torch.equal(ours.grid.scale.float(), state.absmax.view(96, -1))
    codes = encode(ours.weight, ours.grid).long()
    assert torch.equal(levels_of(kind, weight)[codes], state.code[packed_codes(packed, weight.shape)])


@pytest.mark.parametrize("kind", STAGES)
def test_four_bits_agree_where_rounding_changes(kind):
    """Values at and beside every midpoint, in blocks of scale 1 and of a scale that 1 / scale * scale misses."""
    levels = levels_of(kind, torch.zeros(0))
    middle = (levels[:-1] + levels[1:]) / 2
    near = torch.cat([middle, torch.nextafter(middle, torch.tensor(2.0)), torch.nextafter(middle, torch.tensor(-2.0))])
    row = torch.cat([torch.ones(1), near, torch.zeros(63 - len(near))])
    weight = torch.stack([row * scale for scale in (1.0, 0.1, 3.7, 49.0, 1e-5, 12345.678)])
    packed, state = reference.quantize_4bit(weight, quant_type=kind, blocksize=64, compress_statistics=False)
    assert torch.equal(quantize_codebook(weight, kind, 64).weight, reference.dequantize_4bit(packed, state))


@pytest.mark.parametrize("kind", STAGES)
def test_the_stage_leaves_what_bitsandbytes_would(tmp_path, kind):
    class Wide(tiny.Regressor):
        def __init__(self):
            super().__init__()
            self.blocks[0].up, self.blocks[0].down = nn.Linear(8, 128), nn.Linear(128, 8)

    weight = Wide().blocks[0].down.weight.detach().clone()
    tiny.trainer(tmp_path, STAGES[kind]()).fit(module := Wide(), tiny.regression_loader(), tiny.regression_loader())
    packed, state = reference.quantize_4bit(weight, quant_type=kind, blocksize=64, compress_statistics=False)
    assert type(module.blocks[0].down) is nn.Linear
    assert torch.equal(module.blocks[0].down.weight, reference.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_are_those_of_bitsandbytes(dtype):
    weight = make_weight(dtype)
    weight[3, 0] = 1e-3  # bitsandbytes divides a row of zeros by zero
    codes, largest, _ = reference.int8_vectorwise_quant(weight.clone())
    ours = quantize_int8(weight)
    assert torch.equal(encode(ours.weight, ours.grid).int() - 128, codes.int())
    assert torch.equal(ours.grid.scale, largest[:, None] / 127)
    expected = reference.int8_vectorwise_dequant(codes, largest)
    torch.testing.assert_close(ours.weight.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(round_to_grid(ours.weight, ours.grid), ours.weight)
    assert (ours.weight[weight == 0] == 0).all()


def test_eight_bits_of_a_row_of_zeros_are_zeros():
    assert (quantize_int8(torch.zeros(2, 8)).weight == 0).all()


def make_int8_layer():
    """A layer, inputs to it with an outlier column, and the layer after INT8; what float16 holds exactly."""
    generator = torch.Generator().manual_seed(4)
    weight = (0.05 * torch.randn(48, 64, generator=generator)).half().float()
    inputs = torch.randn(32, 64, generator=generator)
    inputs[:, 5] = 20 + 3 * inputs[:, 5].abs()
    layer = nn.Linear(64, 48, bias=False).requires_grad_(False)
    layer.weight.copy_(quantize_int8(weight).weight)
    return weight, inputs.half().float(), layer


def test_int8_is_the_layer_of_bitsandbytes_on_a_cpu():
    """There Linear8bitLt does not round its inputs; it computes in float16."""
    weight, inputs, ours = make_int8_layer()
    theirs = bitsandbytes.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False, threshold=6.0)
    theirs.weight = bitsandbytes.nn.Int8Params(weight.clone(), has_fp16_weights=False, requires_grad=False)
    torch.testing.assert_close(ours(inputs), theirs.to("cpu")(inputs.half()).float(), rtol=2e-3, atol=2e-3)


def test_int8_and_rounded_activations_are_llm_int8():
    """Against the integer product of bitsandbytes, whose constant for 1 / 127^2 is off by 2e-5."""
    weight, inputs, ours = make_int8_layer()
    codes, largest, _ = reference.int8_vectorwise_quant(weight.clone())
    rounded, scales, outliers = reference.int8_vectorwise_quant(inputs.clone(), threshold=6.0)
    assert outliers.tolist() == [5]
    multiply = torch.ops.bitsandbytes.int8_mixed_scaled_mm
    expected, _ = multiply(inputs, rounded, codes, scales, largest, outliers)
    unrounded = ours(inputs)
    QuantizeInput(8, outliers=6.0).attach(ours)
    torch.testing.assert_close(ours(inputs), expected, rtol=3e-5, atol=5e-5)
    assert (unrounded - expected).abs().max() > 1e-3


# ---------------------------------------------------------------------------------- repacking by CPU kernels


def fitted(tmp_path, *stages):
    module = CausalLM(tiny.LLAMA)
    tmp_path.mkdir(exist_ok=True)
    trainer = tiny.trainer(tmp_path / "run", *stages)
    trainer.fit(module, datamodule=TokenData(**tiny.write_tokens(tmp_path)))
    return module


@pytest.mark.parametrize("cls", [NF4, FP4, INT8])
def test_evaluation_leaves_weights_and_gradients_alone(tmp_path, cls):
    """After one ``eval`` and ``no_grad`` forward, bitsandbytes' own CPU layer has no gradients and another weight."""
    module = fitted(tmp_path, cls())
    before = copy.deepcopy(module.state_dict())
    promised = collect_constraints(module)
    ids = tiny.token_rows(2)
    with torch.no_grad():
        first = module.eval()(ids)
        assert torch.equal(module(ids), first)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not broken_constraints(module, promised)
    layer = module.model.model.layers[0].mlp.up_proj
    assert torch.equal(round_to_grid(layer.weight.detach(), constraints_of(layer).grid), layer.weight)
    inputs = torch.randn(3, 32, requires_grad=True)
    layer(inputs).square().sum().backward()
    expected = 2 * (inputs.detach() @ layer.weight.T) @ layer.weight
    torch.testing.assert_close(inputs.grad, expected.detach())
    loaded = load(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(loaded(ids), first)


@pytest.mark.parametrize("cls", [NF4, INT8])
def test_a_pruned_model_stays_pruned_and_finetuning_it_is_refused(tmp_path, cls):
    module = fitted(tmp_path / "run", Magnitude(0.5), cls())
    for name, constraints in collect_constraints(module).items():
        mask = constraints.mask()
        assert (module.get_submodule(name).weight[~mask] == 0).all()
    with pytest.raises(RecipeError, match="Finetune before quantizing"):
        fitted(tmp_path / "refused", cls(), Finetune(1))


def test_layers_that_bitsandbytes_packed_are_refused_with_the_way_out(tmp_path):
    module = CausalLM(tiny.LLAMA)
    mlp = module.model.model.layers[0].mlp
    packed = bitsandbytes.nn.Linear4bit(32, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    packed.weight = bitsandbytes.nn.Params4bit(mlp.up_proj.weight.data.clone(), requires_grad=False, quant_type="nf4")
    mlp.up_proj = packed.to("cpu")
    data = TokenData(**tiny.write_tokens(tmp_path))
    message = (
        r"1 layer \(model.model.layers.0.mlp.up_proj\) hold packed codes .*Linear4bit.* Load the model unquantized"
    )
    with pytest.raises(RecipeError, match=message):
        tiny.trainer(tmp_path / "run", Magnitude(0.5)).fit(module, datamodule=data)
