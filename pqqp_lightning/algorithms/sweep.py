"""The column sweep of SparseGPT and GPTQ: decide a column, feed its error to the columns after it.

For column i with U from :func:`~pqqp_lightning.algorithms.hessian.factorize_inverse` (GPTQ, arXiv 2210.17323,
Algorithm 1; SparseGPT, arXiv 2301.00774, Algorithm 1): e = (w_i - decided_i) / U_ii, and w_j -= e * U_ij for j > i.
The updates are collected: within a step each column gathers them when its turn comes (one matrix-vector product
instead of a write to all later columns), and whole steps and blocks are brought up to date by matrix products.
The weights are held transposed, so that a column is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Prepare = Callable[[int, int, Tensor], None]
"""Called with (start, stop, columns [stop - start, O]) when these columns hold every earlier column's feedback."""


def sweep_columns(
    weight: Tensor,
    factor: Tensor,
    decide: Callable[[int, Tensor], Tensor],
    *,
    block_size: int,
    step: int,
    on_block: Prepare | None = None,
    on_step: Prepare | None = None,
) -> Tensor:
    """Sweep over the columns of ``weight`` [O, I] and return the decided weights [O, I] in float32.

    Args:
        weight: [O, I].
        factor: U [I, I].
        decide: (index, column [O]) -> the column's final values [O]; must not change its argument.
        block_size: columns a block.
        step: columns a step within a block.
        on_block: called at the start of each block.
        on_step: called at the start of each step.
    """
    columns = weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # [I, O]
    width = columns.shape[0]
    diagonal = factor.diagonal().tolist()
    errors = torch.empty(min(block_size, width), columns.shape[1], dtype=columns.dtype, device=columns.device)
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        if on_block is not None:
            on_block(start, stop, columns[start:stop])
        for first in range(start, stop, step):
            last = min(first + step, stop)
            if first > start:
                columns[first:last].addmm_(factor[start:first, first:last].T, errors[: first - start], alpha=-1)
            if on_step is not None:
                on_step(first, last, columns[first:last])
            _sweep_step(columns, factor, errors[first - start :], diagonal, decide, first, last)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return columns.T.contiguous()


def _sweep_step(
    columns: Tensor,
    factor: Tensor,
    errors: Tensor,
    diagonal: list[float],
    decide: Callable[[int, Tensor], Tensor],
    first: int,
    last: int,
) -> None:
    """One step: ``errors[k]`` becomes the error of column ``first + k``."""
    for i in range(first, last):
        column = columns[i]
        if i > first:
            column.addmv_(errors[: i - first].T, factor[first:i, i], alpha=-1)
        decided = decide(i, column)
        error = errors[i - first]
        torch.sub(column, decided, out=error)
        error.div_(diagonal[i])
        column.copy_(decided)
