"""Polish and refit against slow references, and the inequalities that justify them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_algorithms import ROWS, SEEDS, Layer, make_layer

from pqqp_lightning.algorithms.codebook import levels_of
from pqqp_lightning.algorithms.gptq import quantize_gptq
from pqqp_lightning.algorithms.grid import Grid, fit_codebook, fit_grid, round_to_grid
from pqqp_lightning.algorithms.polish import damped_hessian, dense_inputs_map, objective, polish, refit
from pqqp_lightning.algorithms.sparsegpt import prune_sparsegpt

GRIDS = {
    "symmetric": lambda weight: fit_grid(weight, 4),
    "asymmetric in groups": lambda weight: fit_grid(weight, 3, group_size=64, symmetric=False),
    "one scale": lambda weight: fit_grid(weight, 4, per_tensor=True),
    "NF4": lambda weight: fit_codebook(weight, "nf4", 64),
}


def levels(grid: Grid, row: int, group: int) -> np.ndarray:
    """Every level of scale 1 that an entry may take, float64."""
    if grid.codebook is not None:
        return levels_of(grid.codebook, grid.scale).double().numpy()
    zero = grid.middle if grid.zero is None else float(grid.zero[row, group])
    return np.arange(2**grid.bits) - zero


def slow_polish(layer: Layer, weight: torch.Tensor, grid: Grid, mask: torch.Tensor | None, passes: int) -> np.ndarray:
    """Coordinate descent in float64 that tries every level of every entry; the scales stay."""
    dense = layer.weight.double().numpy()
    hessian = layer.hessian.double().numpy()
    values = weight.double().numpy().copy()
    for _ in range(passes):
        for row in range(values.shape[0]):
            for column in range(values.shape[1]):
                if mask is not None and not mask[row, column]:
                    continue
                group = column // grid.group_size
                scale = float(grid.scale[row if grid.scale.shape[0] > 1 else 0, group])
                error = values[row] - dense[row]
                others = error @ hessian[column] - error[column] * hessian[column, column]
                choices = levels(grid, row, group) * scale
                moved = choices - dense[row, column]
                cost = moved**2 * hessian[column, column] + 2 * moved * others
                values[row, column] = choices[cost.argmin()]
    return values


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("masked", [False, True])
def test_polish_takes_the_best_level_of_every_entry(kind, masked):
    layer = make_layer(rows=6, columns=128)
    mask = torch.rand(6, 128, generator=torch.Generator().manual_seed(1)) > 0.5 if masked else None
    start = layer.weight if mask is None else layer.weight * mask
    grid = GRIDS[kind](start)
    weight = round_to_grid(start, grid)
    polished = polish(weight, layer.weight, layer.hessian, grid, mask, passes=2, scales=False)
    expected = slow_polish(layer, weight, grid, mask, passes=2)
    # ties and float32 may decide a few entries otherwise, which then lead others along
    assert (np.abs(polished.weight.numpy() - expected) < 1e-6).mean() > 0.98
    assert polished.after == pytest.approx(objective(torch.tensor(expected), layer.weight, layer.hessian), rel=2e-3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_polish_never_raises_the_objective_and_keeps_mask_and_grid(seed, kind, masked, dtype):
    layer = make_layer(seed, dead=(3, 7))
    hessian = damped_hessian(layer.hessian, 0.01)
    mask = torch.rand(ROWS, 256, generator=torch.Generator().manual_seed(seed)) > 0.5 if masked else None
    start = layer.weight.to(dtype) if mask is None else (layer.weight * mask).to(dtype)
    grid = GRIDS[kind](start.float())
    weight = round_to_grid(start, grid)
    polished = polish(weight, layer.weight, hessian, grid, mask)
    assert polished.grid is not None
    assert polished.before == pytest.approx(objective(weight, layer.weight, hessian))
    assert polished.after == pytest.approx(objective(polished.weight, layer.weight, hessian))
    assert polished.after < 0.9 * polished.before
    assert polished.weight.dtype == dtype
    assert torch.equal(round_to_grid(polished.weight, polished.grid), polished.weight)
    assert (polished.grid.bits, polished.grid.group_size) == (grid.bits, grid.group_size)
    assert polished.grid.scale.dtype == grid.scale.dtype
    if mask is not None:
        assert not polished.weight[~mask].any()


def test_scales_lower_the_objective_further():
    layer = make_layer()
    hessian = damped_hessian(layer.hessian, 0.01)
    grid = fit_grid(layer.weight, 3)
    weight = round_to_grid(layer.weight, grid)
    fixed = polish(weight, layer.weight, hessian, grid, scales=False)
    moved = polish(weight, layer.weight, hessian, grid, scales=True)
    assert moved.after < fixed.after
    assert not torch.equal(moved.grid.scale, grid.scale)
    assert torch.equal(fixed.grid.scale, grid.scale)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_polish_improves_on_both_orders_of_sparsegpt_and_gptq(sparsity):
    layer = make_layer()
    hessian = damped_hessian(layer.hessian, 0.01)
    pruned = prune_sparsegpt(layer.weight, layer.hessian, sparsity=sparsity)
    prune_first = quantize_gptq(pruned.weight, layer.hessian, bits=4, mask=pruned.mask)
    quantized = quantize_gptq(layer.weight, layer.hessian, bits=4)
    quantize_first = prune_sparsegpt(quantized.weight, layer.hessian, sparsity=sparsity, grid=quantized.grid)
    for weight, grid, mask in (
        (prune_first.weight, prune_first.grid, pruned.mask),
        (quantize_first.weight, quantized.grid, quantize_first.mask),
    ):
        polished = polish(weight, layer.weight, hessian, grid, mask)
        assert polished.after < 0.95 * objective(weight, layer.weight, hessian)


def test_a_grid_with_a_scale_of_zero_stays_finite():
    layer = make_layer(rows=4, columns=64)
    weight = layer.weight.clone()
    weight[2] = 0
    grid = fit_codebook(weight, "nf4", 64)
    assert float(grid.scale[2, 0]) == 0
    polished = polish(round_to_grid(weight, grid), layer.weight, layer.hessian, grid)
    assert bool(polished.weight.isfinite().all())
    assert not polished.weight[2].any()


def test_the_target_of_other_inputs_is_the_least_squares_solution():
    layer = make_layer(rows=6, columns=32, dead=(5,))
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(3))
    x[:, 5] = 0
    y = x + 0.3 * torch.randn(200, 32, generator=torch.Generator().manual_seed(4)) * (x != 0)
    hessian = x.T @ x
    damped = damped_hessian(hessian, 0.01)
    weight = layer.weight[:, :32]
    found = weight @ dense_inputs_map(hessian, damped, x.T @ y).T
    # damping is as many more rows, on which the weights shall stay as they are
    extra = np.diag(np.sqrt((damped - hessian).diagonal().double().numpy()))
    rows = np.concatenate([x.double().numpy(), extra])
    outputs = np.concatenate([y.double().numpy(), extra]) @ weight.double().numpy().T
    expected = np.linalg.lstsq(rows, outputs, rcond=None)[0].T
    assert found.numpy() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    unchanged = weight @ dense_inputs_map(hessian, damped, hessian).T
    assert torch.allclose(unchanged, weight, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_refit_solves_the_kept_entries(seed):
    layer = make_layer(seed, rows=8)
    hessian = damped_hessian(layer.hessian, 0.01)
    pruned = prune_sparsegpt(layer.weight, layer.hessian, sparsity=0.5)
    refitted = refit(pruned.weight, layer.weight, hessian, pruned.mask, iterations=200)
    for row in range(8):
        kept = pruned.mask[row].numpy()
        h = hessian.double().numpy()
        exact = np.linalg.solve(h[np.ix_(kept, kept)], (layer.weight[row].double().numpy() @ h)[kept])
        assert refitted.weight[row].numpy()[kept] == pytest.approx(exact, rel=1e-3, abs=1e-5)
    assert not refitted.weight[~pruned.mask].any()


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_refit_is_below_sparsegpt_on_its_own_mask(pattern):
    layer = make_layer()
    hessian = damped_hessian(layer.hessian, 0.01)
    amount = {"pattern": pattern} if pattern else {"sparsity": 0.6}
    pruned = prune_sparsegpt(layer.weight, layer.hessian, **amount)
    refitted = refit(pruned.weight, layer.weight, hessian, pruned.mask)
    assert refitted.after < objective(pruned.weight, layer.weight, hessian)
    assert refitted.after == pytest.approx(objective(refitted.weight, layer.weight, hessian))
