"""Layers that share a Hessian are swept together, and each gets what it gets alone."""

from __future__ import annotations

import pytest
import torch
from tiny import make_data, make_model, trainer

from pqqp_lightning.algorithms import gptq, sparsegpt
from pqqp_lightning.algorithms.gptq import quantize_gptq, quantize_gptq_together
from pqqp_lightning.algorithms.grid import fit_grid, round_to_grid
from pqqp_lightning.algorithms.hessian import invert_upper
from pqqp_lightning.algorithms.sparsegpt import prune_sparsegpt, prune_sparsegpt_together
from pqqp_lightning.callbacks import GPTQ, SparseGPT
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.layers import named_layers
from pqqp_lightning.stages import layerwise

ROWS = (24, 8, 16)
COLUMNS = 64


def matrices():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator)
    inputs = torch.randn(256, COLUMNS, generator=generator) @ mixing  # correlated
    inputs[:, 5] = 0  # a dead input
    return [torch.randn(rows, COLUMNS, generator=generator) for rows in ROWS], inputs.T @ inputs


def masks(weights):
    """One matrix is dense, the others lost a fifth."""
    generator = torch.Generator().manual_seed(1)
    return [None, *(torch.rand(w.shape, generator=generator) > 0.2 for w in weights[1:])]


def nearly_equal(one, other):
    """Equal up to the order of summation, which may move single entries to the next level or over the threshold."""
    assert ((one - other).abs() < 1e-3 * other.abs().max()).float().mean() > 0.995


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": 4, "clip": True},
        {"bits": 3, "group_size": 16, "symmetric": False, "clip": True},
        {"bits": 4, "per_tensor": True},
        {"bits": 4, "group_size": 16, "activation_order": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_gptq_gives_each_matrix_what_it_gets_alone(options, masked):
    weights, hessian = matrices()
    weights[2] = weights[2] * 1e-5  # its scales need float32; those of the others stay float16
    own_masks = masks(weights) if masked else [None] * 3
    together = quantize_gptq_together(weights, hessian, own_masks, **options)
    for weight, mask, joint in zip(weights, own_masks, together, strict=True):
        alone = quantize_gptq(weight, hessian, mask=mask, **options)
        nearly_equal(joint.weight, alone.weight)
        assert joint.grid.is_like(alone.grid)
        assert joint.grid.scale.dtype is alone.grid.scale.dtype
        assert torch.equal(round_to_grid(joint.weight, joint.grid), joint.weight)
        assert mask is None or not joint.weight[~mask].any()


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": (2, 4)}], ids=str)
@pytest.mark.parametrize("kept", [False, True], ids=["dense", "after a mask and a grid"])
def test_sparsegpt_gives_each_matrix_what_it_gets_alone(options, kept):
    weights, hessian = matrices()
    own_masks, grids = [None] * 3, [None] * 3
    if kept:
        own_masks, grids = masks(weights), [fit_grid(weight, 8, group_size=16) for weight in weights]
    together = prune_sparsegpt_together(weights, hessian, own_masks, grids, **options)
    for weight, mask, grid, joint in zip(weights, own_masks, grids, together, strict=True):
        alone = prune_sparsegpt(weight, hessian, mask=mask, grid=grid, **options)
        nearly_equal(joint.weight, alone.weight)
        assert (joint.mask != alone.mask).float().mean() < 0.005
        assert int(joint.mask.sum()) == int(alone.mask.sum())
        assert not joint.weight[~joint.mask].any()
        assert mask is None or not (joint.mask & ~mask).any()
        assert grid is None or torch.equal(round_to_grid(joint.weight, grid), joint.weight)


@pytest.fixture
def sweeps(monkeypatch):
    """The rows of each sweep."""
    rows = []
    for module in (gptq, sparsegpt):
        original = module.sweep_columns

        def counted(weight, *args, original=original, **options):
            rows.append(len(weight))
            return original(weight, *args, **options)

        monkeypatch.setattr(module, "sweep_columns", counted)
    return rows


def compressed(folder, *stages, kind="llama"):
    module = make_model(kind)
    folder.mkdir(exist_ok=True)
    trainer(folder / "run", *stages).fit(module, datamodule=make_data(kind, folder))
    return {name: layer for name, layer in named_layers(module.model) if "layers" in name}


SWEEPS_OF_A_BLOCK = [32 + 16 + 16, 32, 64 + 64, 32]  # q, k and v; o; gate and up; down


@pytest.mark.parametrize("stage", [lambda: SparseGPT(0.5), lambda: GPTQ(4, group_size=8)], ids=["prune", "quantize"])
def test_a_block_is_swept_in_four(tmp_path, sweeps, monkeypatch, stage):
    together = compressed(tmp_path / "a", stage())
    assert sweeps == 2 * SWEEPS_OF_A_BLOCK
    sweeps.clear()
    monkeypatch.setattr(layerwise, "LARGEST_BATCH", 64)  # as for layers with many weights
    monkeypatch.setattr(layerwise, "LARGEST_GPU_BATCH", 64)
    alone = compressed(tmp_path / "b", stage())
    assert sweeps == 2 * [32, 16, 16, 32, 64, 64, 32]
    for name, layer in together.items():
        nearly_equal(layer.weight, alone[name].weight)


def test_layers_with_other_options_are_swept_apart(tmp_path, sweeps):
    layers = compressed(tmp_path, GPTQ({"*v_proj": 8, "*": 4}))
    assert sweeps == 2 * [32 + 16, 16, 32, 64 + 64, 32]
    for name, layer in layers.items():
        assert constraints_of(layer).grid.bits == (8 if name.endswith("v_proj") else 4)


class Named(SparseGPT):
    """A method of somebody's own, which changes what happens to one layer."""

    seen: tuple = ()

    def compress_layer(self, inputs):
        self.seen = (*self.seen, inputs.name)
        return super().compress_layer(inputs)


def test_a_method_that_redefines_one_layer_gets_each(tmp_path):
    stage = Named(0.5)
    layers = compressed(tmp_path, stage)
    assert len(stage.seen) == len(layers) == 14


@pytest.mark.parametrize("size", [1, 100, 301])
def test_a_triangular_matrix_is_inverted_by_halves(size):
    generator = torch.Generator().manual_seed(0)
    upper = torch.randn(size, size, generator=generator).triu() / size + torch.eye(size)
    inverse = invert_upper(upper)
    assert torch.equal(inverse, inverse.triu())
    torch.testing.assert_close(inverse, torch.linalg.inv(upper.double()).float(), rtol=1e-5, atol=1e-6)
