"""One step of the column sweep as one Triton kernel, for GPUs; ``sweep.py`` says what a step computes.

Within a step no row depends on another, so each thread sweeps a row. Tensor by tensor a step takes ten launches a
column, which is what the time goes to on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqqp_lightning.algorithms.grid import ColumnGrid

ROWS = 64
"""Rows a program."""

NOT_SPECIALIZED = [
    "count",
    "rows",
    "factor_row",
    "factor_column",
    "scale_column",
    "scale_row",
    "zero_column",
    "zero_row",
]
"""Numbers that differ from layer to layer; the kernel is not compiled again for them."""

POINTERS = ["columns", "errors", "factor", "mask", "scale", "zero"]


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=POINTERS)
def _sweep(  # type: ignore[no-untyped-def]  # Triton's own types
    columns,
    errors,
    factor,
    mask,
    scale,
    zero,
    count,
    rows,
    factor_row,
    factor_column,
    scale_column,
    scale_row,
    zero_column,
    zero_row,
    middle,
    levels,
    ROUNDED: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    for i in range(count):
        column = tl.load(columns + i * rows + row, mask=inside, other=0.0)
        for k in range(i):
            column -= tl.load(errors + k * rows + row, mask=inside, other=0.0) * tl.load(
                factor + k * factor_row + i * factor_column
            )
        decided = column
        if ROUNDED:
            step = tl.load(scale + i * scale_column + row * scale_row, mask=inside, other=1.0)
            origin = middle
            if ASYMMETRIC:
                origin = tl.load(zero + i * zero_column + row * zero_row, mask=inside, other=0.0)
            level = tl.minimum(tl.maximum(tl.div_rn(column, step), -origin), levels - origin)
            decided = ((level + 12582912.0) - 12582912.0) * step  # 1.5 * 2^23: to the nearest integer, halves to even
        if MASKED:
            decided = tl.where(tl.load(mask + i * rows + row, mask=inside, other=0) != 0, decided, 0.0)
        error = tl.div_rn(column - decided, tl.load(factor + i * (factor_row + factor_column)))
        tl.store(errors + i * rows + row, error, mask=inside)
        tl.store(columns + i * rows + row, decided, mask=inside)


def sweep_step(
    columns: Tensor,
    factor: Tensor,
    errors: Tensor,
    mask: Tensor | None,
    grid: ColumnGrid | None,
    first: int,
    last: int,
) -> None:
    """As ``sweep._sweep_step``, for a grid without a codebook."""
    count, rows = last - first, columns.shape[1]
    step = columns[first:last]
    scale, origin, levels = (step, 0.0, 0) if grid is None else grid.uniform(first, last, rows)
    zero, middle = (origin, 0.0) if isinstance(origin, Tensor) else (None, origin)
    at = step if zero is None else zero
    with torch.cuda.device_of(columns):
        _sweep[(triton.cdiv(rows, ROWS),)](
            step,
            errors,
            factor[first:, first:],
            step if mask is None else mask[first:last].view(torch.uint8),
            scale,
            at,
            count,
            rows,
            factor.stride(0),
            factor.stride(1),
            scale.stride(0),
            scale.stride(1),
            at.stride(0),
            at.stride(1),
            middle,
            float(levels),
            ROUNDED=grid is not None,
            ASYMMETRIC=zero is not None,
            MASKED=mask is not None,
            BLOCK=ROWS,
            num_warps=ROWS // 32,  # a thread a row: it reads no error but its own
        )


def build() -> None:
    """Compile the kernel and run it once.

    Raises:
        Exception: whatever Triton raises where it cannot.
    """
    columns = torch.ones(2, 2, device="cuda")
    sweep_step(columns, torch.eye(2, device="cuda"), torch.zeros_like(columns), None, None, 0, 2)
    torch.cuda.synchronize()
