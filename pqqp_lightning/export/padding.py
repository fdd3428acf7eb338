"""Zeros in place of what was removed unevenly, so that a weight gets the shape that a format needs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from pqqp_lightning.algorithms.grid import Grid
from pqqp_lightning.surgery.removal import Removed


def differing_names(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The names that only one of the two has, and those of different shapes."""
    names = sorted(weights.keys() ^ expected.keys())
    return names + [name for name in weights if name in expected and weights[name].shape != expected[name].shape]


def can_fill(network: nn.Module, weights: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether zeros can take the place of all that is missing: removed sublayers, and narrower Linear layers."""
    removed = [name for name, module in network.named_modules() if isinstance(module, Removed | nn.Identity)]
    for name in differing_names(weights, expected):
        owner = name.rpartition(".")[0]
        if name not in expected:
            return False
        if name not in weights:
            if not any(name.startswith(f"{part}.") for part in removed):
                return False
        elif not (isinstance(_submodule(network, owner), nn.Linear) and _fits(weights[name], expected[name])):
            return False
    return True


def _fits(weight: Tensor, target: Tensor) -> bool:
    """Whether ``weight`` is nowhere larger than ``target``."""
    return all(have <= want for have, want in zip(weight.shape, target.shape, strict=True))


def _submodule(network: nn.Module, name: str) -> nn.Module | None:
    try:
        return network.get_submodule(name)
    except AttributeError:
        return None


def fill_with_zeros(weights: dict[str, Tensor], grids: dict[str, Grid], expected: dict[str, Tensor]) -> list[str]:
    """Append zeros to narrow weights, and write zeros for removed ones.

    This is exact: a row of zeros computes 0, which SiLU, GELU and ReLU keep, and a column of zeros ignores it. Heads
    that were removed come last, so that each key head keeps its query heads.

    Args:
        weights: all weights by name; changed.
        grids: of quantized layers by layer; changed. A layer whose grid cannot take the zeros loses it.
        expected: tensors of the shapes to reach.

    Returns:
        The names of the weights that got zeros.
    """
    dtype = next(iter(weights.values())).dtype
    filled = []
    for name, target in expected.items():
        weight = weights.get(name)
        if weight is not None and weight.shape == target.shape:
            continue
        filled.append(name)
        padded = torch.zeros(target.shape, dtype=dtype if weight is None else weight.dtype)
        if weight is not None:
            padded[tuple(slice(size) for size in weight.shape)] = weight
        weights[name] = padded
        layer = name.removesuffix(".weight")
        if layer in grids and name.endswith(".weight"):
            grid = _padded_grid(grids.pop(layer), weight, padded)
            if grid is not None:
                grids[layer] = grid
    return filled


def _padded_grid(grid: Grid, weight: Tensor | None, padded: Tensor) -> Grid | None:
    """The grid with rows and groups for the zeros; None if the added columns are not whole groups."""
    assert weight is not None
    rows, columns = padded.shape
    added = columns - grid.columns
    scale = grid.scale.expand(len(weight), -1)
    zero = None if grid.zero is None else grid.zero.expand(len(weight), -1)
    grouped = scale.shape[1] > 1
    if grouped and added % grid.group_size:
        return None
    groups = scale.shape[1] + (added // grid.group_size if grouped else 0)
    filled_zero = None if zero is None else _filled(zero, rows, groups)
    return replace(grid, scale=_filled(scale, rows, groups), zero=filled_zero, columns=columns)


def _filled(values: Tensor, rows: int, groups: int) -> Tensor:
    """``values`` [O, G] in the corner of ones [rows, groups]: 0 is on a grid of any scale and zero point."""
    larger = values.new_ones(rows, groups)
    larger[: values.shape[0], : values.shape[1]] = values
    return larger
