"""ALPS against a slow reference, within earlier constraints, and below SparseGPT."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import tiny
import torch
from test_algorithms import (
    SEEDS,
    assert_mostly_equal,
    assert_on_grid,
    assert_pattern,
    earlier_mask,
    make_layer,
)

from pqqp_lightning.algorithms.alps import Spectrum, damp, prune_alps
from pqqp_lightning.algorithms.gptq import quantize_gptq
from pqqp_lightning.algorithms.grid import fit_codebook, fit_grid, round_to_grid
from pqqp_lightning.algorithms.polish import damped_hessian, objective, refit
from pqqp_lightning.algorithms.sparsegpt import prune_sparsegpt
from pqqp_lightning.callbacks import ALPS, GPTQ, Magnitude
from pqqp_lightning.network.constraints import broken_constraints, collect_constraints, constraints_of
from pqqp_lightning.network.layers import named_layers

AMOUNTS = [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": (2, 4)}]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
def test_alps_matches_the_reference(amount, masked):
    layer = make_layer(dead=(3, 70))
    mask = earlier_mask(0.2) if masked else None
    weight = layer.weight if mask is None else layer.weight * mask
    actual = prune_alps(weight, damp(layer.hessian, 0.01), mask=mask, **amount)
    earlier = None if mask is None else mask.numpy()
    expected, expected_mask = reference.alps(weight, layer.hessian, mask=earlier, **amount)
    # an entry at the threshold may go either way in float32, and takes others along
    assert_mostly_equal(actual.mask, expected_mask, 0.99)
    assert int(actual.mask.sum()) == int(expected_mask.sum())
    assert not actual.weight[~actual.mask].any()
    loss = reference.objective(weight, actual.weight, layer.hessian)
    assert loss == pytest.approx(reference.objective(weight, expected, layer.hessian), rel=0.01)
    assert np.isclose(actual.weight, expected, atol=2e-3).mean() > 0.98


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
def test_alps_is_below_sparsegpt_and_its_mask_below_sparsegpts(amount, seed):
    layer = make_layer(seed)
    hessian = damped_hessian(layer.hessian, 0.01)
    alps = prune_alps(layer.weight, damp(layer.hessian, 0.01), **amount)
    sparsegpt = prune_sparsegpt(layer.weight, layer.hessian, **amount)
    assert int(alps.mask.sum()) == int(sparsegpt.mask.sum())
    refitted = refit(sparsegpt.weight, layer.weight, hessian, sparsegpt.mask)
    loss = objective(alps.weight, layer.weight, hessian)
    assert loss < 0.9 * refitted.after
    assert loss < 0.7 * objective(sparsegpt.weight, layer.weight, hessian)


@pytest.mark.parametrize("kind", ["symmetric", "groups", "NF4"])
@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
def test_alps_keeps_an_earlier_grid_and_mask_and_is_below_sparsegpt_there(amount, kind):
    layer = make_layer()
    mask = earlier_mask(0.2)
    weight = layer.weight * mask
    if kind == "NF4":
        grid = fit_codebook(weight, "nf4", 64)
    else:
        grid = fit_grid(weight, 4, **({"group_size": 64, "symmetric": False} if kind == "groups" else {}))
    weight = round_to_grid(weight, grid)
    alps = prune_alps(weight, damp(layer.hessian, 0.01), mask=mask, grid=grid, **amount)
    sparsegpt = prune_sparsegpt(weight, layer.hessian, mask=mask, grid=grid, **amount)
    assert not (alps.mask & ~mask).any()
    assert not alps.weight[~alps.mask].any()
    if kind != "NF4":
        assert_on_grid(alps.weight, grid)
    assert torch.equal(round_to_grid(alps.weight, grid), alps.weight)
    hessian = damped_hessian(layer.hessian, 0.01)
    assert objective(alps.weight, weight, hessian) < 0.8 * objective(sparsegpt.weight, weight, hessian)


def test_a_pattern_is_exact_and_dead_columns_go_first():
    layer = make_layer(dead=(3, 70))
    free = prune_alps(layer.weight, damp(layer.hessian, 0.01), sparsity=0.5)
    assert not free.mask[:, [3, 70]].any()
    assert_pattern(prune_alps(layer.weight, damp(layer.hessian, 0.01), pattern=(2, 4)).mask, (2, 4))


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_singular_hessian_stays_finite(damping):
    layer = make_layer()
    inputs = torch.randn(20, 256, generator=torch.Generator().manual_seed(0))
    spectrum = damp(inputs.T @ inputs, damping)
    pruned = prune_alps(layer.weight.bfloat16(), spectrum, sparsity=0.5)
    assert pruned.weight.dtype == torch.bfloat16
    assert bool(pruned.weight.isfinite().all())
    masked = layer.weight * pruned.mask
    assert objective(pruned.weight, layer.weight, spectrum.hessian) <= 1.001 * objective(
        masked, layer.weight, spectrum.hessian
    )


def test_nan_inputs_are_named():
    hessian = torch.eye(8)
    hessian[2, 3] = torch.nan
    with pytest.raises(ArithmeticError, match="NaN"):
        damp(hessian, 0.01)


def test_layers_that_share_inputs_share_one_decomposition(monkeypatch, tmp_path):
    count = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: count.append(matrix.shape) or eigh(matrix))
    tiny.trainer(tmp_path / "run", ALPS(0.5)).fit(
        tiny.make_model("llama"), datamodule=tiny.make_data("llama", tmp_path)
    )
    assert len(count) == 2 * 4  # two blocks: q, k and v; o; gate and up; down


def test_scores_need_no_decomposition():
    layer = make_layer()
    spectrum = damp(layer.hessian, 0.01)
    ALPS(0.5).scores(layer.weight, spectrum)
    assert "eigen" not in vars(spectrum)
    assert isinstance(spectrum, Spectrum)


@pytest.mark.parametrize("kind", ["llama", "resnet"])
def test_alps_runs_in_both_orders_with_gptq(kind, tmp_path):
    for number, stages in enumerate(([ALPS(0.5), GPTQ(4)], [GPTQ(4), ALPS(0.5)], [Magnitude(0.3), ALPS(0.6)])):
        module = tiny.make_model(kind)
        tiny.trainer(tmp_path / str(number), *stages).fit(module, datamodule=tiny.make_data(kind, tmp_path))
        assert not broken_constraints(module, collect_constraints(module))
        masks = [constraints_of(layer).mask(layer.weight.device) for _, layer in named_layers(module)]
        kept = torch.cat([mask.flatten() for mask in masks if mask is not None]).float().mean()
        assert kept == pytest.approx(0.4 if number == 2 else 0.5, abs=0.01)


def test_a_grid_of_gptq_is_kept_bit_for_bit():
    layer = make_layer()
    quantized = quantize_gptq(layer.weight, layer.hessian, bits=4)
    pruned = prune_alps(quantized.weight, damp(layer.hessian, 0.01), sparsity=0.5, grid=quantized.grid)
    assert_on_grid(pruned.weight, quantized.grid)
