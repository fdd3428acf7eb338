"""The codes of quantized weights as they are, and the same weights in wider codes. No value changes here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pqqp_lightning.algorithms.grid import Grid, encode

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that servers join into one: they need one kind of codes."""


@dataclass(frozen=True)
class Codes:
    """A quantized weight.

    Attributes:
        codes: uint8 [O, I].
        grid: what they stand for.
    """

    codes: Tensor
    grid: Grid

    def in_bits(self, bits: int) -> Codes:
        """The same values in codes of ``bits`` bits: a symmetric grid moves its middle, an asymmetric one stays."""
        if self.grid.zero is not None:
            return Codes(self.codes, replace(self.grid, bits=bits))
        moved = self.codes.to(torch.int16) + (1 << (bits - 1)) - (1 << (self.grid.bits - 1))
        return Codes(moved.to(torch.uint8), replace(self.grid, bits=bits))

    def in_groups(self, groups: int) -> Codes:
        """The same values with ``groups`` groups a row: scales and zero points are repeated."""
        times = groups // self.grid.scale.shape[1]
        scale = self.grid.scale.repeat_interleave(times, dim=1)
        zero = None if self.grid.zero is None else self.grid.zero.repeat_interleave(times, dim=1)
        return Codes(self.codes, replace(self.grid, scale=scale, zero=zero))

    def with_zero_points(self) -> Codes:
        """The same values with explicit zero points."""
        if self.grid.zero is not None:
            return self
        zero = torch.full_like(self.grid.scale, self.grid.middle, dtype=torch.uint8)
        return Codes(self.codes, replace(self.grid, zero=zero))

    def in_rows(self) -> Codes:
        """The same values with scales and zero points for each row."""
        rows = len(self.codes)
        zero = None if self.grid.zero is None else self.grid.zero.expand(rows, -1)
        return Codes(self.codes, replace(self.grid, scale=self.grid.scale.expand(rows, -1), zero=zero))


def codes_of(weight: Tensor, grid: Grid) -> Codes:
    """The codes of a weight [O, I] that lies on ``grid``; exact, since the weight is one of the grid's points."""
    return Codes(encode(weight, grid), grid)


def fused_with(name: str, names: Sequence[str]) -> list[str]:
    """The layers among ``names`` that servers join with ``name``, which is one of them."""
    parent, _, child = name.rpartition(".")
    for group in FUSED:
        if child in group:
            joined = [f"{parent}.{other}" if parent else other for other in group]
            return [other for other in joined if other in names]
    return [name]


def wider_bits(grids: Mapping[str, Grid], allowed: Sequence[int]) -> dict[str, int]:
    """The fewest allowed bits for each layer that hold its codes and those of the layers that it is joined with."""
    bits = {}
    for name in grids:
        needed = max(grids[other].bits for other in fused_with(name, list(grids)))
        bits[name] = min(width for width in allowed if width >= needed)
    return bits
