"""What ``LayerwiseStage`` does for a method that writes one function."""

import pytest
import torch
from torch import nn

from pqqp_lightning.algorithms.rtn import quantize_rtn
from pqqp_lightning.algorithms.selection import keep_highest
from pqqp_lightning.calibration.walk import Walk
from pqqp_lightning.callbacks import RTN, Wanda
from pqqp_lightning.network.constraints import broken_constraints, collect_constraints
from pqqp_lightning.network.layers import input_rows, weight_matrix
from pqqp_lightning.stages import Compressed, Context, LayerwiseStage, SquaredNorm


class PruneAndRound(LayerwiseStage):
    """A joint method: half of each row goes, the rest is rounded."""

    source = "a test"
    promises = ("mask", "grid")
    statistic = SquaredNorm

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []

    def compress_layer(self, inputs):
        self.seen.append(inputs)
        mask = keep_highest(inputs.weight.abs() * inputs.statistic.sqrt(), sparsity=0.5, mask=inputs.mask)
        quantized = quantize_rtn(inputs.weight.masked_fill(~mask, 0.0), bits=4)
        return Compressed(quantized.weight, mask=mask, grid=quantized.grid)


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4, 4))
    return model, torch.randn(6, 8, 4, 4)


def compress(stage, model, images):
    walk = lambda blocks: Walk(model, blocks, [images], images[:1], model, progress=False)  # noqa: E731
    stage.compress(model, Context(walk, progress=False))


def test_a_grouped_convolution_comes_group_by_group_and_is_put_together():
    model, images = make()
    before, rows = weight_matrix(model[0]), input_rows(model[0], images)
    stage = PruneAndRound()
    compress(stage, model, images)
    assert [inputs.name for inputs in stage.seen] == ["0"] * 4 + ["3"]
    for group in range(4):
        inputs = stage.seen[group]
        assert torch.equal(inputs.weight, before.chunk(4)[group])
        torch.testing.assert_close(inputs.statistic, rows[group].square().sum(0))
    promised = collect_constraints(model)
    assert set(promised) == {"0", "3"}
    assert all(c.mask_bits is not None and c.grid is not None for c in promised.values())
    assert not broken_constraints(model, promised)
    assert promised["0"].kept() == before.numel() // 2


@pytest.mark.parametrize("earlier", [Wanda(0.25), RTN(8)])
def test_earlier_masks_and_grids_come_with_their_groups(earlier):
    model, images = make()
    compress(earlier, model, images)
    before = collect_constraints(model)["0"]
    stage = PruneAndRound()
    compress(stage, model, images)
    for group, inputs in enumerate(stage.seen[:4]):
        if before.grid is None:
            assert torch.equal(inputs.mask, before.mask().chunk(4)[group])
        else:
            assert torch.equal(inputs.grid.scale, before.grid.chunk(4)[group].scale)
