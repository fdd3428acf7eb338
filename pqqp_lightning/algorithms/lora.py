"""Merging low-rank adapters: W' = W + s B A (Hu et al., LoRA, arXiv 2106.09685, section 4.1), within a mask and a grid.

The paper merges into a free weight. A weight that promised a mask or a grid keeps it here: W' is masked first, then
rounded to the stored grid, and what of the adapters that took away is measured.
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
        lost: ||W' - (W + s B A)||, what the mask, the grid and the dtype took away.
    """

    weight: Tensor
    norm: float
    update: float
    lost: float


def low_rank_update(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """s B A in float32, [O, I], from A [r, I] and B [O, r]."""
    return scaling * (b.float() @ a.float())


def merge_low_rank(weight: Tensor, update: Tensor, *, mask: Tensor | None = None, grid: Grid | None = None) -> Merged:
    """The weight with its update, masked and on its grid.

    Args:
        weight: [O, I].
        update: [O, I], from :func:`low_rank_update`.
        mask: bool [O, I], True where kept; the rest is exactly 0.
        grid: on which every entry lies.
    """
    free = weight.float() + update
    merged = free if mask is None else free.masked_fill(~mask, 0.0)
    merged = (merged if grid is None else round_to_grid(merged, grid)).to(weight.dtype)
    norm, learnt, lost = (float(torch.linalg.vector_norm(x)) for x in (free, update, merged.float() - free))
    return Merged(merged, norm, learnt, lost)
