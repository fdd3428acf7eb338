"""Merging low-rank adapters: W' = W + s B A (Hu et al., LoRA, arXiv 2106.09685, section 4.1), within a mask and a grid.

The paper merges into a free weight. A weight that promised a mask or a grid keeps it here: W' is masked first, then
rounded to the stored grid, and what of the adapters that took away is measured. Training can go through the merge, so
that there is nothing left to take away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pqqp_lightning.algorithms.grid import Grid, round_to_grid


@dataclass(frozen=True)
class Merged:
    """A weight that took up its adapter.

    Attributes:
        weight: [O, I], in the dtype of the weight before.
        norm: ||W + s B A||, the Frobenius norm of what the adapted layer computed with.
        update: ||s B A||, what the adapter had learnt.
        moved: ||W' - W||.
        lost: ||W' - (W + s B A)||, what the mask, the grid and the dtype took away.
    """

    weight: Tensor
    norm: float
    update: float
    moved: float
    lost: float


def low_rank_update(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """s B A in float32, [O, I], from A [r, I] and B [O, r]."""
    return scaling * (b.float() @ a.float())


def constrain(free: Tensor, mask: Tensor | None, grid: Grid | None) -> Tensor:
    """``free`` [O, I], masked first, then rounded to its grid."""
    masked = free if mask is None else free.masked_fill(~mask, 0.0)
    return masked if grid is None else round_to_grid(masked, grid)


def merge_low_rank(weight: Tensor, update: Tensor, *, mask: Tensor | None = None, grid: Grid | None = None) -> Merged:
    """The weight with its update, masked and on its grid.

    Args:
        weight: [O, I].
        update: [O, I], from :func:`low_rank_update`.
        mask: bool [O, I], True where kept; the rest is exactly 0.
        grid: on which every entry lies.
    """
    free = weight.float() + update
    merged = constrain(free, mask, grid).to(weight.dtype)
    norms = (float(torch.linalg.vector_norm(x)) for x in (free, update, merged - weight, merged.float() - free))
    return Merged(merged, *norms)


def change_through_merge(weight: Tensor, update: Tensor, mask: Tensor | None, grid: Grid | None) -> Tensor:
    """By how much merging would change ``weight``, float32 [O, I]; its gradient reaches the kept entries of ``update``.

    The mask is that of MaskLoRA (Zimmer et al., arXiv 2312.15230, section 3); rounding passes the gradient straight
    through, as in LR-QAT (Bondarenko et al., arXiv 2406.06385, section 3), here with a grid that stays as it is.
    """
    passed = update if mask is None else update.masked_fill(~mask, 0.0)
    with torch.no_grad():
        before = weight.float()
        rest = constrain(before + passed, mask, grid) - before - passed
    return passed + rest
