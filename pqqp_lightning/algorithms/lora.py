"""Merging low-rank adapters: W' = W + s B A (Hu et al., LoRA, arXiv 2106.09685, section 4.1), within a mask and a grid.

The paper merges into an unconstrained weight. Here a weight keeps its mask and grid: W' is masked first, then rounded
to the stored grid. :class:`Merged` measures how much of the adapter this loses. Training through the merge
(:func:`change_through_merge`) avoids the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pqqp_lightning.algorithms.grid import Grid, round_to_grid


@dataclass(frozen=True)
class Merged:
    """A weight with its adapter merged; norms are Frobenius norms.

    Attributes:
        weight: W' [O, I], in the dtype of W.
        norm: ||W + s B A||, of the weight that the adapted layer computed with.
        update: ||s B A||, of what the adapter learned.
        moved: ||W' - W||.
        lost: ||W' - (W + s B A)||, of what the mask, the grid and the dtype removed.
    """

    weight: Tensor
    norm: float
    update: float
    moved: float
    lost: float


def low_rank_update(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Compute s B A in float32, [O, I], from A [r, I] and B [O, r]."""
    return scaling * (b.float() @ a.float())


def constrain(free: Tensor, mask: Tensor | None, grid: Grid | None) -> Tensor:
    """Mask ``free`` [O, I], then round it to its grid."""
    masked = free if mask is None else free.masked_fill(~mask, 0.0)
    return masked if grid is None else round_to_grid(masked, grid)


def merge_low_rank(weight: Tensor, update: Tensor, *, mask: Tensor | None = None, grid: Grid | None = None) -> Merged:
    """Merge an update into a weight within its mask and grid.

    Args:
        weight: [O, I].
        update: [O, I], from :func:`low_rank_update`.
        mask: bool [O, I], True where kept; the other entries are exactly 0.
        grid: the grid that every entry lies on.
    """

    def norm(x: Tensor) -> float:
        return float(torch.linalg.vector_norm(x))

    free = weight.float() + update
    merged = constrain(free, mask, grid).to(weight.dtype)
    return Merged(merged, norm(free), norm(update), moved=norm(merged - weight), lost=norm(merged.float() - free))


def change_through_merge(weight: Tensor, update: Tensor, mask: Tensor | None, grid: Grid | None) -> Tensor:
    """Compute by how much merging would change ``weight``, differentiably in ``update``.

    The mask is that of MaskLoRA (Zimmer et al., arXiv 2312.15230, section 3). Rounding passes the gradient straight
    through, as in LR-QAT (Bondarenko et al., arXiv 2406.06385, section 3), but the grid is fixed here.

    Returns:
        The change, float32 [O, I]; its gradient reaches the kept entries of ``update``.
    """
    passed = update if mask is None else update.masked_fill(~mask, 0.0)
    with torch.no_grad():
        before = weight.float()
        rounding = constrain(before + passed, mask, grid) - before - passed
    return passed + rounding  # the rounding is a constant for autograd: a straight-through estimator
