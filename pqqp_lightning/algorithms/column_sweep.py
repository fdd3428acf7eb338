"""The column sweep of SparseGPT and GPTQ: decide one column, then feed its error to the columns after it.

For column i with U from :func:`~pqqp_lightning.algorithms.hessian.factorize_inverse` (GPTQ, arXiv 2210.17323,
Algorithm 1; SparseGPT, arXiv 2301.00774, Algorithm 1): e = (w_i - decided_i) / U_ii, and w_j -= e * U_ij for j > i.

The updates are lazy. Within a step each column gathers the earlier errors when its turn comes: one matrix-vector
product instead of a write to all later columns. Matrix products update the following steps and blocks. The weights
are held transposed, so that a column is contiguous.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from pqqp_lightning.algorithms.grid import ColumnGrid

Prepare = Callable[[int, int, Tensor], None]
"""Called with (start, stop, columns [stop - start, O]) once these columns hold the feedback of all earlier columns."""


def sweep_columns(
    weight: Tensor,
    factor: Tensor,
    *,
    block_size: int,
    step: int,
    mask: Tensor | None = None,
    grid: ColumnGrid | None = None,
    on_block: Prepare | None = None,
    on_step: Prepare | None = None,
) -> Tensor:
    """Sweep over the columns of ``weight`` [O, I].

    Args:
        weight: [O, I].
        factor: U [I, I].
        block_size: columns per block.
        step: columns per step within a block.
        mask: keep-mask [I, O], contiguous; its columns are read after ``on_block`` and ``on_step``, which may set them.
        grid: rounds the kept entries; None keeps them unrounded.
        on_block: called at the start of each block.
        on_step: called at the start of each step.

    Returns:
        The decided weights [O, I], float32.
    """
    columns = weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # [I, O]
    width = columns.shape[0]
    sweep_step = step_for(columns, grid)
    errors = torch.empty(min(block_size, width), columns.shape[1], dtype=columns.dtype, device=columns.device)
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        if on_block is not None:
            on_block(start, stop, columns[start:stop])
        for first in range(start, stop, step):
            last = min(first + step, stop)
            if first > start:  # feedback of the block's earlier steps
                columns[first:last].addmm_(factor[start:first, first:last].T, errors[: first - start], alpha=-1)
            if on_step is not None:
                on_step(first, last, columns[first:last])
            sweep_step(columns, factor, errors[first - start :], mask, grid, first, last)
        # Later columns get the whole block's feedback in one large matrix product, which is far faster than a write
        # to all of them for each column.
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return columns.T.contiguous()


def join_rows(weights: Sequence[Tensor]) -> Tensor:
    """Put matrices [O_i, I] below one another: [O, I]. A single one is not copied."""
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def join_masks(masks: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    """Put the keep-masks of ``weights`` below one another; None if there is none, else None counts as all kept."""
    if all(mask is None for mask in masks):
        return None
    pairs = zip(masks, weights, strict=True)
    return join_rows([torch.ones_like(w, dtype=torch.bool) if mask is None else mask for mask, w in pairs])


def _sweep_step(
    columns: Tensor,
    factor: Tensor,
    errors: Tensor,
    mask: Tensor | None,
    grid: ColumnGrid | None,
    first: int,
    last: int,
) -> None:
    """Sweep one step: decide the columns in place and set ``errors[k]`` to the error of column ``first + k``."""
    diagonal = factor.diagonal()[first:last].tolist()  # one transfer instead of one for each column
    step = columns[first:last]
    # Multiplying by numbers is faster than by booleans. Few operations per column matter: each has few entries.
    kept = None if mask is None else mask[first:last].to(columns.dtype)
    removed = None if mask is None else (~mask[first:last]).to(columns.dtype)
    for k, column in enumerate(step):
        error = errors[k]
        if k > 0:
            column.addmv_(errors[:k].T, factor[first : first + k, first + k], alpha=-1)
        if grid is not None:
            decided = grid.round(first + k, column)
            if kept is not None:
                decided.mul_(kept[k])
            torch.sub(column, decided, out=error)
            column.copy_(decided)
        elif removed is not None:
            torch.mul(column, removed[k], out=error)
        else:
            error.zero_()
        error.div_(diagonal[k])
    if grid is None and kept is not None:
        step.mul_(kept)


def step_for(columns: Tensor, grid: ColumnGrid | None) -> Callable[..., None]:
    """Return the function that sweeps one step: a Triton kernel on a GPU if it builds, else the loop over columns."""
    if columns.is_cuda and (grid is None or grid.is_uniform):
        return _kernel() or _sweep_step
    return _sweep_step


@cache
def _kernel() -> Callable[..., None] | None:
    if find_spec("triton") is None:
        return None
    try:
        from pqqp_lightning.algorithms import column_sweep_triton as sweep_kernel

        sweep_kernel.build()
    except Exception as error:  # Triton raises many types, for instance where it finds no C compiler
        warnings.warn(
            f"Triton cannot build the kernel for column sweeps, so they run slower on the GPU: {error}", stacklevel=2
        )
        return None
    return sweep_kernel.sweep_step
