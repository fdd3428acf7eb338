"""Training of one block's weights on their masks and grids: where they start, and how far a step goes.

The weights are trained unrounded and rounded in every forward pass (straight-through, ``lsq.py``), as in the block-wise
training of EfficientQAT (Chen et al., arXiv 2407.11062, section 3.2), here also within a mask (as the transformer
matching of 3BASiL, arXiv 2603.01376, does for weights without a grid).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pqqp_lightning.algorithms.grid import Grid, encode

FROM_EDGE = 0.1
"""Least distance at which weights start from the edge to the next level, in steps of the grid.

Training starts with Adam's longest steps. Nearer to the edge, the first of them would move all weights at once whose
dense ones lie beyond it, and so undo what GPTQ did to make up for other weights' rounding: on DeiT blocks that GPTQ had
fitted closely, this raised the error 25 times, and 8 passes did not lower it again. At the levels themselves (0.5), too
few weights would move at all.
"""
FROM_END = 0.01
"""Least distance to the ends of the grid, in steps, at which weights start: the gradient at an end would be zero."""


def start_in_cells(weight: Tensor, dense: Tensor, grid: Grid) -> Tensor:
    """Return unrounded weights, float32 [O, I], that round to ``weight`` and lie as near to ``dense`` as they can.

    A weight of which the dense one says that it is nearly at the next level needs few steps to get there.

    Args:
        weight: [O, I], on the grid.
        dense: [O, I].
        grid: of ``weight``. With a codebook, a weight starts at the dense one if that has the same code, else at its
            level.
    """
    w = weight.float()
    d = dense.float()
    if grid.codebook is not None:
        return torch.where(encode(d, grid) == encode(w, grid), d, w)
    scale = grid.expanded_scale()
    zero = grid.expanded_zero()
    codes = encode(w, grid).float()
    near = torch.clamp(d / scale + zero, codes - 0.5 + FROM_EDGE, codes + 0.5 - FROM_EDGE)
    return (near.clamp(FROM_END, grid.levels - FROM_END) - zero) * scale


def root_mean_square(weight: Tensor) -> float:
    """Return the root of the mean square of the entries that are not zero; 1 if all are."""
    nonzero = weight.detach().float()[weight != 0]
    return float(nonzero.square().mean().sqrt()) if nonzero.numel() else 1.0


def cosine_decay(step: int, steps: int) -> float:
    """Return (1 + cos(pi * step / steps)) / 2: 1 at the first step, 0 after the last."""
    return (1 + math.cos(math.pi * step / steps)) / 2
