"""The fast algorithms against slow references from the papers, and the inequalities that justify them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import pytest
import reference
import torch
from threadpoolctl import threadpool_limits

from pqqp_lightning.algorithms.gptq import quantize_gptq
from pqqp_lightning.algorithms.grid import Grid, decode, encode, fit_grid
from pqqp_lightning.algorithms.magnitude import prune_magnitude, prune_magnitude_global
from pqqp_lightning.algorithms.packing import pack_bits, unpack_bits
from pqqp_lightning.algorithms.rtn import quantize_rtn
from pqqp_lightning.algorithms.selection import keep_highest
from pqqp_lightning.algorithms.sparsegpt import prune_sparsegpt
from pqqp_lightning.algorithms.wanda import scores_wanda

ROWS, COLUMNS = 48, 256
SEEDS = range(6)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Matrices this small gain nothing from threads, and on a busy machine these wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@dataclass
class Layer:
    """A weight and the statistics of correlated inputs to it."""

    weight: torch.Tensor  # [O, I]
    hessian: torch.Tensor  # [I, I]
    column_norm: torch.Tensor  # [I]


@cache
def make_layer(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS, dead: tuple[int, ...] = ()) -> Layer:
    """Inputs X = Z A with a random mixing A: correlated columns of unequal size, 3 samples a column."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    size = torch.exp(0.5 * randn(columns))
    mixing = (randn(columns, columns) / columns**0.5 + torch.eye(columns)) * size  # [I, I]
    inputs = randn(3 * columns, columns) @ mixing  # [T, I]
    inputs[:, list(dead)] = 0
    return Layer(
        weight=0.05 * randn(rows, columns),
        hessian=(2 / len(inputs) * inputs.double().T @ inputs.double()).float(),  # float32, yet exactly symmetric
        column_norm=inputs.norm(dim=0),
    )


def earlier_mask(sparsity: float, seed: int = 100) -> torch.Tensor:
    """An unstructured mask, True where kept."""
    return torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) >= sparsity


def loss(layer: Layer, changed) -> float:
    return reference.objective(layer.weight, torch.as_tensor(changed).double(), layer.hessian)


def reference_grid(grid: Grid) -> reference.Grid:
    """The project's grid in the reference's terms."""
    rows = ROWS if grid.scale.shape[0] == 1 else 1
    scale = grid.scale.double().repeat(rows, 1).numpy()
    zero = np.full(scale.shape, 2.0 ** (grid.bits - 1))
    if grid.zero is not None:
        zero = grid.zero.double().repeat(rows, 1).numpy()
    return reference.Grid(grid.bits, scale, zero, grid.columns // scale.shape[1])


def assert_mostly_equal(actual, expected, at_least: float = 0.995) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    share = float((actual == expected).mean())
    assert share >= at_least, f"only {share:.2%} of the entries agree"


def assert_on_grid(weight: torch.Tensor, grid: Grid) -> None:
    codes = encode(weight, grid)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**grid.bits
    assert torch.equal(decode(codes, grid, weight.dtype), weight)


def assert_pattern(mask: torch.Tensor, pattern: tuple[int, int]) -> None:
    keep, every = pattern
    assert (mask.reshape(len(mask), -1, every).sum(-1) == keep).all()


# ------------------------------------------------------------------------- the reference against itself

SMALL = make_layer(3, rows=8, columns=96, dead=(5, 40))
SMALL_MASK = earlier_mask(0.3)[:8, :96].numpy()
SMALL_GRID = reference.fit_grid(SMALL.weight, 4, group_size=32)


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.5, "block_size": 32},
        {"pattern": (2, 4)},
        {"sparsity": 0.6, "block_size": 32, "mask": SMALL_MASK},
        {"sparsity": 0.5, "block_size": 64, "grid": SMALL_GRID},
    ],
    ids=["unstructured", "pattern", "mask", "grid"],
)
def test_reference_sparsegpt_agrees_with_explicit_solves(options):
    weight, mask = reference.sparsegpt(SMALL.weight, SMALL.hessian, **options)
    other, other_mask = reference.sparsegpt(SMALL.weight, SMALL.hessian, **options, loop=reference.obs_sequential)
    np.testing.assert_array_equal(mask, other_mask)
    np.testing.assert_allclose(weight, other, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [{}, {"group_size": 32, "symmetric": False}, {"activation_order": True, "group_size": 32}, {"mask": SMALL_MASK}],
    ids=["channel", "groups", "activation_order", "mask"],
)
def test_reference_gptq_agrees_with_explicit_solves(options):
    result = reference.gptq(SMALL.weight, SMALL.hessian, bits=4, **options)
    other = reference.gptq(SMALL.weight, SMALL.hessian, bits=4, **options, loop=reference.obs_sequential)
    np.testing.assert_array_equal(result.codes, other.codes)
    np.testing.assert_allclose(result.weight, other.weight, atol=1e-12)


def test_reference_update_is_the_least_squares_solution():
    """With a mask known beforehand and one row, every column's update is the optimum given the earlier ones."""
    weight, hessian = reference.prepare(SMALL.weight[:1], SMALL.hessian, 0.01)
    changed = reference.obs_sequential(weight, hessian, lambda c, w, _: w[:, c] * (c != 0))
    gradient = (changed - weight) @ hessian
    assert changed[0, 0] == 0
    np.testing.assert_allclose(gradient[0, 1:], 0, atol=1e-9)


# ------------------------------------------------------------------------------------------ pruning scores

AMOUNTS = [{"sparsity": 0.5}, {"sparsity": 0.37}, {"pattern": (2, 4)}, {"pattern": (1, 4)}, {"pattern": (4, 8)}]


def amount_id(amount: dict) -> str:
    return "-".join(str(part) for part in amount.values())


def prune(
    method: str, layer: Layer, weight: torch.Tensor | None = None, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pruned weight and its mask, by any of the three methods."""
    weight = layer.weight if weight is None else weight
    if method == "sparsegpt":
        pruned = prune_sparsegpt(weight, layer.hessian, **options)
        return pruned.weight, pruned.mask
    options.pop("grid", None)
    mask = (
        prune_magnitude(weight, **options)
        if method == "magnitude"
        else keep_highest(scores_wanda(weight, layer.column_norm), **options)
    )
    return weight * mask, mask


METHODS = ["magnitude", "wanda", "sparsegpt"]


@pytest.mark.parametrize("earlier", [None, 0.2], ids=["fresh", "masked"])
@pytest.mark.parametrize("amount", AMOUNTS, ids=amount_id)
def test_score_masks_match_reference(amount, earlier):
    layer = make_layer()
    mask = None if earlier is None else earlier_mask(earlier)
    array = None if mask is None else mask.numpy()
    assert_mostly_equal(
        prune_magnitude(layer.weight, **amount, mask=mask),
        reference.magnitude(layer.weight, **amount, mask=array),
        at_least=1,
    )
    assert_mostly_equal(
        keep_highest(scores_wanda(layer.weight, layer.column_norm), **amount, mask=mask),
        reference.wanda(layer.weight, layer.column_norm, **amount, mask=array),
        at_least=0.9999,
    )


@pytest.mark.parametrize("earlier", [None, 0.2], ids=["fresh", "masked"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.731])
def test_global_magnitude_matches_reference(sparsity, earlier):
    weights = [make_layer(0).weight, 3 * make_layer(1).weight, make_layer(2, rows=8, columns=96).weight]
    masks, arrays = None, None
    if earlier is not None:
        masks = [
            torch.rand(w.shape, generator=torch.Generator().manual_seed(i)) >= earlier for i, w in enumerate(weights)
        ]
        arrays = [mask.numpy() for mask in masks]
    kept = prune_magnitude_global(weights, sparsity=sparsity, masks=masks)
    for actual, expected in zip(
        kept, reference.magnitude_global(weights, sparsity=sparsity, masks=arrays), strict=True
    ):
        assert_mostly_equal(actual, expected, at_least=1)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.777, 0.99])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_counts_are_exact(method, sparsity, ties):
    layer = make_layer()
    weight = quantize_rtn(layer.weight, bits=2).weight if ties else layer.weight
    pruned, mask = prune(method, layer, weight, sparsity=sparsity)
    assert mask.dtype == torch.bool
    expected = ROWS * round(sparsity * COLUMNS) if method == "wanda" else round(sparsity * ROWS * COLUMNS)
    assert int((~mask).sum()) == expected
    if method == "wanda":
        assert ((~mask).sum(1) == round(sparsity * COLUMNS)).all()
    assert (pruned[~mask] == 0).all()


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("method", METHODS)
def test_patterns_are_exact(method, pattern, ties):
    layer = make_layer()
    weight = quantize_rtn(layer.weight, bits=2).weight if ties else layer.weight
    pruned, mask = prune(method, layer, weight, pattern=pattern)
    assert_pattern(mask, pattern)
    assert (pruned[~mask] == 0).all()


@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize("first", METHODS)
def test_a_later_mask_is_a_subset_of_the_earlier_one(first, second):
    layer = make_layer()
    pruned, mask = prune(first, layer, sparsity=0.3)
    again, later = prune(second, layer, pruned, sparsity=0.6, mask=mask)
    assert not (later & ~mask).any()
    assert (again[~later] == 0).all()
    if second != "wanda" or first == "wanda":
        expected = ROWS * round(0.6 * COLUMNS) if second == "wanda" else round(0.6 * ROWS * COLUMNS)
        assert int((~later).sum()) == expected


@pytest.mark.parametrize("method", METHODS)
def test_asking_for_less_than_is_pruned_changes_no_mask(method):
    layer = make_layer()
    pruned, mask = prune("wanda", layer, sparsity=0.6)
    _, later = prune(method, layer, pruned, sparsity=0.3, mask=mask)
    assert torch.equal(later, mask)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_asking_for_exactly_what_is_pruned_changes_no_mask(method):
    options = {"block_size": 32} if method == "sparsegpt" else {}
    for seed in SEEDS:
        layer = make_layer(seed)
        pruned, mask = prune("wanda", layer, sparsity=0.5)
        _, later = prune(method, layer, pruned, sparsity=0.5, mask=mask, **options)
        assert torch.equal(later, mask)


@pytest.mark.parametrize(
    ("method", "half"),
    [
        ("magnitude", "early"),
        ("magnitude", "late"),
        ("sparsegpt", "early"),
        ("sparsegpt", "late"),
    ],
)
def test_a_skewed_mask_still_counts_towards_the_sparsity(method, half):
    """Half of the columns carry all earlier zeros; the total still equals the requested sparsity."""
    layer = make_layer()
    mask = earlier_mask(0.8)
    mask[:, slice(COLUMNS // 2, None) if half == "early" else slice(0, COLUMNS // 2)] = True
    _, later = prune(method, layer, layer.weight * mask, sparsity=0.5, mask=mask)
    assert int((~later).sum()) == round(0.5 * ROWS * COLUMNS)
    assert not (later & ~mask).any()


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_counts_are_rounded_from_the_number_of_entries(method):
    layer = make_layer(0, rows=3, columns=15)
    _, mask = prune(method, layer, sparsity=0.7)
    assert int((~mask).sum()) == round(0.7 * 45)


# ------------------------------------------------------------------------------------------------ SparseGPT


@pytest.mark.parametrize("earlier", [None, 0.2], ids=["fresh", "masked"])
@pytest.mark.parametrize(
    "grid_options", [None, {"group_size": 64, "symmetric": False}, {}], ids=["free", "groups", "channel"]
)
@pytest.mark.parametrize(
    "amount", [{"sparsity": 0.5}, {"sparsity": 0.37, "block_size": 96}, {"pattern": (2, 4)}], ids=amount_id
)
def test_sparsegpt_matches_reference(amount, grid_options, earlier):
    layer = make_layer()
    mask = None if earlier is None else earlier_mask(earlier)
    weight = layer.weight if mask is None else layer.weight * mask
    grid, expected_grid = None, None
    if grid_options is not None:
        weight, grid = vars_of(quantize_rtn(weight, bits=4, **grid_options))
        expected_grid = reference_grid(grid)
    actual = prune_sparsegpt(weight, layer.hessian, **amount, mask=mask, grid=grid)
    expected, expected_mask = reference.sparsegpt(
        weight, layer.hessian, **amount, mask=None if mask is None else mask.numpy(), grid=expected_grid
    )
    assert_mostly_equal(actual.mask, expected_mask)
    assert int(actual.mask.sum()) == int(expected_mask.sum())
    assert loss(layer, actual.weight) == pytest.approx(loss(layer, expected), rel=0.01)
    near = np.isclose(actual.weight, expected, atol=1e-4)
    assert near.mean() > 0.98
    if grid is not None:
        assert_on_grid(actual.weight, grid)


def vars_of(quantized) -> tuple[torch.Tensor, Grid]:
    return quantized.weight, quantized.grid


@pytest.mark.parametrize("block_size", [32, 96, 128, 1000])
def test_sparsegpt_spends_its_sparsity_evenly_over_blocks(block_size):
    layer = make_layer()
    mask = prune_sparsegpt(layer.weight, layer.hessian, sparsity=0.37, block_size=block_size).mask
    for end in [*range(block_size, COLUMNS, block_size), COLUMNS]:
        assert int((~mask[:, :end]).sum()) == round(0.37 * ROWS * end)


def test_sparsegpt_on_a_given_mask_reconstructs():
    """With sparsity 0 and a mask, only reconstruction is left: it beats masking alone."""
    layer = make_layer()
    mask = keep_highest(scores_wanda(layer.weight, layer.column_norm), sparsity=0.5)
    # Not the masked weight: the error of pruning has to be there for the loop to compensate.
    actual = prune_sparsegpt(layer.weight, layer.hessian, sparsity=0, mask=mask)
    assert torch.equal(actual.mask, mask)
    assert loss(layer, actual.weight) < loss(layer, layer.weight * mask)


# ---------------------------------------------------------------------------------------------------- grids

UNITS = [
    {"per_tensor": True},
    {},
    {"group_size": 64},
    {"group_size": 32},
]
LAYOUTS = [{**unit, "symmetric": symmetric} for unit, symmetric in product(UNITS, [True, False])]


def layout_id(layout: dict) -> str:
    unit = "tensor" if layout.get("per_tensor") else f"group{layout.get('group_size', 'all')}"
    return f"{unit}-{'sym' if layout['symmetric'] else 'asym'}"


@pytest.mark.parametrize("magnitude", [1, 1e-5], ids=["ordinary", "tiny"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_rtn_matches_reference(layout, bits, magnitude):
    weight = magnitude * make_layer().weight
    actual = quantize_rtn(weight, bits=bits, **layout)
    expected = reference.rtn(weight, bits, **layout)
    ours = reference_grid(actual.grid)
    half = actual.grid.scale.dtype == torch.float16
    assert half == (magnitude == 1)
    np.testing.assert_allclose(ours.scale, expected.grid.scale, rtol=0 if half else 3e-7)
    np.testing.assert_array_equal(ours.zero, expected.grid.zero)
    # In float32 a unit's largest entry stands exactly between two levels, so that rounding decides.
    codes = encode(actual.weight, actual.grid)
    assert_mostly_equal(codes, expected.codes, at_least=0.9999 if half else 0.96)
    assert abs(codes.numpy() - expected.codes).max() <= 1
    np.testing.assert_allclose(actual.weight, expected.weight, rtol=1e-6, atol=float(ours.scale.max()) * 1.001)


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_grid_has_the_documented_form(layout):
    grid = fit_grid(make_layer().weight, 4, **layout)
    groups = COLUMNS // layout.get("group_size", COLUMNS)
    assert grid.scale.shape == (1 if layout.get("per_tensor") else ROWS, groups)
    assert grid.scale.dtype == torch.float16
    assert (grid.bits, grid.columns) == (4, COLUMNS)
    if layout["symmetric"]:
        assert grid.zero is None
    else:
        assert grid.zero.dtype == torch.uint8
        assert grid.zero.shape == grid.scale.shape


def test_tiny_scales_are_stored_in_float32():
    assert fit_grid(1e-5 * make_layer().weight, 4).scale.dtype == torch.float32


@pytest.mark.parametrize("symmetric", [True, False])
def test_all_zero_groups_have_scale_one(symmetric):
    weight = make_layer().weight.clone()
    weight[3] = 0
    weight[5, 64:128] = 0
    grid = fit_grid(weight, 4, group_size=64, symmetric=symmetric)
    assert (grid.scale[3] == 1).all()
    assert grid.scale[5, 1] == 1
    quantized = quantize_rtn(weight, bits=4, group_size=64, symmetric=symmetric).weight
    assert (quantized[3] == 0).all()
    assert (quantized[5, 64:128] == 0).all()


@pytest.mark.parametrize("offset", [0.4, -0.4])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_is_on_the_grid_of_one_sided_weights(bits, offset):
    weight = make_layer().weight + offset
    assert bool((weight > 0).all() or (weight < 0).all())
    actual = quantize_rtn(weight, bits=bits, symmetric=False)
    expected = reference.rtn(weight, bits, symmetric=False)
    assert_on_grid(torch.zeros_like(weight), actual.grid)
    assert_mostly_equal(reference_grid(actual.grid).zero, expected.grid.zero, at_least=1)
    assert_mostly_equal(encode(actual.weight, actual.grid), expected.codes, at_least=0.9999)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_quantized_weight_lies_on_its_grid(method, layout, bits, dtype):
    layer = make_layer(1)
    weight = layer.weight.to(dtype)
    if method == "rtn":
        quantized = quantize_rtn(weight, bits=bits, **layout)
    else:
        quantized = quantize_gptq(weight, layer.hessian, bits=bits, **layout)
    assert quantized.weight.dtype == dtype
    assert_on_grid(quantized.weight, quantized.grid)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruning_keeps_the_dtype_and_its_argument(method, dtype):
    layer = make_layer(1)
    weight = layer.weight.to(dtype)
    before, hessian = weight.clone(), layer.hessian.clone()
    pruned, mask = prune(method, layer, weight, sparsity=0.5)
    assert pruned.dtype == dtype
    assert (pruned[~mask] == 0).all()
    assert torch.equal(weight, before)
    assert torch.equal(layer.hessian, hessian)


# ----------------------------------------------------------------------------------------------------- GPTQ


@pytest.mark.parametrize("earlier", [None, 0.5], ids=["dense", "masked"])
@pytest.mark.parametrize("activation_order", [False, True], ids=["plain", "act_order"])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("layout", LAYOUTS[:6], ids=layout_id)
def test_gptq_matches_reference(layout, bits, activation_order, earlier):
    layer = make_layer()
    mask = None if earlier is None else earlier_mask(earlier)
    weight = layer.weight if mask is None else layer.weight * mask
    options = {"bits": bits, "activation_order": activation_order, **layout}
    actual = quantize_gptq(weight, layer.hessian, **options, mask=mask)
    expected = reference.gptq(weight, layer.hessian, **options, mask=None if mask is None else mask.numpy())
    assert_mostly_equal(encode(actual.weight, actual.grid), expected.codes)
    ours = reference_grid(actual.grid)
    np.testing.assert_allclose(ours.scale, expected.grid.scale, rtol=0.02)
    assert np.isclose(ours.scale, expected.grid.scale, rtol=1e-5).mean() > 0.95
    assert_mostly_equal(ours.zero, expected.grid.zero)
    assert loss(layer, actual.weight) == pytest.approx(loss(layer, expected.weight), rel=0.01)
    if mask is not None:
        assert (actual.weight[~mask] == 0).all()
    assert_on_grid(actual.weight, actual.grid)


@pytest.mark.parametrize("block_size", [16, 96, 1000])
@pytest.mark.parametrize("group_size", [None, 64])
def test_gptq_does_not_depend_on_its_block_size(block_size, group_size):
    layer = make_layer()
    one, other = (
        quantize_gptq(layer.weight, layer.hessian, bits=4, group_size=group_size, block_size=size)
        for size in (128, block_size)
    )
    assert_mostly_equal(encode(one.weight, one.grid), encode(other.weight, other.grid))


def test_gptq_fits_a_group_on_the_weights_as_updated_so_far():
    """The second group of a block of 128 sees the updates of the first, unlike in the published code."""
    layer = make_layer()
    grid = quantize_gptq(layer.weight, layer.hessian, bits=4, group_size=64, block_size=128).grid
    fresh = reference.gptq(layer.weight, layer.hessian, bits=4, group_size=64).grid
    stale = reference.gptq(layer.weight, layer.hessian, bits=4, group_size=64, stale_block=128).grid
    ours = grid.scale.double().numpy()[:, 1]
    assert np.isclose(ours, fresh.scale[:, 1], rtol=1e-3).mean() > 0.95
    assert np.isclose(ours, stale.scale[:, 1], rtol=1e-3).mean() < 0.5


def test_gptq_fits_a_group_on_its_kept_entries():
    """A group that is pruned altogether is all zero: its scale is 1, and the layer's scales stay in float16."""
    layer = make_layer()
    weight = 0.1 * layer.weight
    mask = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    mask[5, 64:128] = False
    grid = quantize_gptq(weight * mask, layer.hessian, bits=8, group_size=64, mask=mask).grid
    assert grid.scale[5, 1] == 1
    assert grid.scale.dtype == torch.float16


@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[5]], ids=layout_id)
def test_gptq_of_bfloat16_matches_reference(layout):
    layer = make_layer()
    weight = layer.weight.bfloat16()
    actual = quantize_gptq(weight, layer.hessian, bits=4, **layout)
    expected = reference.gptq(weight.float(), layer.hessian, bits=4, **layout)
    assert_mostly_equal(encode(actual.weight, actual.grid), expected.codes)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_scale_of_the_hessian_does_not_matter(factor):
    layer = make_layer()
    one, other = (quantize_gptq(layer.weight, scale * layer.hessian, bits=4) for scale in (1, factor))
    assert_mostly_equal(encode(one.weight, one.grid), encode(other.weight, other.grid))


# ------------------------------------------------------------------------------------------ dead columns etc.

DEAD = (0, 17, 100, 255)


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": (2, 4)}], ids=amount_id)
def test_sparsegpt_zeroes_dead_columns(options):
    layer = make_layer(4, dead=DEAD)
    actual = prune_sparsegpt(layer.weight, layer.hessian, **options)
    expected, expected_mask = reference.sparsegpt(layer.weight, layer.hessian, **options)
    assert (actual.weight[:, list(DEAD)] == 0).all()
    assert_mostly_equal(actual.mask, expected_mask)
    assert loss(layer, actual.weight) == pytest.approx(loss(layer, expected), rel=0.01)


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 64])
def test_gptq_zeroes_dead_columns(group_size, activation_order):
    layer = make_layer(4, dead=DEAD)
    options = {"bits": 4, "group_size": group_size, "activation_order": activation_order}
    actual = quantize_gptq(layer.weight, layer.hessian, **options)
    expected = reference.gptq(layer.weight, layer.hessian, **options)
    assert (actual.weight[:, list(DEAD)] == 0).all()
    assert_mostly_equal(encode(actual.weight, actual.grid), expected.codes)
    assert loss(layer, actual.weight) == pytest.approx(loss(layer, expected.weight), rel=0.01)


def test_dead_columns_go_first_in_wanda():
    layer = make_layer(4, dead=DEAD)
    mask = keep_highest(scores_wanda(layer.weight, layer.column_norm), sparsity=0.1)
    assert not mask[:, list(DEAD)].any()


@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_a_rank_deficient_hessian_is_handled_by_damping(damping):
    layer = make_layer(5)
    inputs = torch.linalg.cholesky(layer.hessian.double())[: COLUMNS // 3].float()  # [T < I, I]
    thin = Layer(layer.weight, inputs.T @ inputs, inputs.norm(dim=0))
    pruned = prune_sparsegpt(thin.weight, thin.hessian, sparsity=0.5, damping=damping)
    expected, _ = reference.sparsegpt(thin.weight, thin.hessian, sparsity=0.5, damping=damping)
    assert loss(thin, pruned.weight) == pytest.approx(loss(thin, expected), rel=0.02)
    quantized = quantize_gptq(thin.weight, thin.hessian, bits=4, damping=damping)
    expected_codes = reference.gptq(thin.weight, thin.hessian, bits=4, damping=damping).codes
    assert_mostly_equal(encode(quantized.weight, quantized.grid), expected_codes, at_least=0.99)


# ------------------------------------------------------------------------------------------- inequalities


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": (2, 4)}], ids=amount_id)
def test_sparsegpt_beats_wanda_beats_magnitude(amount, seed):
    layer = make_layer(seed)
    magnitude, wanda, sparsegpt = (loss(layer, prune(method, layer, **amount)[0]) for method in METHODS)
    assert sparsegpt < wanda < magnitude


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 64])
def test_gptq_beats_rtn(group_size, bits, seed):
    layer = make_layer(seed)
    options = {"bits": bits, "group_size": group_size, "symmetric": False}
    rtn = loss(layer, quantize_rtn(layer.weight, **options).weight)
    gptq = loss(layer, quantize_gptq(layer.weight, layer.hessian, **options).weight)
    assert gptq < rtn


@pytest.mark.parametrize("seed", SEEDS)
def test_holding_the_mask_in_the_loop_beats_putting_it_back(seed):
    layer = make_layer(seed)
    pruned, mask = prune("sparsegpt", layer, sparsity=0.5)
    held = quantize_gptq(pruned, layer.hessian, bits=3, mask=mask).weight
    put_back = quantize_gptq(pruned, layer.hessian, bits=3).weight * mask
    assert loss(layer, held) < loss(layer, put_back)


@pytest.mark.parametrize("seed", SEEDS)
def test_rounding_in_the_loop_beats_snapping_afterwards(seed):
    layer = make_layer(seed)
    weight, grid = vars_of(quantize_gptq(layer.weight, layer.hessian, bits=3))
    held = prune_sparsegpt(weight, layer.hessian, sparsity=0.5, grid=grid).weight
    loose = prune_sparsegpt(weight, layer.hessian, sparsity=0.5).weight
    snapped = decode(encode(loose, grid), grid, weight.dtype)
    assert loss(layer, held) < loss(layer, snapped)


# ---------------------------------------------------------------------------------------------- composition


def quantize(method: str, layer: Layer, weight: torch.Tensor, mask: torch.Tensor | None = None, **options):
    if method == "rtn":
        return quantize_rtn(weight, **options)
    return quantize_gptq(weight, layer.hessian, mask=mask, **options)


JOINT = list(
    product(METHODS, ["rtn", "gptq"], [{"sparsity": 0.5}, {"pattern": (2, 4)}], [torch.float32, torch.bfloat16])
)


def joint_id(value) -> str:
    return amount_id(value) if isinstance(value, dict) else str(value).removeprefix("torch.")


@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[5]], ids=layout_id)
@pytest.mark.parametrize(("pruning", "quantizing", "amount", "dtype"), JOINT, ids=joint_id)
def test_prune_then_quantize_keeps_both_constraints(pruning, quantizing, amount, dtype, layout):
    layer = make_layer(2)
    pruned, mask = prune(pruning, layer, layer.weight.to(dtype), **amount)
    weight, grid = vars_of(quantize(quantizing, layer, pruned, mask, bits=4, **layout))
    assert (weight[~mask] == 0).all()
    assert_on_grid(weight, grid)


@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[5]], ids=layout_id)
@pytest.mark.parametrize(("pruning", "quantizing", "amount", "dtype"), JOINT, ids=joint_id)
def test_quantize_then_prune_keeps_both_constraints(pruning, quantizing, amount, dtype, layout):
    layer = make_layer(2)
    weight, grid = vars_of(quantize(quantizing, layer, layer.weight.to(dtype), bits=4, **layout))
    pruned, mask = prune(pruning, layer, weight, grid=grid, **amount)
    assert pruned.dtype == dtype
    assert (pruned[~mask] == 0).all()
    assert_on_grid(pruned, grid)
    if "pattern" in amount:
        assert_pattern(mask, amount["pattern"])
    else:
        assert int((~mask).sum()) == ROWS * COLUMNS // 2


# -------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1001])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_round_trip(bits, count):
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == ((count * bits + 7) // 8,)
    restored = unpack_bits(packed, bits, count)
    assert restored.dtype == torch.uint8
    assert torch.equal(restored, codes)
