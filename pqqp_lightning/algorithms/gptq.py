"""GPTQ / OPTQ: quantization with error feedback (Frantar et al., arXiv 2210.17323, Algorithm 1).

Differs from the published code in four ways:

- A mask is kept inside the column sweep: a pruned entry is set to zero when its column comes up, and its error is fed
  to the kept entries after it.
- A group's scale is always fitted to weights that hold every earlier column's feedback. The published code misses the
  feedback of the current block for a group that starts inside the block.
- With activation order, the groups' grids are fitted beforehand in the original column order. The stored format then
  needs no permutation.
- The clipping search weighs the error of column i by 1 / U_ii^2, as the objective does. The published code's ``mse``
  looks at the weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pqqp_lightning.algorithms.column_sweep import join_masks, join_rows, sweep_columns
from pqqp_lightning.algorithms.grid import (
    ColumnGrid,
    Grid,
    Quantized,
    concatenate_columns,
    concatenate_rows,
    fit_grid,
    round_to_grid,
)
from pqqp_lightning.algorithms.hessian import InverseFactor, factorize_inverse

STEP = 32
"""Columns per step of the sweep where no group size sets it; affects speed only."""


def quantize_gptq(
    weight: Tensor, hessian: Tensor | InverseFactor, *, mask: Tensor | None = None, **options: Any
) -> Quantized:
    """Quantize ``weight`` [O, I].

    Args:
        weight: [O, I].
        hessian: as in :func:`quantize_gptq_together`.
        mask: keep-mask [O, I]; its zeros stay zero.
        options: those of :func:`quantize_gptq_together`.

    Raises:
        ArithmeticError: the Hessian cannot be factorized.
    """
    return quantize_gptq_together([weight], hessian, [mask], **options)[0]


def quantize_gptq_together(
    weights: Sequence[Tensor],
    hessian: Tensor | InverseFactor,
    masks: Sequence[Tensor | None],
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    per_tensor: bool = False,
    clip: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
    activation_order: bool = False,
) -> list[Quantized]:
    """Quantize ``weights`` [O_i, I], which share a Hessian, in one sweep over the columns of all of them.

    Each gets what it would get alone, up to the order of summation in matrix products of another shape.

    Args:
        weights: each [O_i, I].
        hessian: X^T X [I, I], or its factorized inverse if several calls share it (which then fixes ``damping`` and
            ``activation_order``).
        masks: keep-mask [O_i, I] of each, whose zeros stay zero, or None.
        bits: 2 to 8.
        group_size: columns that share a scale; None for one scale per output row.
        symmetric: use no zero points.
        per_tensor: one scale for each whole matrix.
        clip: search each scale, see :func:`~pqqp_lightning.algorithms.grid.fit_grid`; the error of column i is weighed
            by 1 / U_ii^2, as in the objective.
        damping: fraction of the mean diagonal added to the diagonal.
        block_size: columns per block.
        activation_order: sweep the columns by descending diagonal of the Hessian.

    Raises:
        ArithmeticError: the Hessian cannot be factorized.
    """
    if isinstance(hessian, Tensor):
        hessian = factorize_inverse(hessian, damping, activation_order=activation_order)
    order = hessian.order
    rows = [len(weight) for weight in weights]
    live = join_rows(weights).float()
    mask = join_masks(masks, weights)
    mask_columns = mask  # [I, O] below, in the order of the sweep
    importance = hessian.factor.diagonal().pow(-2)  # [I]
    if order is not None:
        live = live[:, order]
        mask_columns = None if mask is None else mask[:, order]
        importance = importance[order.argsort()]  # back in the original order, as grids are fitted in it
    live = live.masked_fill(hessian.dead, 0.0)
    if mask_columns is not None:
        mask_columns = mask_columns.T.contiguous()

    groups = None if per_tensor else group_size
    columns = ColumnGrid(live.shape[1], groups, order)
    options: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "clip": clip}
    fitted: list[list[Grid]] = []  # for each group of columns, or for all, the grid of each matrix
    step = STEP
    on_step = None
    if groups is not None and order is None:
        # The sweep meets the groups one after another: fit each group's grid when the sweep reaches it, to weights
        # that hold all earlier feedback. One step is one group, and a block holds whole groups.
        step = groups
        block_size = groups * max(1, block_size // groups)

        def fit_group(start: int, stop: int, updated: Tensor) -> None:
            kept = updated if mask_columns is None else updated * mask_columns[start:stop]  # [size, O]
            parts = kept.T.split(rows)
            fitted.append([fit_grid(part, importance=importance[start:stop], **options) for part in parts])
            columns.add(concatenate_rows(fitted[-1], rows))

        on_step = fit_group
    else:
        original = live if order is None else live[:, order.argsort()]
        options |= {"group_size": groups, "per_tensor": per_tensor, "importance": importance}
        fitted.append([fit_grid(part, **options) for part in original.split(rows)])
        del original
        columns.add(concatenate_rows(fitted[0], rows))

    swept = sweep_columns(
        live, hessian.factor, block_size=block_size, step=step, mask=mask_columns, grid=columns, on_step=on_step
    )
    if order is not None:
        swept = swept[:, order.argsort()]
    results = []
    for i, (weight, part) in enumerate(zip(weights, swept.split(rows), strict=True)):
        grid = concatenate_columns([grids[i] for grids in fitted]) if on_step is not None else fitted[0][i]
        # Round once more after the cast: the weights then equal bit for bit what their codes decode to in this dtype.
        rounded = round_to_grid(part.to(weight.dtype), grid)
        own = masks[i]
        results.append(Quantized(rounded if own is None else rounded.masked_fill(~own, 0.0), grid))
    return results
