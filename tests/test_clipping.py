"""The clipping search of uniform grids against a slow loop, and the inequality that justifies it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_grid_codebook import fit, make_hessian, make_mask, make_weight

from pqqp_lightning.algorithms import gptq
from pqqp_lightning.algorithms import grid as grids
from pqqp_lightning.algorithms.gptq import quantize_gptq
from pqqp_lightning.algorithms.grid import fit_grid, round_to_grid
from pqqp_lightning.algorithms.rtn import quantize_rtn
from pqqp_lightning.callbacks import GPTQ, RTN
from pqqp_lightning.network.constraints import broken_constraints, collect_constraints

UNITS = [{"per_tensor": True}, {}, {"group_size": 32}]


def power_error(weight, rounded):
    return (rounded.double() - weight.double()).abs().pow(2.4)


def slow_clip(unit, bits, symmetric, half):
    """(scale, zero) of one group: tries every range, and rounds and sums one number at a time."""
    lowest, highest, levels = min(unit.min(), 0), max(unit.max(), 0), 2**bits - 1
    best = None
    for factor in (1.0, *grids.CLIP_FACTORS):
        low, high = np.float32(lowest) * np.float32(factor), np.float32(highest) * np.float32(factor)
        span = 2 * max(high, -low) if symmetric else high - low
        scale = np.float32(span) / np.float32(levels) if span > 0 else np.float32(1)
        scale = float(np.float16(scale) if half else scale)
        zero = 2 ** (bits - 1) if symmetric else min(max(np.rint(-low / np.float32(scale)), 0), levels)
        total = 0.0
        for value in unit:
            code = min(max(np.rint(value / scale) + zero, 0), levels)
            total += abs(scale * (code - zero) - value) ** 2.4
        if best is None or total < best[0] * (1 - 1e-6):
            best = total, scale, zero
    return best


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("unit", UNITS, ids=["tensor", "channel", "group"])
def test_clipping_matches_a_slow_loop(unit, bits, symmetric):
    weight = make_weight(4, 64)
    grid = fit_grid(weight, bits, symmetric=symmetric, clip=True, **unit)
    matrix, size = weight.numpy().astype(np.float64), unit.get("group_size", 64)
    blocks = [matrix.reshape(-1)] if "per_tensor" in unit else matrix.reshape(-1, size)
    errors = power_error(weight, round_to_grid(weight, grid)).numpy().reshape(len(blocks), -1).sum(1)
    for i, block in enumerate(blocks):
        total, scale, zero = slow_clip(block, bits, symmetric, grid.scale.dtype == torch.float16)
        assert errors[i] == pytest.approx(total, rel=1e-5)
        assert float(grid.scale.flatten()[i]) == pytest.approx(scale, rel=1e-6)
        assert grid.zero is None or int(grid.zero.flatten()[i]) == zero


@pytest.mark.parametrize("magnitude", [1, 1e-3, 1e-6])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("unit", UNITS, ids=["tensor", "channel", "group"])
def test_clipping_never_enlarges_the_error(unit, bits, symmetric, magnitude):
    weight = magnitude * make_weight()
    weight[3] = 0
    options = {"bits": bits, "symmetric": symmetric, **unit}
    plain, clipped = (quantize_rtn(weight, clip=clip, **options) for clip in (False, True))
    assert clipped.grid.scale.dtype == plain.grid.scale.dtype
    before, after = (power_error(weight, q.weight) for q in (plain, clipped))
    rows = 1 if "per_tensor" in unit else 24
    before, after = (e.reshape(rows, plain.grid.scale.shape[1], -1).sum(-1) for e in (before, after))
    assert (after <= before * (1 + 1e-5)).all()
    assert bits == 8 or after.sum() < before.sum()
    assert (clipped.weight[3] == 0).all()
    assert torch.equal(round_to_grid(clipped.weight, clipped.grid), clipped.weight)


@pytest.mark.parametrize("unit", UNITS, ids=["tensor", "channel", "group"])
def test_clipping_looks_at_pieces_of_bounded_size(unit, monkeypatch):
    weight = make_weight(30, 128)
    whole = fit_grid(weight, 3, clip=True, **unit)
    monkeypatch.setattr(grids, "PIECE", 1000)
    assert torch.equal(fit_grid(weight, 3, clip=True, **unit).scale, whole.scale)


@pytest.mark.parametrize("piece", [1000, 2**20])
@pytest.mark.parametrize("unit", UNITS, ids=["tensor", "channel", "group"])
def test_clipping_by_importance_finds_the_least_of_all_candidates(unit, piece, monkeypatch):
    """Among all ranges of the list, group by group, with the importance of each column counted."""
    monkeypatch.setattr(grids, "PIECE", piece)
    weight, importance = make_weight(), torch.rand(128, generator=torch.Generator().manual_seed(7)).pow(4)
    grid = fit_grid(weight, 3, clip=True, importance=importance, **unit)
    shape = (1, 1, -1) if "per_tensor" in unit else (24, -1, unit.get("group_size", 128))

    def error(scale):
        q = round_to_grid(weight, grids.Grid(3, scale, None, 128)).double()
        return ((q - weight) ** 2 * importance).reshape(shape).sum(-1)

    plain = fit_grid(weight, 3, **unit)
    found, least = error(grid.scale), error(plain.scale)
    assert (found <= least * (1 + 1e-5)).all()
    for factor in grids.CLIP_FACTORS:
        least = torch.minimum(least, error((plain.scale.float() * factor).half()))
    assert (found <= least * 1.01).all()  # a candidate's float16 scale comes from its range, not from a rounded scale


def loss(weight, hessian, changed):
    """tr((W - W') H (W - W')^T), which GPTQ minimizes."""
    return float(((changed - weight) @ hessian).mul(changed - weight).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("order", [False, True], ids=["plain", "activation_order"])
@pytest.mark.parametrize("unit", UNITS, ids=["tensor", "channel", "group"])
def test_gptq_with_clipping_is_on_its_grid_and_its_loss_is_smaller(unit, order, bits, seed):
    weight, hessian = make_weight(48, seed=seed), make_hessian(seed=seed + 10)
    options = {"bits": bits, "activation_order": order, **unit}
    plain, clipped = (quantize_gptq(weight, hessian, clip=clip, **options) for clip in (False, True))
    assert torch.equal(round_to_grid(clipped.weight, clipped.grid), clipped.weight)
    assert loss(weight, hessian, clipped.weight) < loss(weight, hessian, plain.weight)


def test_gptq_counts_a_columns_error_as_its_objective_does(monkeypatch):
    """Not by the weights alone, as in the published code: with inputs of unequal size, that is far from as good."""
    size = torch.exp(torch.randn(128, generator=torch.Generator().manual_seed(5)))
    totals = dict.fromkeys(("plain", "weights", "objective"), 0.0)
    for seed in range(4):
        weight, hessian = make_weight(48, seed=seed), make_hessian(seed=seed + 10) * size * size[:, None]
        for kind in totals:
            with monkeypatch.context() as patch:
                if kind == "weights":
                    patch.setattr(gptq, "fit_grid", lambda *args, importance, **options: fit_grid(*args, **options))
                quantized = quantize_gptq(weight, hessian, bits=3, clip=kind != "plain")
            totals[kind] += loss(weight, hessian, quantized.weight)
    assert totals["objective"] < 0.9 * totals["weights"]
    assert totals["objective"] < 0.9 * totals["plain"]


def test_gptq_with_clipping_holds_a_mask():
    weight, mask = make_weight(), make_mask()
    quantized = quantize_gptq(weight * mask, make_hessian(), bits=3, group_size=32, clip=True, mask=mask)
    assert (quantized.weight[~mask] == 0).all()
    assert torch.equal(round_to_grid(quantized.weight, quantized.grid), quantized.weight)


@pytest.mark.parametrize("cls", [RTN, GPTQ])
def test_the_stages_take_the_argument(tmp_path, cls):
    plain = fit(tmp_path / "plain", cls(3, clip=False))
    clipped = fit(tmp_path / "clipped", cls(3, clip=True))
    scales = [torch.cat([c.grid.scale for c in collect_constraints(m).values()][::2]) for m in (plain, clipped)]
    assert not torch.equal(*scales)
    assert not broken_constraints(clipped, collect_constraints(clipped))
