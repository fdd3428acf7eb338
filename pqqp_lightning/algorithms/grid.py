"""Uniform quantization grids: every entry is ``scale * (code - zero)`` for an integer code of ``bits`` bits.

Symmetric grids have the 2^b levels -2^(b-1) .. 2^(b-1) - 1 and scale = 2 * max|w| / (2^b - 1); asymmetric ones span
min(w, 0) .. max(w, 0) with an integer zero point (OPTQ, arXiv 2210.17323, and its code). 0 is on every grid, so that
pruned entries stay zero. Scales are kept in float16 where that is precise enough, since they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SMALLEST_HALF = 2.0**-14
"""Below this, float16 loses precision; such scales are kept in float32."""


@dataclass(frozen=True)
class Grid:
    """A quantization grid for a matrix [O, I].

    Attributes:
        bits: 2 to 8.
        scale: [O, G], or [1, 1] for the whole matrix; float16 or float32.
        zero: uint8 [O, G] zero points, or None where the grid is symmetric (zero point ``2**(bits - 1)``).
        columns: I; ``columns / G`` is the group size.
    """

    bits: int
    scale: Tensor
    zero: Tensor | None
    columns: int

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
        return 2.0 ** (self.bits - 1) if self.zero is None else self._expand(self.zero.float())

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


def encode(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest codes, uint8 [O, I], in 0 .. 2^bits - 1."""
    codes = (weight.float() / grid.expanded_scale()).round_().add_(grid.expanded_zero())
    return codes.clamp_(0, grid.levels).to(torch.uint8)


def decode(codes: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights [O, I] that ``codes`` stand for."""
    return (codes.float() - grid.expanded_zero()).mul_(grid.expanded_scale()).to(dtype)


def round_to_grid(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest weights on the grid, in the dtype of ``weight``."""
    return decode(encode(weight, grid), grid, weight.dtype)


def _storable(scale: Tensor) -> Tensor:
    fits = bool(scale.min() >= SMALLEST_HALF) and bool(scale.max() <= torch.finfo(torch.float16).max)
    return scale.half() if fits else scale
