"""SparseGPT: one-shot pruning with error feedback (Frantar & Alistarh, arXiv 2301.00774, Algorithm 1).

Differs from the published code in that it keeps earlier constraints. Entries that an earlier mask removed stay removed.
On a quantized weight, every kept entry is rounded to the stored grid inside the column sweep, so that its rounding
error is fed forward like a pruning error. The number of zeros is exact over the whole matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pqqp_lightning.algorithms.column_sweep import join_masks, join_rows, sweep_columns
from pqqp_lightning.algorithms.grid import ColumnGrid, Grid, concatenate_rows, round_to_grid
from pqqp_lightning.algorithms.hessian import InverseFactor, factorize_inverse
from pqqp_lightning.algorithms.selection import Pattern, keep_by_pattern, lowest, removed_first

STEP = 32
"""Columns per step of the sweep where no pattern sets it; affects speed only."""


@dataclass(frozen=True)
class Pruned:
    """Pruned weights [O, I] and their mask [O, I], True where kept."""

    weight: Tensor
    mask: Tensor


def prune_sparsegpt(
    weight: Tensor,
    hessian: Tensor | InverseFactor,
    *,
    mask: Tensor | None = None,
    grid: Grid | None = None,
    **options: Any,
) -> Pruned:
    """Prune ``weight`` [O, I] and update the kept entries.

    Args:
        weight: [O, I].
        hessian: as in :func:`prune_sparsegpt_together`.
        mask: earlier keep-mask; entries that it removes stay removed and count.
        grid: earlier grid; every kept entry ends on it.
        options: those of :func:`prune_sparsegpt_together`.

    Raises:
        ArithmeticError: the Hessian cannot be factorized.
    """
    return prune_sparsegpt_together([weight], hessian, [mask], [grid], **options)[0]


def prune_sparsegpt_together(
    weights: Sequence[Tensor],
    hessian: Tensor | InverseFactor,
    masks: Sequence[Tensor | None],
    grids: Sequence[Grid | None],
    *,
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    damping: float = 0.01,
    block_size: int = 128,
) -> list[Pruned]:
    """Prune ``weights`` [O_i, I], which share a Hessian, in one sweep over the columns of all of them.

    Each gets what it would get alone, with the same number of zeros, up to the order of summation in matrix products
    of another shape.

    Args:
        weights: each [O_i, I].
        hessian: X^T X [I, I], or its factorized inverse if several calls share it.
        masks: earlier keep-mask of each, or None; entries that it removes stay removed and count.
        grids: earlier grid of each, on which every kept entry ends; all have the same bits, levels and groups, or all
            are None.
        sparsity: fraction to remove of each, chosen per block over all its rows by w^2 / U_cc^2.
        pattern: (N, M) instead of ``sparsity``.
        damping: fraction of the mean diagonal added to the diagonal.
        block_size: columns per block; the mask is chosen block by block, on the weights as updated so far.

    Raises:
        ArithmeticError: the Hessian cannot be factorized.
    """
    inverse = hessian if isinstance(hessian, InverseFactor) else factorize_inverse(hessian, damping)
    assert inverse.order is None, "SparseGPT sweeps the columns in their own order"
    rows = [len(weight) for weight in weights]
    live = join_rows(weights).float().masked_fill(inverse.dead, 0.0)  # a copy
    earlier = join_masks(masks, weights)
    kept = torch.ones_like(live.T, dtype=torch.bool, memory_format=torch.contiguous_format)  # [I, O]
    if earlier is not None:
        kept.copy_(earlier.T)
    scale_of = inverse.factor.diagonal().square()  # [I]
    choosers = []
    for part, mask in zip(kept.split(rows, dim=1), masks, strict=True):
        choosers.append(_MaskChooser(part, scale_of, sparsity, pattern, has_earlier=mask is not None))

    def choose(start: int, stop: int, columns: Tensor) -> None:
        for chooser, part in zip(choosers, columns.split(rows, dim=1), strict=True):
            chooser.choose(start, stop, part)

    given = [grid for grid in grids if grid is not None]
    column_grid = None
    if given:
        joined = concatenate_rows(given, rows)
        column_grid = ColumnGrid(joined.columns, joined.group_size)
        column_grid.add(joined)

    if pattern is None:  # a block's mask is chosen at once, over all of its entries
        swept = sweep_columns(
            live,
            inverse.factor,
            block_size=block_size,
            step=STEP,
            mask=kept,
            grid=column_grid,
            on_block=choose,
        )
    else:  # each group of M columns is chosen when the sweep reaches it, so a block holds whole groups
        size = pattern[1]
        swept = sweep_columns(
            live,
            inverse.factor,
            block_size=max(size, block_size // size * size),
            step=size,
            mask=kept,
            grid=column_grid,
            on_step=choose,
        )
    results = []
    kept_rows = kept.T.contiguous().split(rows)
    for weight, part, own, grid in zip(weights, swept.split(rows), kept_rows, grids, strict=True):
        decided = part if grid is None else round_to_grid(part, grid)
        results.append(Pruned(decided.masked_fill(~own, 0.0).to(weight.dtype), own))
    return results


class _MaskChooser:
    """Chooses the mask of the next columns from their weights as updated so far."""

    def __init__(
        self, columns: Tensor, scale_of: Tensor, sparsity: float | None, pattern: Pattern | None, *, has_earlier: bool
    ) -> None:
        self._columns = columns  # [I, O], chosen in place
        self._earlier = columns.clone() if has_earlier else None
        self._scale_of = scale_of
        self._sparsity = sparsity
        self._pattern = pattern
        self._removed = 0

    def choose(self, start: int, stop: int, columns: Tensor) -> None:
        """Choose the mask of ``columns`` [stop - start, O]."""
        scores = columns.square() / self._scale_of[start:stop, None]
        earlier = None if self._earlier is None else self._earlier[start:stop]
        if self._pattern is not None:
            mask = None if earlier is None else earlier.T
            self._columns[start:stop] = keep_by_pattern(scores.T, self._pattern, mask).T
            return
        assert self._sparsity is not None
        # Rounding the running total, not each block, makes the number of zeros exact over the whole matrix. Entries
        # that an earlier mask removed in later columns count towards that total: leave room for them.
        target_so_far = round(self._sparsity * (stop * scores.shape[1]))
        room = round(self._sparsity * self._columns.numel())
        if self._earlier is not None:
            room -= int((~self._earlier[stop:]).sum())
        due = max(0, min(min(target_so_far, room) - self._removed, scores.numel()))
        removed = lowest(removed_first(scores, earlier).reshape(1, -1), due).view_as(scores)
        if earlier is not None:
            removed = removed | ~earlier
            due = int(removed.sum())
        self._columns[start:stop] = ~removed
        self._removed += due
