"""Slow, obvious implementations of the compression methods, written from the papers.

Everything here is float64 numpy with explicit loops, shares no code with `pqqp_lightning`, and is what
the fast implementations are compared with. Shapes: O out, I in, G groups of columns.

- magnitude pruning: Han 2015
- Wanda: arXiv 2306.11695
- SparseGPT: arXiv 2301.00774, Algorithm 1
- GPTQ: arXiv 2210.17323, Algorithm 1
- EoRA: arXiv 2410.21271, the projection into the eigenspace of the inputs
- ALPS: arXiv 2406.07831, Algorithm 1, rho as in its published code

SparseGPT and GPTQ are one loop over the columns with a different decision at each column, so the loop
(how an error is compensated) and the decisions (which value a column takes) are kept apart. There are
two loops: `cholesky_loop` as published, and `obs_sequential`, which never inverts or factorises the
Hessian as a whole but solves the remaining least-squares problem at every column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SMALLEST_NORMAL_FLOAT16 = 2.0**-14
LARGEST_FLOAT16 = 65504.0

Decide = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
Loop = Callable[[np.ndarray, np.ndarray, Decide], np.ndarray]


# ---------------------------------------------------------------------------------------------- measuring


def objective(weight, changed, hessian) -> float:
    """tr(dW H dW^T): the layer's squared output error, summed over the output rows."""
    hessian = np.asarray(hessian, dtype=np.float64)
    difference = np.asarray(weight, dtype=np.float64) - np.asarray(changed, dtype=np.float64)
    total = 0.0
    for row in difference:
        total += row @ hessian @ row
    return float(total)


# ------------------------------------------------------------------------------------ pruning by a score


def smallest(scores: list[float], count: int) -> list[int]:
    """Positions of the `count` smallest scores."""
    return sorted(range(len(scores)), key=lambda position: scores[position])[:count]


def prune_scores(scores: np.ndarray, count: int, mask: np.ndarray | None) -> np.ndarray:
    """Prunes the `count` smallest of `scores` (1-D); what `mask` has pruned goes first and stays pruned."""
    already = np.zeros(len(scores), dtype=bool) if mask is None else ~mask
    ranked = [-1.0 if gone else float(score) for score, gone in zip(scores, already, strict=True)]
    kept = np.ones(len(scores), dtype=bool)
    for position in smallest(ranked, max(count, int(already.sum()))):
        kept[position] = False
    return kept


def prune_pattern(scores: np.ndarray, pattern: tuple[int, int], mask: np.ndarray | None) -> np.ndarray:
    """Keeps the N largest of every M consecutive columns of a row."""
    keep, every = pattern
    kept = np.ones(scores.shape, dtype=bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], every):
            part = slice(start, start + every)
            earlier = None if mask is None else mask[row, part]
            kept[row, part] = prune_scores(scores[row, part], every - keep, earlier)
    return kept


def magnitude(weight, *, sparsity=None, pattern=None, mask=None) -> np.ndarray:
    """Keeps the largest |w| of a layer; exactly round(sparsity * numel) are pruned."""
    scores = np.abs(np.asarray(weight, dtype=np.float64))
    if pattern is not None:
        return prune_pattern(scores, pattern, mask)
    count = round(sparsity * scores.size)
    flat_mask = None if mask is None else mask.reshape(-1)
    return prune_scores(scores.reshape(-1), count, flat_mask).reshape(scores.shape)


def magnitude_global(weights, *, sparsity, masks=None) -> list[np.ndarray]:
    """Keeps the largest |w| of several layers taken together."""
    scores = np.concatenate([np.abs(np.asarray(weight, dtype=np.float64)).reshape(-1) for weight in weights])
    mask = None if masks is None else np.concatenate([np.asarray(mask).reshape(-1) for mask in masks])
    kept = prune_scores(scores, round(sparsity * len(scores)), mask)
    result, start = [], 0
    for weight in weights:
        size = int(np.prod(weight.shape))
        result.append(kept[start : start + size].reshape(tuple(weight.shape)))
        start += size
    return result


def wanda(weight, column_norm, *, sparsity=None, pattern=None, mask=None) -> np.ndarray:
    """Keeps the largest |w| * ||X_j||_2 of each output row; exactly round(sparsity * I) of a row are pruned."""
    weight = np.asarray(weight, dtype=np.float64)
    scores = np.zeros(weight.shape)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            scores[row, column] = abs(weight[row, column]) * float(column_norm[column])
    if pattern is not None:
        return prune_pattern(scores, pattern, mask)
    kept = np.ones(weight.shape, dtype=bool)
    for row in range(weight.shape[0]):
        earlier = None if mask is None else mask[row]
        kept[row] = prune_scores(scores[row], round(sparsity * weight.shape[1]), earlier)
    return kept


# ----------------------------------------------------------------------------------------------------- grids


@dataclass
class Grid:
    """Every entry equals scale * (code - zero), code in 0..2^bits-1; one scale and zero per row and group."""

    bits: int
    scale: np.ndarray  # [O, G] float64, holding values that were stored in 16 or 32 bits
    zero: np.ndarray  # [O, G] integer valued
    group_size: int

    def codes(self, column: int, values: np.ndarray) -> np.ndarray:
        """Codes of the nearest grid points to `values` [O], which stand in `column`."""
        group = column // self.group_size
        codes = np.zeros(len(values))
        for row, value in enumerate(values):
            code = np.rint(value / self.scale[row, group]) + self.zero[row, group]
            codes[row] = min(max(code, 0), 2**self.bits - 1)
        return codes

    def values(self, column: int, codes: np.ndarray) -> np.ndarray:
        """The grid points that `codes` [O] stand for in `column`."""
        group = column // self.group_size
        return self.scale[:, group] * (codes - self.zero[:, group])

    def round(self, column: int, values: np.ndarray) -> np.ndarray:
        """The nearest grid points to `values` [O], which stand in `column`."""
        return self.values(column, self.codes(column, values))


def stored_scale(scale: np.ndarray) -> np.ndarray:
    """Scales as a checkpoint holds them: float16 where all are in its normal range, else float32."""
    if scale.min() >= SMALLEST_NORMAL_FLOAT16 and scale.max() <= LARGEST_FLOAT16:
        return scale.astype(np.float16).astype(np.float64)
    return scale.astype(np.float32).astype(np.float64)


def raw_scale(values: np.ndarray, bits: int, symmetric: bool) -> float:
    """The unrounded scale of one quantization unit."""
    levels = 2**bits - 1
    scale = 2 * np.abs(values).max() / levels if symmetric else (max(values.max(), 0) - min(values.min(), 0)) / levels
    return float(scale) if scale > 0 else 1.0


def zero_point(values: np.ndarray, scale: float, bits: int, symmetric: bool) -> float:
    """The code that stands for 0."""
    if symmetric:
        return float(2 ** (bits - 1))
    return float(min(max(np.rint(-min(values.min(), 0) / scale), 0), 2**bits - 1))


def fit_grid(weight, bits: int, *, group_size=None, symmetric=True, per_tensor=False) -> Grid:
    """Round-to-nearest grids: one scale per tensor, per output row, or per row and group of columns."""
    weight = np.asarray(weight, dtype=np.float64)
    rows, columns = weight.shape
    group_size = columns if group_size is None else group_size
    units = {}
    for row in range(rows):
        for group in range(columns // group_size):
            unit = weight if per_tensor else weight[row, group * group_size : (group + 1) * group_size]
            units[row, group] = unit
    scale = np.zeros((rows, columns // group_size))
    for place, unit in units.items():
        scale[place] = raw_scale(unit, bits, symmetric)
    scale = stored_scale(scale)
    zero = np.zeros_like(scale)
    for place, unit in units.items():
        zero[place] = zero_point(unit, scale[place], bits, symmetric)
    return Grid(bits, scale, zero, group_size)


@dataclass
class Quantized:
    """Values, their codes and the grid that connects the two."""

    weight: np.ndarray
    codes: np.ndarray
    grid: Grid


def rtn(weight, bits: int, *, group_size=None, symmetric=True, per_tensor=False) -> Quantized:
    """Round to nearest."""
    weight = np.asarray(weight, dtype=np.float64)
    grid = fit_grid(weight, bits, group_size=group_size, symmetric=symmetric, per_tensor=per_tensor)
    codes, values = np.zeros(weight.shape), np.zeros(weight.shape)
    for column in range(weight.shape[1]):
        codes[:, column] = grid.codes(column, weight[:, column])
        values[:, column] = grid.values(column, codes[:, column])
    return Quantized(values, codes, grid)


# ------------------------------------------------------------------------- column loops with compensation


def prepare(weight, hessian, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Dead columns: 1 on the diagonal and weight 0. Then `damping` of the mean diagonal is added to it."""
    weight = np.asarray(weight, dtype=np.float64).copy()
    hessian = np.asarray(hessian, dtype=np.float64).copy()
    for column in range(len(hessian)):
        if hessian[column, column] == 0:
            hessian[column, column] = 1.0
            weight[:, column] = 0.0
    mean = np.diag(hessian).mean()
    for column in range(len(hessian)):
        hessian[column, column] += damping * mean
    return weight, hessian


def cholesky_loop(weight: np.ndarray, hessian: np.ndarray, decide: Decide) -> np.ndarray:
    """Algorithm 1 of both papers: H^-1 = U^T U, and row c of U carries column c's error to the later columns.

    `decide(c, weight, price)` returns the values that column c takes, from the weight as updated so far;
    price[c] is the loss of changing a weight of column c by 1 when all later columns compensate.
    """
    weight = weight.copy()
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    price = 1 / np.diag(upper) ** 2
    for column in range(weight.shape[1]):
        target = decide(column, weight, price)
        error = (weight[:, column] - target) / upper[column, column]
        for later in range(column + 1, weight.shape[1]):
            weight[:, later] -= error * upper[column, later]
        weight[:, column] = target
    return weight


def obs_sequential(weight: np.ndarray, hessian: np.ndarray, decide: Decide) -> np.ndarray:
    """The same from first principles: fix a column, then solve for the best change of the columns after it.

    With d the change of column c, the later columns R minimise the loss at -d H_cR H_RR^-1, and the loss is
    then d^2 (H_cc - H_cR H_RR^-1 H_Rc).
    """
    weight = weight.copy()
    columns = weight.shape[1]
    transfer = []
    price = np.zeros(columns)
    for column in range(columns):
        later = slice(column + 1, columns)
        transfer.append(np.linalg.solve(hessian[later, later], hessian[later, column]))
        price[column] = hessian[column, column] - hessian[column, later] @ transfer[column]
    for column in range(columns):
        target = decide(column, weight, price)
        change = target - weight[:, column]
        weight[:, column + 1 :] -= np.outer(change, transfer[column])
        weight[:, column] = target
    return weight


def sparsegpt(
    weight,
    hessian,
    *,
    sparsity=None,
    pattern=None,
    damping=0.01,
    block_size=128,
    mask=None,
    grid: Grid | None = None,
    loop: Loop = cholesky_loop,
) -> tuple[np.ndarray, np.ndarray]:
    """SparseGPT with the mask chosen per block of columns, or per M columns of a row (N:M).

    After the block that ends at column c, round(sparsity * O * c) entries are pruned in all. Entries that
    `mask` has pruned are pruned first and count; where many of them are still to come, the blocks before them
    prune less, so that the total is the one asked for. With a `grid`, kept entries are rounded to it in the loop.
    """
    weight, hessian = prepare(weight, hessian, damping)
    rows, columns = weight.shape
    earlier = np.ones(weight.shape, dtype=bool) if mask is None else mask
    kept = np.ones(weight.shape, dtype=bool)

    def choose(start: int, current: np.ndarray, price: np.ndarray) -> None:
        end = min(start + (block_size if pattern is None else pattern[1]), columns)
        scores = current[:, start:end] ** 2 * price[start:end]
        if pattern is not None:
            kept[:, start:end] = prune_pattern(scores, pattern, earlier[:, start:end])
        else:
            still_to_come = int((~earlier[:, end:]).sum())
            due = min(round(sparsity * (rows * end)), round(sparsity * (rows * columns)) - still_to_come)
            quota = due - int((~kept[:, :start]).sum())
            chosen = prune_scores(scores.reshape(-1), quota, earlier[:, start:end].reshape(-1))
            kept[:, start:end] = chosen.reshape(rows, end - start)

    def decide(column: int, current: np.ndarray, price: np.ndarray) -> np.ndarray:
        if column % (block_size if pattern is None else pattern[1]) == 0:
            choose(column, current, price)
        target = current[:, column] if grid is None else grid.round(column, current[:, column])
        return np.where(kept[:, column], target, 0.0)

    return loop(weight, hessian, decide), kept


def alps(weight, hessian, *, sparsity=None, pattern=None, damping=0.01, mask=None) -> tuple[np.ndarray, np.ndarray]:
    """ALPS: ADMM for the mask, then the least-squares solution of every row on its kept columns.

    The W update solves its system anew in every iteration. The columns are scaled so that H has a diagonal of 1.
    """
    weight, hessian = prepare(weight, hessian, damping)
    rows, columns = weight.shape
    scale = np.sqrt(np.diag(hessian))
    target = weight * scale
    scaled = hessian / np.outer(scale, scale)

    def support(values: np.ndarray) -> np.ndarray:
        if pattern is not None:
            return prune_pattern(np.abs(values), pattern, mask)
        earlier = None if mask is None else mask.reshape(-1)
        return prune_scores(np.abs(values).reshape(-1), round(sparsity * values.size), earlier).reshape(rows, columns)

    rho = 0.1
    sparse = np.where(support(target), target, 0.0)
    multipliers = np.zeros_like(target)
    before = support(target)
    for iteration in range(300):
        free = np.linalg.solve(scaled + rho * np.eye(columns), (target @ scaled - multipliers + rho * sparse).T).T
        kept = support(free + multipliers / rho)
        sparse = np.where(kept, free + multipliers / rho, 0.0)
        multipliers = multipliers + rho * (free - sparse)
        if iteration % 3 == 2:
            changed = int((kept != before).sum())
            if changed == 0:
                break
            amount = int(kept.sum())
            rho *= 1.3 if changed >= 0.1 * amount else 1.2 if changed >= 0.005 * amount else 1.1
            before = kept
    solved = np.zeros_like(weight)
    for row in range(rows):
        columns_kept = np.flatnonzero(kept[row])
        system = hessian[np.ix_(columns_kept, columns_kept)]
        solved[row, columns_kept] = np.linalg.solve(system, (weight[row] @ hessian)[columns_kept])
    return solved, kept


def eora(error, hessian, rank: int) -> np.ndarray:
    """B A [O, I]: the first `rank` singular values of the error in the eigenspace of the inputs, projected back."""
    values, vectors = np.linalg.eigh(np.asarray(hessian, dtype=np.float64))
    projection = vectors * np.sqrt(values)  # Q L^1/2
    left, singular, right = np.linalg.svd(np.asarray(error, dtype=np.float64) @ projection, full_matrices=False)
    b = left[:, :rank] * singular[:rank]
    return b @ right[:rank] @ np.diag(1 / np.sqrt(values)) @ vectors.T


def gptq(
    weight,
    hessian,
    *,
    bits: int,
    group_size=None,
    symmetric=True,
    per_tensor=False,
    damping=0.01,
    activation_order=False,
    mask=None,
    loop: Loop = cholesky_loop,
    stale_block: int | None = None,
) -> Quantized:
    """GPTQ; a group's grid is fitted when the loop reaches it, on the kept weights as updated so far.

    With `activation_order` the columns are visited by descending diag(H) and the grids are static: fitted
    before the loop, in the original column order. `mask`: pruned entries become 0 at their column and
    that error is compensated like any other. `stale_block` reproduces the published code, where a group's
    grid misses the updates that come from its own block of columns.
    """
    undamped = np.asarray(hessian, dtype=np.float64)
    weight, hessian = prepare(weight, hessian, damping)
    columns = weight.shape[1]
    group_size = columns if group_size is None else group_size
    kept = np.ones(weight.shape, dtype=bool) if mask is None else mask
    order = list(range(columns))
    if activation_order:
        order.sort(key=lambda column: -(undamped[column, column] or 1.0))
    grid = fit_grid(weight * kept, bits, group_size=group_size, symmetric=symmetric, per_tensor=per_tensor)
    codes = np.zeros(weight.shape)
    snapshot = weight

    def decide(step: int, current: np.ndarray, price: np.ndarray) -> np.ndarray:
        nonlocal snapshot
        column = order[step]
        if stale_block is None or step % stale_block == 0:
            snapshot = current.copy()
        if not activation_order and group_size < columns and column % group_size == 0:
            part = slice(column, column + group_size)
            fresh = fit_grid((snapshot * kept)[:, part], bits, symmetric=symmetric)
            grid.scale[:, column // group_size] = fresh.scale[:, 0]
            grid.zero[:, column // group_size] = fresh.zero[:, 0]
        wanted = np.where(kept[:, column], current[:, step], 0.0)
        codes[:, column] = grid.codes(column, wanted)
        return grid.values(column, codes[:, column])

    visited = loop(weight[:, order], hessian[np.ix_(order, order)], decide)
    values = np.zeros(weight.shape)
    for step, column in enumerate(order):
        values[:, column] = visited[:, step]
    return Quantized(values, codes, grid)
