"""Grids with a codebook against slow loops and what they promise, alone and with pruning, packing and stages."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from pqqp_lightning import load
from pqqp_lightning.algorithms.codebook import _tables, bounds_of, levels_of
from pqqp_lightning.algorithms.grid import ColumnGrid, decode, encode, fit_codebook, fit_grid, round_to_grid, stacked
from pqqp_lightning.algorithms.packing import packed_bytes
from pqqp_lightning.algorithms.rtn import quantize_codebook, quantize_rtn
from pqqp_lightning.algorithms.sparsegpt import prune_sparsegpt
from pqqp_lightning.callbacks import FP4, GPTQ, INT8, NF4, RTN, SparseGPT
from pqqp_lightning.checkpoint.encoding import encode_weight
from pqqp_lightning.checkpoint.packing import pack_weight, unpack_weight
from pqqp_lightning.checkpoint.size import measure_size
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.constraints import Constraints, broken_constraints, collect_constraints, constraints_of

NAMES = ["nf4", "fp4"]
HERE = torch.zeros(0)


def make_weight(rows=24, columns=128, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (0.05 * torch.randn(rows, columns, generator=generator)).to(dtype)


def make_hessian(columns=128, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return inputs.T @ inputs


def make_mask(rows=24, columns=128, kept=0.5, seed=2):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < kept


def half_pattern(rows=24, columns=128):
    """A 2:4 mask."""
    order = torch.rand(rows, columns // 4, 4, generator=torch.Generator().manual_seed(3)).argsort(-1)
    return (order < 2).view(rows, columns)


# ------------------------------------------------------------------------------------------------ codebooks


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_sorted_and_hold_both_ends_and_zero(name):
    levels = levels_of(name, HERE)
    assert levels.dtype == torch.float32
    assert len(levels) in (15, 16)
    assert (levels.diff() > 0).all()
    assert levels[0] == -1
    assert levels[-1] == 1
    assert (levels == 0).sum() == 1


def test_levels_do_not_depend_on_where_they_were_first_asked_for():
    _tables.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        levels_of("nf4", HERE)
    scale = torch.ones(1, requires_grad=True)
    (levels_of("nf4", HERE) * scale).sum().backward()
    assert float(scale.grad) == pytest.approx(float(levels_of("nf4", HERE).sum()))


def test_nf4_levels_are_the_quantiles_of_the_paper():
    """Appendix E: quantiles of N(0, 1), eight steps above zero and seven below, scaled to end at 1."""
    normal = torch.distributions.Normal(0.0, 1.0)
    end = 0.9677083
    above = normal.icdf(torch.linspace(end, 0.5, 9, dtype=torch.float64))[:-1].flip(0)
    below = -normal.icdf(torch.linspace(end, 0.5, 8, dtype=torch.float64))[:-1]
    expected = torch.cat([below, torch.zeros(1, dtype=torch.float64), above])
    np.testing.assert_allclose(levels_of("nf4", HERE), (expected / expected.max()).numpy(), atol=2e-6)


def test_fp4_levels_are_the_numbers_of_its_bits():
    """Sign, two bits of exponent with bias 1, one of mantissa; bitsandbytes' smallest number is a quarter of that."""
    found = {0.0}
    for exponent, mantissa in [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]:
        found |= {(1 + mantissa / 2) * 2**exponent}
    largest = max(found)
    assert largest == 12
    expected = sorted({sign * value / largest for value in found | {1 / 16} for sign in (-1, 1)})
    np.testing.assert_allclose(levels_of("fp4", HERE), expected, rtol=1e-7)


@pytest.mark.parametrize("group_size", [None, 32, 64])
@pytest.mark.parametrize("name", NAMES)
def test_rounding_matches_a_slow_loop(name, group_size):
    weight = make_weight(6)
    weight[2] = 0
    levels = levels_of(name, HERE).double().numpy()
    quantized = quantize_codebook(weight, name, group_size)
    codes, size = encode(weight, quantized.grid), group_size or 128
    for row in range(6):
        for start in range(0, 128, size):
            block = weight[row, start : start + size].double().numpy()
            scale = np.abs(block).max()
            assert float(quantized.grid.scale[row, start // size]) == scale
            for i, value in enumerate(block):
                nearest = np.abs(levels - (value / scale if scale else 0)).argmin()
                assert int(codes[row, start + i]) == nearest
                assert float(quantized.weight[row, start + i]) == pytest.approx(levels[nearest] * scale, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_on_a_codebook_grid_stays_exactly_there(name, dtype):
    quantized = quantize_codebook(make_weight(dtype=dtype), name, 32)
    assert quantized.weight.dtype == dtype
    assert torch.equal(round_to_grid(quantized.weight, quantized.grid), quantized.weight)
    codes = encode(quantized.weight, quantized.grid)
    assert torch.equal(decode(codes, quantized.grid, dtype), quantized.weight)
    assert (quantized.grid.scale.dtype == torch.float32) == (dtype == torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zero(name):
    weight, mask = make_weight(), make_mask()
    assert (quantize_codebook(weight * mask, name, 64).weight[~mask] == 0).all()


def test_a_value_on_a_midpoint_goes_to_the_level_below():
    bounds = bounds_of("nf4", HERE)
    weight = torch.cat([bounds, torch.ones(1)])[None]
    codes = encode(weight, fit_codebook(weight, "nf4"))
    assert codes.tolist() == [[*range(15), 15]]


@pytest.mark.parametrize("seed", range(4))
def test_nf4_is_nearer_to_normal_weights_than_fp4_and_than_even_levels(seed):
    weight = make_weight(64, 256, seed)

    def error(quantized):
        return float((quantized.weight - weight).square().sum())

    nf4, fp4 = (error(quantize_codebook(weight, name, 64)) for name in NAMES)
    assert nf4 < fp4
    assert nf4 < error(quantize_rtn(weight, bits=4, group_size=64))


@pytest.mark.parametrize("options", [{"group_size": 32}, {}, {"per_tensor": True}, {"symmetric": False}, "nf4"])
def test_column_rounding_is_that_of_the_matrix(options):
    weight = make_weight()
    grid = fit_codebook(weight, "nf4", 32) if options == "nf4" else fit_grid(weight, 4, **options)
    columns = ColumnGrid(grid.columns, grid.group_size)
    columns.add(grid)
    rounded = torch.stack([columns.round(i, weight[:, i]) for i in range(128)], dim=1)
    assert torch.equal(rounded, round_to_grid(weight, grid))


def test_row_groups_of_a_codebook_grid_come_apart_and_together():
    weight = make_weight()
    grid = fit_codebook(weight, "nf4", 32)
    parts = grid.chunk(3)
    assert [part.codebook for part in parts] == ["nf4"] * 3
    again = stacked(parts, [8, 8, 8])
    assert torch.equal(again.scale, grid.scale)
    assert again.codebook == "nf4"
    assert grid.to(torch.device("cpu")).codebook == "nf4"
    constraints = Constraints((24, 128), grid=grid).select(rows=torch.arange(0, 24, 2))
    assert not constraints.violations(round_to_grid(weight, grid)[::2])


# ------------------------------------------------------------------------------- pruning what is on a codebook


@pytest.mark.parametrize("earlier", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("amount", [{"sparsity": 0.6}, {"pattern": (2, 4)}], ids=["unstructured", "2:4"])
@pytest.mark.parametrize("name", NAMES)
def test_sparsegpt_keeps_mask_and_codebook(name, amount, earlier):
    weight, hessian, mask = make_weight(), make_hessian(), make_mask(kept=0.9) if earlier else None
    weight = weight if mask is None else weight * mask
    quantized = quantize_codebook(weight, name, 32)
    pruned = prune_sparsegpt(quantized.weight, hessian, **amount, mask=mask, grid=quantized.grid)
    constraints = Constraints((24, 128), grid=quantized.grid).with_mask(pruned.mask)
    assert not constraints.violations(pruned.weight)
    assert mask is None or not (pruned.mask & ~mask).any()


@pytest.mark.parametrize("seed", range(4))
def test_sparsegpt_on_a_codebook_beats_masking_alone(seed):
    weight, hessian = make_weight(seed=seed), make_hessian(seed=seed + 10)
    quantized = quantize_codebook(weight, "nf4", 32)
    pruned = prune_sparsegpt(quantized.weight, hessian, sparsity=0.5, grid=quantized.grid)

    def loss(changed):
        return float(((changed - quantized.weight) @ hessian).mul(changed - quantized.weight).sum())

    assert loss(pruned.weight) < loss(quantized.weight * pruned.mask)


def test_off_a_codebook_grid_is_found_exactly():
    quantized = quantize_codebook(make_weight(), "nf4", 32)
    constraints = Constraints((24, 128), grid=quantized.grid)
    changed = quantized.weight.clone()
    changed[4, 5] = torch.nextafter(changed[4, 5], torch.tensor(1.0))
    assert constraints.violations(changed) == ["1 entries are off the 4-bit grid"]


# --------------------------------------------------------------------------------------------- packing and size


@pytest.mark.parametrize("masked", ["dense", "unstructured", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_packing_is_bit_exact_and_as_small_as_counted(name, dtype, masked):
    mask = {"dense": None, "unstructured": make_mask(), "2:4": half_pattern()}[masked]
    weight = make_weight(dtype=dtype)
    quantized = quantize_codebook(weight if mask is None else weight * mask, name, 32)
    constraints = Constraints((24, 128), grid=quantized.grid)
    if mask is not None:
        constraints = constraints.with_mask(mask, (2, 4) if masked == "2:4" else None)
    parts, entry = pack_weight(quantized.weight, constraints)
    assert entry["codebook"] == name
    back, again = unpack_weight(entry, parts)
    assert torch.equal(back, quantized.weight)
    assert not again.violations(back)
    assert again.grid.codebook == name
    kept = 24 * 128 if mask is None else int(mask.sum())
    mask_bytes = {"dense": 0, "unstructured": packed_bytes(24 * 128, 1), "2:4": packed_bytes(kept, 2)}[masked]
    scale_bytes = 24 * 4 * (4 if dtype == torch.float32 else 2)
    assert sum(p.numel() * p.element_size() for p in parts.values()) == kept // 2 + scale_bytes + mask_bytes
    assert encode_weight(constraints, 32).size_bytes == kept // 2 + scale_bytes + mask_bytes


def test_a_uniform_grid_is_stored_as_before():
    quantized = quantize_rtn(make_weight(), bits=4)
    assert "codebook" not in pack_weight(quantized.weight, Constraints((24, 128), grid=quantized.grid))[1]


# -------------------------------------------------------------------------------------------------- the stages


def fit(folder, *stages, module=None):
    module = tiny.Regressor() if module is None else module
    tiny.trainer(folder, *stages).fit(module, tiny.regression_loader(), tiny.regression_loader(seed=1))
    return module


@pytest.mark.parametrize("order", [(NF4, SparseGPT), (SparseGPT, NF4), (FP4, SparseGPT), (INT8, SparseGPT)])
def test_masks_and_codebooks_hold_in_both_orders_and_load(tmp_path, order):
    module = fit(tmp_path, *(cls(0.5) if cls is SparseGPT else cls() for cls in order))
    constraints = collect_constraints(module)
    assert len(constraints) == 4
    assert not broken_constraints(module, constraints)
    assert all(2 * c.kept() == c.shape[0] * c.shape[1] and c.grid is not None for c in constraints.values())
    loaded = load(tmp_path, tiny.Regressor())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), loaded.parameters(), strict=True))
    assert collect_constraints(loaded)["blocks.0.up"].grid.codebook == constraints["blocks.0.up"].grid.codebook


def test_counted_size_is_codes_and_scales(tmp_path):
    module = fit(tmp_path, stage := NF4(group_size=4))
    size = measure_size(module, stage.find_layers(module))
    assert {layer.bits for layer in size.layers} == {4}
    assert {layer.size_bytes for layer in size.layers} == {128 // 2 + 4 * 128 // 4}


def test_a_width_that_64_does_not_divide_gets_its_largest_divisor(tmp_path):
    class Odd(tiny.Regressor):
        def __init__(self):
            super().__init__()
            self.blocks[0].up, self.blocks[0].down = nn.Linear(8, 96), nn.Linear(96, 8)

    trainer = tiny.trainer(tmp_path, NF4())
    trainer.fit(module := Odd(), tiny.regression_loader(), tiny.regression_loader(seed=1))
    assert constraints_of(module.blocks[0].down).grid.group_size == 48
    assert constraints_of(module.blocks[0].up).grid.group_size == 8
    assert "blocks of 48, since 64 does not divide 96 inputs" in (tmp_path / "records.jsonl").read_text()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (NF4(group_size=5), r"group_size=5 does not divide in_features=8 of .*Use 8, or add them to ignore"),
        (FP4(group_size=0), r"group_size=0 is not above 0. Use 'auto' for 64 or the nearest divisor below"),
        (NF4(group_size={"up": 4}), r"group_size has no pattern for .*down.*Add a '\*' entry"),
    ],
)
def test_wrong_block_sizes_are_refused_with_the_way_out(tmp_path, stage, message):
    with pytest.raises(RecipeError, match=message):
        fit(tmp_path, stage)


def test_a_width_without_a_divisor_is_refused_with_the_way_out(tmp_path):
    class Prime(tiny.Regressor):
        def __init__(self):
            super().__init__()
            self.blocks[0].up, self.blocks[0].down = nn.Linear(8, 67), nn.Linear(67, 8)

    with pytest.raises(
        RecipeError, match=r"would be 1 for in_features=67 of 1 layer .blocks.0.down.*Set group_size to 67"
    ):
        fit(tmp_path, NF4(), module=Prime())


@pytest.mark.parametrize("second", [RTN(4), FP4(), INT8(), GPTQ(4)], ids=lambda s: s.name)
def test_an_earlier_grid_is_not_left(tmp_path, second):
    with pytest.raises(RecipeError, match=r"would leave the grid of stage 'nf4'\. Give the stages disjoint targets"):
        fit(tmp_path / "refused", NF4(), second)
    second = copy.copy(second)
    second.allow_undo = True
    module = fit(tmp_path / "run", NF4(), second)
    expected = {"FP4": "fp4"}.get(type(second).__name__)
    assert {c.grid.codebook for c in collect_constraints(module).values()} == {expected}
