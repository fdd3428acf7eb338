"""Quantization grids: every entry is a scale times a level, and a code of ``bits`` bits says which level.

Uniform grids: entry = ``scale * (code - zero)``. Symmetric ones have the 2^b levels -2^(b-1) .. 2^(b-1) - 1 and
scale = 2 * max|w| / (2^b - 1); asymmetric ones span min(w, 0) .. max(w, 0) with an integer zero point (OPTQ, arXiv
2210.17323, and its code). Grids with a codebook: entry = ``scale * level[code]``, scale = max|w| (``codebook.py``).
0 is on every grid, so that pruned entries stay zero. Scales are kept in float16 where that is precise enough, since
they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pqqp_lightning.algorithms.codebook import Codebook, bounds_of, levels_of

SMALLEST_HALF = 2.0**-14
"""Below this, float16 loses precision; such scales are kept in float32."""

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
    weight: Tensor, bits: int, *, group_size: int | None = None, symmetric: bool = True, per_tensor: bool = False
) -> Grid:
    """The grid that spans ``weight`` [O, I] per group of columns, per output row (the default) or as a whole."""
    columns = weight.shape[1]
    w = weight.float()
    grouped = w.reshape(1, 1, -1) if per_tensor else w.unflatten(1, (-1, group_size or columns))  # [O, G, size]
    lowest = grouped.amin(-1).clamp(max=0)
    highest = grouped.amax(-1).clamp(min=0)
    levels = 2**bits - 1
    span = 2 * torch.maximum(highest, -lowest) if symmetric else highest - lowest
    scale = _storable(torch.where(span > 0, span / levels, torch.ones_like(span)))
    zero = None if symmetric else (-lowest / scale.float()).round().clamp(0, levels).to(torch.uint8)
    return Grid(bits, scale, zero, columns)


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
        zeros = [grid.middle] * len(scales) if grid.zero is None else grid.zero.float().T.contiguous().unbind(0)
        self._groups.extend((grid, scale, zero) for scale, zero in zip(scales, zeros, strict=True))

    def round(self, i: int, column: Tensor) -> Tensor:
        """The nearest points of the grid for the i-th column that comes up, [O]."""
        grid, scale, zero = self._groups[self._group_of[i]]
        return grid.values(grid.nearest(column, scale, zero), scale, zero)


def _storable(scale: Tensor) -> Tensor:
    fits = bool(scale.min() >= SMALLEST_HALF) and bool(scale.max() <= torch.finfo(torch.float16).max)
    return scale.half() if fits else scale
