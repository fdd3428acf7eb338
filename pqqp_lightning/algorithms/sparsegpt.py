"""SparseGPT: one-shot pruning with error feedback (Frantar & Alistarh, arXiv 2301.00774, Algorithm 1).

Differs from the published code in what it keeps: entries that an earlier mask removed stay removed, and on a weight
that is quantized already, every kept entry is rounded to the stored grid inside the column sweep, so that its
rounding error is fed forward like a pruning error. The number of zeros is exact over the whole matrix.
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


@dataclass(frozen=True)
class Pruned:
    """Weights [O, I] and the mask [O, I] (True is kept) that they obey."""

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
    """Prune ``weight`` [O, I] and update what is kept.

    Args:
        weight: [O, I].
        hessian: X^T X [I, I], or its factorized inverse where several matrices share it.
        sparsity: fraction to remove, chosen per block over all rows by w^2 / U_cc^2.
        pattern: (N, M) instead of ``sparsity``.
        damping: fraction of the mean diagonal added to the diagonal.
        block_size: columns a block; the mask is chosen block by block, on weights as updated so far.
        mask: earlier keep-mask; its zeros stay and count.
        grid: earlier grid; every kept entry ends on it.

    Raises:
        ArithmeticError: the Hessian cannot be factorized.
    """
    inverse = hessian if isinstance(hessian, InverseFactor) else factorize_inverse(hessian, damping)
    assert inverse.order is None, "SparseGPT sweeps the columns in their own order"
    live = weight.float().masked_fill(inverse.dead, 0.0)  # a copy
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.clone()
    scale_of = inverse.factor.diagonal().square()  # [I]
    chosen = _Chooser(kept, scale_of, sparsity, pattern)
    block = block_size if pattern is None else max(pattern[1], block_size // pattern[1] * pattern[1])
    to_grid = None if grid is None else ColumnGrid(grid.columns, grid.group_size)
    if to_grid is not None and grid is not None:
        to_grid.add(grid)

    swept = sweep_columns(
        live,
        inverse.factor,
        block_size=block,
        step=STEP if pattern is None else pattern[1],
        mask=chosen.columns,
        grid=to_grid,
        on_block=chosen.choose if pattern is None else None,
        on_step=None if pattern is None else chosen.choose,
    )
    kept = chosen.columns.T.contiguous()
    if grid is not None:
        swept = round_to_grid(swept, grid)
    return Pruned(swept.masked_fill_(~kept, 0.0).to(weight.dtype), kept)


class _Chooser:
    """Chooses the mask of the next columns from the weights as they are when these columns come up."""

    def __init__(self, mask: Tensor, scale_of: Tensor, sparsity: float | None, pattern: Pattern | None) -> None:
        self.columns = mask.T.contiguous()  # [I, O], chosen in place
        self._earlier = self.columns.clone()
        self._scale_of, self._sparsity, self._pattern = scale_of, sparsity, pattern
        self._removed = 0

    def choose(self, start: int, stop: int, columns: Tensor) -> None:
        """Choose the mask of ``columns`` [stop - start, O]."""
        scores = columns.square() / self._scale_of[start:stop, None]
        earlier = self._earlier[start:stop]
        if self._pattern is not None:
            self.columns[start:stop] = keep_by_pattern(scores.T, self._pattern, earlier.T).T
            return
        assert self._sparsity is not None
        share = round(self._sparsity * (stop * scores.shape[1]))
        # earlier zeros in the columns to come count already: leave room for them
        room = round(self._sparsity * self.columns.numel()) - int((~self._earlier[stop:]).sum())
        due = min(share, room) - self._removed
        removed = lowest(removed_first(scores, earlier).reshape(1, -1), max(0, min(due, scores.numel())))
        self.columns[start:stop] = earlier & ~removed.view_as(scores)
        self._removed += int((~self.columns[start:stop]).sum())
