"""Quantization grids: every entry is a scale times a level, and a code of ``bits`` bits says which level.

Uniform grids: entry = ``scale * (code - zero)``. Symmetric ones have the 2^b levels -2^(b-1) .. 2^(b-1) - 1 and
scale = 2 * max|w| / (2^b - 1); asymmetric ones span min(w, 0) .. max(w, 0) with an integer zero point (OPTQ, arXiv
2210.17323, and its code). Grids with a codebook: entry = ``scale * level[code]``, scale = max|w| (``codebook.py``).
0 is on every grid, so that pruned entries stay zero. Scales are kept in float16 where that is precise enough, since
they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pqqp_lightning.algorithms.codebook import Codebook, bounds_of, levels_of

SMALLEST_HALF = 2.0**-14
"""Below this, float16 loses precision; such scales are kept in float32."""

CLIP_FACTORS = tuple(1 - step / 40 for step in range(-3, 21) if step)
"""Fractions of a group's range that a clipping search tries beside the whole of it: 1.075 down to 0.5."""

CLIP_NORM = 2.4
PIECE, GPU_PIECE = 2**18, 2**24
"""Weights times trials that the clipping search looks at at once: what a cache holds, and what keeps a GPU busy."""

SMALLEST_SCALE = 1e-38
"""A codebook's scale is taken as this at least, where it is divided by: a block of zeros has scale 0."""


@dataclass(frozen=True)
class Grid:
    """A quantization grid for a matrix [O, I].

    Attributes:
        bits: 2 to 8.
        scale: [O, G], or [1, 1] for the whole matrix; float16 or float32.
        zero: uint8 [O, G] zero points, or None where the grid is symmetric (zero point ``2**(bits - 1)``).
        columns: I; ``columns / G`` is the group size.
        codebook: the name of the levels; None for the integers.
    """

    bits: int
    scale: Tensor
    zero: Tensor | None
    columns: int
    codebook: Codebook | None = None

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.columns // self.scale.shape[1]

    @property
    def levels(self) -> int:
        """The highest code."""
        return 2**self.bits - 1

    def expanded_scale(self) -> Tensor:
        """Scales in float32, [O or 1, I or 1]: broadcasts against the matrix."""
        return self._expand(self.scale.float())

    def expanded_zero(self) -> Tensor | float:
        """Zero points in float32, [O or 1, I or 1], or the one zero point of a symmetric grid."""
        return self.middle if self.zero is None else self._expand(self.zero.float())

    @property
    def middle(self) -> float:
        """The zero point of a symmetric grid."""
        return 2.0 ** (self.bits - 1)

    def to(self, device: torch.device) -> Grid:
        """The same grid on another device."""
        zero = None if self.zero is None else self.zero.to(device)
        return replace(self, scale=self.scale.to(device), zero=zero)

    def chunk(self, groups: int) -> list[Grid]:
        """The grid's row groups, for a matrix that is cut into as many."""
        if self.scale.shape[0] == 1:
            return [self] * groups
        zeros = [None] * groups if self.zero is None else self.zero.chunk(groups)
        return [replace(self, scale=s, zero=z) for s, z in zip(self.scale.chunk(groups), zeros, strict=True)]

    def nearest(self, weight: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
        """The nearest codes to float32 ``weight``, in any float or integer dtype; scale and zero broadcast to it."""
        if self.codebook is None:
            return (weight / scale).round_().add_(zero).clamp_(0, self.levels)
        return torch.bucketize(weight * scale.clamp(min=SMALLEST_SCALE).reciprocal(), bounds_of(self.codebook, weight))

    def values(self, codes: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
        """What ``codes`` stand for, float32; scale and zero broadcast to them. Float codes are overwritten."""
        if self.codebook is None:
            return codes.sub_(zero).mul_(scale)
        return levels_of(self.codebook, codes).take(codes).mul_(scale)

    def _expand(self, x: Tensor) -> Tensor:
        return x if x.shape[1] == 1 else x.repeat_interleave(self.group_size, dim=1)


@dataclass(frozen=True)
class Quantized:
    """Weights [O, I] that lie on ``grid``."""

    weight: Tensor
    grid: Grid


def fit_grid(
    weight: Tensor,
    bits: int,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    per_tensor: bool = False,
    clip: bool = False,
    importance: Tensor | None = None,
) -> Grid:
    """The grid that spans ``weight`` [O, I] per group of columns, per output row (the default) or as a whole.

    With ``clip``, each scale is the best of those for a range shrunk by :data:`CLIP_FACTORS`: the one with the smallest
    sum of |w - q(w)|^2.4 (the ``mse`` search of OPTQ's code), or of importance * (w - q(w))^2 where the ``importance``
    [I] of each column is known. So this sum is never larger than without.
    """
    columns = weight.shape[1]
    w = weight.float()
    grouped = w.reshape(1, 1, -1) if per_tensor else w.unflatten(1, (-1, group_size or columns))  # [O, G, size]
    lowest = grouped.amin(-1).clamp(max=0)
    highest = grouped.amax(-1).clamp(min=0)
    grid = _spanning(lowest, highest, bits, symmetric, columns)
    if not clip:
        return grid
    if importance is not None:
        importance = importance.expand_as(w).reshape(grouped.shape) if per_tensor else importance.view_as(grouped[:1])
    factors = torch.tensor((1.0, *CLIP_FACTORS), device=w.device)[:, None, None]  # of equal errors the first one's wins
    trials = _spanning(lowest * factors, highest * factors, bits, symmetric, columns, grid.scale.dtype)
    best = factors.view(-1)[_clip_errors(grouped.contiguous(), trials, importance).argmin(0)]
    return _spanning(lowest * best, highest * best, bits, symmetric, columns, grid.scale.dtype)


def fit_codebook(weight: Tensor, codebook: Codebook, group_size: int | None = None) -> Grid:
    """The grid of a codebook for ``weight`` [O, I]: a scale max|w| for every ``group_size`` columns of a row.

    Scales are exact: float16 only where it holds every one of them, as with weights in float16.
    """
    columns = weight.shape[1]
    scale = weight.float().abs().unflatten(1, (-1, group_size or columns)).amax(-1)
    half = scale.half()
    return Grid(4, half if torch.equal(half.float(), scale) else scale, None, columns, codebook)


def encode(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest codes, uint8 [O, I], in 0 .. 2^bits - 1."""
    return grid.nearest(weight.float(), grid.expanded_scale(), grid.expanded_zero()).to(torch.uint8)


def decode(codes: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights [O, I] that ``codes`` stand for."""
    numbers = codes.to(torch.float32 if grid.codebook is None else torch.int64, copy=True)
    return grid.values(numbers, grid.expanded_scale(), grid.expanded_zero()).to(dtype)


def round_to_grid(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest weights on the grid, in the dtype of ``weight``."""
    return decode(encode(weight, grid), grid, weight.dtype)


def beside(grids: Sequence[Grid]) -> Grid:
    """The grid of a matrix from those of its column groups [O, G], left to right; one dtype of scales for all."""
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    scale, columns = torch.cat(_scales(grids), dim=1), sum(grid.columns for grid in grids)
    return replace(grids[0], scale=scale, zero=torch.cat(zeros, dim=1) if zeros else None, columns=columns)


def stacked(grids: Sequence[Grid], rows: Sequence[int]) -> Grid:
    """The grid of a matrix from those of its row groups, of so many rows each, top to bottom."""
    if len(grids) == 1:
        return grids[0]
    scales = [scale.expand(n, -1) for scale, n in zip(_scales(grids), rows, strict=True)]
    zeros = [grid.zero.expand(n, -1) for grid, n in zip(grids, rows, strict=True) if grid.zero is not None]
    return replace(grids[0], scale=torch.cat(scales), zero=torch.cat(zeros) if zeros else None)


class ColumnGrid:
    """Rounds column by column; the grid may come group by group, as a sweep reaches its groups.

    Args:
        columns: I.
        group_size: columns that share a scale; None for all.
        order: [I], the column that comes up at each turn; None for the columns' own order.
    """

    def __init__(self, columns: int, group_size: int | None, order: Tensor | None = None) -> None:
        group_of = torch.arange(columns) // (group_size or columns)
        self._group_of = (group_of if order is None else group_of[order.cpu()]).tolist()
        self._groups: list[tuple[Grid, Tensor, Tensor | float]] = []

    def add(self, grid: Grid) -> None:
        """Take the groups [O, G] of ``grid`` as the next ones."""
        scales = grid.scale.float().T.contiguous().unbind(0)
        zeros: Sequence[Tensor | float] = [grid.middle] * len(scales)
        if grid.zero is not None:
            zeros = grid.zero.float().T.contiguous().unbind(0)
        self._groups.extend((grid, scale, zero) for scale, zero in zip(scales, zeros, strict=True))

    @property
    def is_uniform(self) -> bool:
        """Whether the levels are the integers; only codebooks' grids are not, and they come at once."""
        return not self._groups or self._groups[0][0].codebook is None

    def uniform(self, first: int, last: int, rows: int) -> tuple[Tensor, Tensor | float, int]:
        """Scales [last - first, rows], zero points likewise or the one zero point, and the highest code of columns."""
        groups = [self._groups[group] for group in self._group_of[first:last]]
        grid, _, origin = groups[0]
        scale = self._of_columns([scale for _, scale, _ in groups], rows)
        zeros = [zero for *_, zero in groups if isinstance(zero, Tensor)]
        return scale, self._of_columns(zeros, rows) if zeros else origin, grid.levels

    @staticmethod
    def _of_columns(rows_of: list[Tensor], rows: int) -> Tensor:
        same = all(row is rows_of[0] for row in rows_of)
        return (rows_of[0][None] if same else torch.stack(rows_of)).expand(len(rows_of), rows)

    def round(self, i: int, column: Tensor) -> Tensor:
        """The nearest points of the grid for the i-th column that comes up, [O]."""
        grid, scale, zero = self._groups[self._group_of[i]]
        return grid.values(grid.nearest(column, scale, zero), scale, zero)


def _scales(grids: Sequence[Grid]) -> list[Tensor]:
    dtype = torch.float32 if any(grid.scale.dtype == torch.float32 for grid in grids) else torch.float16
    return [grid.scale.to(dtype) for grid in grids]


def _spanning(
    lowest: Tensor, highest: Tensor, bits: int, symmetric: bool, columns: int, dtype: torch.dtype | None = None
) -> Grid:
    """The uniform grid from ``lowest`` <= 0 to ``highest`` >= 0 [O, G]; ``dtype`` of the scales if not the shortest."""
    levels = 2**bits - 1
    span = 2 * torch.maximum(highest, -lowest) if symmetric else highest - lowest
    scale = torch.where(span > 0, span / levels, torch.ones_like(span))
    scale = _storable(scale) if dtype is None else scale.to(dtype)
    zero = None if symmetric else (-lowest / scale.float()).round().clamp(0, levels).to(torch.uint8)
    return Grid(bits, scale, zero, columns)


def _clip_errors(grouped: Tensor, trials: Grid, importance: Tensor | None) -> Tensor:
    """The sums that the clipping search looks at, for each group of ``grouped`` [O, G, size]: [T, O, G].

    All scales [T, O, G] of ``trials`` are tried at once, piece by piece of the weights. ``importance`` [1, G, size].
    """
    scale = trials.scale.float()[..., None]
    zero = None if trials.zero is None else trials.zero.float()[..., None]
    most = max(1, (PIECE if scale.device.type == "cpu" else GPU_PIECE) // len(scale))
    if len(grouped) == 1:
        parts = grouped.split(most, dim=-1)
        weights = [None] * len(parts) if importance is None else importance.split(most, dim=-1)
        errors = [_piece_errors(trials, p, scale, zero, i) for p, i in zip(parts, weights, strict=True)]
        return torch.stack(errors).sum(0)
    rows = max(1, most // grouped[0].numel())
    scales, count = scale.split(rows, dim=1), -(-len(grouped) // rows)
    zeros = [None] * count if zero is None else zero.split(rows, dim=1)
    pieces = zip(grouped.split(rows), scales, zeros, strict=True)
    return torch.cat([_piece_errors(trials, *piece, importance) for piece in pieces], dim=1)


def _piece_errors(
    trials: Grid, grouped: Tensor, scale: Tensor, zero: Tensor | None, importance: Tensor | None
) -> Tensor:
    origin = trials.middle if zero is None else zero
    error = trials.values(trials.nearest(grouped, scale, origin), scale, origin).sub_(grouped)
    error = error.abs_().pow_(CLIP_NORM) if importance is None else error.square_().mul_(importance)
    return error.sum(-1)


def _storable(scale: Tensor) -> Tensor:
    fits = bool(scale.min() >= SMALLEST_HALF) and bool(scale.max() <= torch.finfo(torch.float16).max)
    return scale.half() if fits else scale
