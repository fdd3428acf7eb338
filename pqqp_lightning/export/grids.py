"""The grids of quantized weights, rewritten as a format needs them. The weights stay the points that they are.

Codes follow from a weight and its grid (``encode``), exactly, since the weight is one of the grid's points. A grid with
more bits, smaller groups or explicit zero points has all the points of the old one, so that no value changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from pqqp_lightning.algorithms.grid import Grid

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers that servers join into one, by its name: they need one kind of codes."""


def in_groups(grid: Grid, groups: int) -> Grid:
    """The grid with ``groups`` groups a row: scales and zero points are repeated."""
    times = groups // grid.scale.shape[1]
    zero = None if grid.zero is None else grid.zero.repeat_interleave(times, dim=1)
    return replace(grid, scale=grid.scale.repeat_interleave(times, dim=1), zero=zero)


def with_zero_points(grid: Grid) -> Grid:
    """The grid with explicit zero points."""
    if grid.zero is not None:
        return grid
    return replace(grid, zero=torch.full_like(grid.scale, grid.middle, dtype=torch.uint8))


def in_rows(grid: Grid, rows: int) -> Grid:
    """The grid with scales and zero points for each of ``rows`` rows."""
    zero = None if grid.zero is None else grid.zero.expand(rows, -1)
    return replace(grid, scale=grid.scale.expand(rows, -1), zero=zero)


def fused_with(name: str, names: Sequence[str]) -> list[str]:
    """The layers among ``names`` that servers join with ``name``, which is one of them."""
    parent, _, child = name.rpartition(".")
    for group in FUSED.values():
        if child in group:
            joined = [f"{parent}.{other}" if parent else other for other in group]
            return [other for other in joined if other in names]
    return [name]


def half_joined(grids: Mapping[str, Grid], linear: Sequence[str]) -> list[str]:
    """The dense layers among ``linear`` that servers join with quantized ones."""
    return [name for name in linear if name not in grids and any(n in grids for n in fused_with(name, linear))]


def wider_bits(grids: Mapping[str, Grid], allowed: Sequence[int]) -> dict[str, int]:
    """The fewest allowed bits for each layer that hold its codes and those of the layers that it is joined with."""
    names = list(grids)
    bits = {}
    for name in names:
        needed = max(grids[other].bits for other in fused_with(name, names))
        bits[name] = min(width for width in allowed if width >= needed)
    return bits
