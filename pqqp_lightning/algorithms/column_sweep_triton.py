"""One step of the column sweep as one Triton kernel, for GPUs; ``column_sweep.py`` says what a step computes.

Within a step the rows are independent, so each thread sweeps one row. Without the kernel a step takes ten launches per
column, and launches dominate its time on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqqp_lightning.algorithms.grid import ColumnGrid

ROWS = 64
"""Rows per program."""

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
"""Numbers that differ from layer to layer; Triton must not compile the kernel again for each value."""

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
    """Sweep one step as ``column_sweep._sweep_step`` does, for a grid without a codebook."""
    count = last - first
    rows = columns.shape[1]
    step = columns[first:last]
    # The kernel does not read the pointers of absent tensors, but needs valid ones: the columns stand in.
    scale: Tensor = step
    zero: Tensor = step
    middle = 0.0
    levels = 0
    asymmetric = False
    if grid is not None:
        scale, origin, levels = grid.uniform(first, last, rows)
        if isinstance(origin, Tensor):
            zero = origin
            asymmetric = True
        else:
            middle = origin
    with torch.cuda.device_of(columns):
        _sweep[(triton.cdiv(rows, ROWS),)](
            step,
            errors,
            factor[first:, first:],
            step if mask is None else mask[first:last].view(torch.uint8),
            scale,
            zero,
            count,
            rows,
            factor.stride(0),
            factor.stride(1),
            scale.stride(0),
            scale.stride(1),
            zero.stride(0),
            zero.stride(1),
            middle,
            float(levels),
            ROUNDED=grid is not None,
            ASYMMETRIC=asymmetric,
            MASKED=mask is not None,
            BLOCK=ROWS,
            num_warps=ROWS // 32,  # one thread per row, which reads only the errors that it wrote itself
        )


def build() -> None:
    """Compile the kernel and run it once.

    Raises:
        Exception: Triton cannot compile or run it.
    """
    columns = torch.ones(2, 2, device="cuda")
    sweep_step(columns, torch.eye(2, device="cuda"), torch.zeros_like(columns), None, None, 0, 2)
    torch.cuda.synchronize()
