"""SparseGPT: one-shot pruning with error feedback (Frantar & Alistarh, arXiv 2301.00774, Algorithm 1).

Differs from the published code in that it keeps earlier constraints. Entries that an earlier mask removed stay removed.
On a quantized weight, every kept entry is rounded to the stored grid inside the column sweep, so that its rounding
error is fed forward like a pruning error. The number of zeros is exact over the whole matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pqqp_lightning.algorithms.column_sweep import sweep_columns
from pqqp_lightning.algorithms.grid import ColumnGrid, Grid, round_to_grid
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
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    damping: float = 0.01,
    block_size: int = 128,
    mask: Tensor | None = None,
    grid: Grid | None = None,
) -> Pruned:
    """Prune ``weight`` [O, I] and update the kept entries.

    Args:
        weight: [O, I].
        hessian: X^T X [I, I], or its factorized inverse if several matrices share it.
        sparsity: fraction to remove, chosen per block over all rows by w^2 / U_cc^2.
        pattern: (N, M) instead of ``sparsity``.
        damping: fraction of the mean diagonal added to the diagonal.
        block_size: columns per block; the mask is chosen block by block, on the weights as updated so far.
        mask: earlier keep-mask; entries that it removes stay removed and count.
        grid: earlier grid; every kept entry ends on it.

    Raises:
        ArithmeticError: the Hessian cannot be factorized.
    """
    inverse = hessian if isinstance(hessian, InverseFactor) else factorize_inverse(hessian, damping)
    assert inverse.order is None, "SparseGPT sweeps the columns in their own order"
    live = weight.float().masked_fill(inverse.dead, 0.0)  # a copy
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.clone()
    scale_of = inverse.factor.diagonal().square()  # [I]
    chooser = _MaskChooser(kept, scale_of, sparsity, pattern)
    column_grid = None
    if grid is not None:
        column_grid = ColumnGrid(grid.columns, grid.group_size)
        column_grid.add(grid)

    if pattern is None:  # a block's mask is chosen at once, over all of its entries
        swept = sweep_columns(
            live,
            inverse.factor,
            block_size=block_size,
            step=STEP,
            mask=chooser.columns,
            grid=column_grid,
            on_block=chooser.choose,
        )
    else:  # each group of M columns is chosen when the sweep reaches it, so a block holds whole groups
        size = pattern[1]
        swept = sweep_columns(
            live,
            inverse.factor,
            block_size=max(size, block_size // size * size),
            step=size,
            mask=chooser.columns,
            grid=column_grid,
            on_step=chooser.choose,
        )
    kept = chooser.columns.T.contiguous()
    if grid is not None:
        swept = round_to_grid(swept, grid)
    return Pruned(swept.masked_fill_(~kept, 0.0).to(weight.dtype), kept)


class _MaskChooser:
    """Chooses the mask of the next columns from their weights as updated so far."""

    def __init__(self, mask: Tensor, scale_of: Tensor, sparsity: float | None, pattern: Pattern | None) -> None:
        self.columns = mask.T.contiguous()  # [I, O], chosen in place
        self._earlier = self.columns.clone()
        self._scale_of = scale_of
        self._sparsity = sparsity
        self._pattern = pattern
        self._removed = 0

    def choose(self, start: int, stop: int, columns: Tensor) -> None:
        """Choose the mask of ``columns`` [stop - start, O]."""
        scores = columns.square() / self._scale_of[start:stop, None]
        earlier = self._earlier[start:stop]
        if self._pattern is not None:
            self.columns[start:stop] = keep_by_pattern(scores.T, self._pattern, earlier.T).T
            return
        assert self._sparsity is not None
        # Rounding the running total, not each block, makes the number of zeros exact over the whole matrix. Entries
        # that an earlier mask removed in later columns count towards that total: leave room for them.
        target_so_far = round(self._sparsity * (stop * scores.shape[1]))
        room = round(self._sparsity * self.columns.numel()) - int((~self._earlier[stop:]).sum())
        due = min(target_so_far, room) - self._removed
        removed = lowest(removed_first(scores, earlier).reshape(1, -1), max(0, min(due, scores.numel())))
        self.columns[start:stop] = earlier & ~removed.view_as(scores)
        self._removed += int((~self.columns[start:stop]).sum())
