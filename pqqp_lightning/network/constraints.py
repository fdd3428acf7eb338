"""The constraints of a compressed weight: a mask and a grid, attached to its layer and verified exactly.

Masks are stored as bits (1/32 of a float32 weight), grids as scales and zero points; the codes follow from the weight.
Constraints are copied with the module (``copy.deepcopy``, pickling) but are not part of its state dict.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pqqp_lightning.algorithms.grid import Grid, round_to_grid
from pqqp_lightning.algorithms.packing import pack_mask, unpack_mask
from pqqp_lightning.algorithms.selection import Pattern
from pqqp_lightning.network.layers import Layer, matrix_shape, named_layers, weight_matrix

_ATTRIBUTE = "_pqqp_constraints"


@dataclass(frozen=True)
class Constraints:
    """The constraints of one weight matrix [O, I].

    Attributes:
        shape: (O, I).
        mask_bits: the packed keep-mask, or None.
        pattern: (N, M) if the mask keeps at most N of every M columns, else None.
        grid: the quantization grid, or None.
    """

    shape: tuple[int, int]
    mask_bits: Tensor | None = None
    pattern: Pattern | None = None
    grid: Grid | None = None

    def mask(self, device: torch.device | None = None) -> Tensor | None:
        """Return the keep-mask, bool [O, I], or None."""
        return None if self.mask_bits is None else unpack_mask(self.mask_bits.to(device), self.shape)

    def has(self, promise: str) -> bool:
        """Whether there is a "mask" or a "grid"."""
        return (self.mask_bits if promise == "mask" else self.grid) is not None

    def with_mask(self, mask: Tensor, pattern: Pattern | None = None) -> Constraints:
        """Return these constraints with a new mask, which must keep nothing that the earlier one removes.

        An earlier N:M pattern therefore still holds.
        """
        return replace(self, mask_bits=pack_mask(mask).cpu(), pattern=pattern or self.pattern)

    def with_grid(self, grid: Grid) -> Constraints:
        """Return these constraints with ``grid`` instead of an earlier one."""
        return replace(self, grid=grid.to(torch.device("cpu")))

    def select(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Constraints:
        """Return the constraints of a matrix that keeps only these rows and columns.

        Removing columns drops an N:M pattern, since its groups of M columns no longer exist.

        Args:
            rows: indices of the kept rows, or None for all.
            columns: indices of the kept matrix columns, or None for all.

        Raises:
            ValueError: columns are removed from a grid with groups of columns.
        """
        height, width = self.shape
        mask = self.mask()
        if rows is not None:
            height = len(rows)
            mask = None if mask is None else mask[rows.cpu()]
        if columns is not None:
            width = len(columns)
            mask = None if mask is None else mask[:, columns.cpu()]
        pattern = self.pattern if columns is None else None
        grid = None if self.grid is None else _select_grid(self.grid, rows, columns)
        return Constraints((height, width), None if mask is None else pack_mask(mask), pattern, grid)

    def kept(self) -> int:
        """Count the entries that the mask keeps."""
        entries = self.shape[0] * self.shape[1]
        return entries if self.mask_bits is None else int(unpack_mask(self.mask_bits, self.shape).sum())

    def without_broken(self, matrix: Tensor, earlier: Constraints) -> Constraints:
        """Drop the parts that come from ``earlier`` and that ``matrix`` [O, I] violates."""
        if tuple(matrix.shape) != self.shape:
            return Constraints((matrix.shape[0], matrix.shape[1]))
        remaining = self
        # "is" tells parts that a stage set itself, which must hold, from those that it inherited.
        if remaining.mask_bits is earlier.mask_bits and replace(remaining, grid=None).violations(matrix):
            remaining = replace(remaining, mask_bits=None, pattern=None)
        mask = remaining.mask()
        if remaining.pattern is not None and remaining.pattern == earlier.pattern and mask is not None:
            remaining = remaining if _fits(mask, remaining.pattern) else replace(remaining, pattern=None)
        if remaining.grid is earlier.grid and replace(remaining, mask_bits=None).violations(matrix):
            remaining = replace(remaining, grid=None)
        return remaining

    def violations(self, matrix: Tensor) -> list[str]:
        """Describe how ``matrix`` [O, I] violates the constraints, exactly; empty if it keeps them."""
        if tuple(matrix.shape) != self.shape:
            return [f"its shape is {tuple(matrix.shape)} instead of {self.shape}"]
        violations = []
        if not bool(torch.isfinite(matrix).all()):
            violations.append("it holds NaN or infinite values")
        mask = self.mask(matrix.device)
        if mask is not None:
            nonzero = int((matrix[~mask] != 0).sum())
            if nonzero:
                violations.append(f"{nonzero} pruned entries are not zero any more")
            if self.pattern is not None and not _fits(mask, self.pattern):
                violations.append(f"its mask is not {self.pattern[0]}:{self.pattern[1]}")
        if self.grid is not None:
            # Exact equality: a grid's values are decoded the same way everywhere, so that no tolerance is needed.
            off = int((round_to_grid(matrix, self.grid.to(matrix.device)) != matrix).sum())
            if off:
                violations.append(f"{off} entries are off the {self.grid.bits}-bit grid")
        return violations


def constraints_of(layer: Layer) -> Constraints:
    """Return the constraints of ``layer``'s weight; without mask and grid for a layer that was never compressed."""
    constraints = getattr(layer, _ATTRIBUTE, None)
    return constraints if constraints is not None else Constraints(matrix_shape(layer))


def is_constrained(layer: Layer) -> bool:
    """Whether ``layer`` carries constraints, which may be without mask and grid."""
    return layer.__dict__.get(_ATTRIBUTE) is not None


def set_constraints(layer: Layer | nn.Module, constraints: Constraints | None) -> None:
    """Attach constraints to a layer, or remove them."""
    layer.__dict__[_ATTRIBUTE] = constraints


def constrained_layers(model: nn.Module) -> Iterator[tuple[str, Layer, Constraints]]:
    """Yield (name, layer, constraints) of every layer that carries constraints."""
    for name, layer in named_layers(model):
        if is_constrained(layer):
            yield name, layer, constraints_of(layer)


def collect_constraints(model: nn.Module) -> dict[str, Constraints]:
    """Return the current constraints of every layer by name."""
    return {name: constraints for name, _, constraints in constrained_layers(model)}


def broken_constraints(model: nn.Module, promised: dict[str, Constraints]) -> dict[str, list[str]]:
    """Find the constraints of ``promised`` that the model's weights violate: layer name to descriptions."""
    broken = {}
    layers = dict(named_layers(model))
    for name, constraints in promised.items():
        layer = layers.get(name)
        if layer is None:
            broken[name] = ["the layer is gone"]
            continue
        violations = constraints.violations(weight_matrix(layer))
        if violations:
            broken[name] = violations
    return broken


@dataclass(frozen=True)
class Promise:
    """The constraints of one layer before a stage. The stage may rename the layer, so the layer itself is held."""

    name: str
    layer: Layer
    constraints: Constraints


def collect_promises(model: nn.Module) -> list[Promise]:
    """Return the current constraints of every layer with the layer itself."""
    return [Promise(name, layer, constraints) for name, layer, constraints in constrained_layers(model)]


def broken_promises(model: nn.Module, promises: Iterable[Promise]) -> list[tuple[Promise, list[str]]]:
    """Find the promises that the model violates, and describe how.

    A layer that was removed from the model has no constraints to keep. A layer whose shape changed must carry
    constraints of the new shape, as :meth:`Constraints.select` returns them. A grid that differs from the promised one
    in its scales alone replaces it: the weight is verified on the new grid.
    """
    present = {id(layer) for _, layer in named_layers(model)}
    broken = []
    for promise in promises:
        if id(promise.layer) not in present:
            continue
        matrix = weight_matrix(promise.layer)
        promised = promise.constraints
        if tuple(matrix.shape) == promised.shape:
            grid = constraints_of(promise.layer).grid
            if grid is not None and promised.grid is not None and grid.is_like(promised.grid):
                promised = replace(promised, grid=grid)  # a stage may move the scales: the bits are what was promised
            violations = promised.violations(matrix)
        else:
            current = constraints_of(promise.layer)
            violations = []
            if promised.mask_bits is not None and current.mask_bits is None:
                violations.append("its mask is gone")
            if promised.grid is not None and current.grid is None:
                violations.append("its grid is gone")
        if violations:
            broken.append((promise, violations))
    return broken


def _select_grid(grid: Grid, rows: Tensor | None, columns: Tensor | None) -> Grid:
    if columns is not None and grid.scale.shape[1] > 1:
        raise ValueError(f"its grid has groups of {grid.group_size} columns, which cannot be cut")
    if rows is not None and grid.scale.shape[0] > 1:
        rows = rows.cpu()
        grid = replace(grid, scale=grid.scale[rows], zero=None if grid.zero is None else grid.zero[rows])
    return grid if columns is None else replace(grid, columns=len(columns))


def _fits(mask: Tensor, pattern: Pattern) -> bool:
    """Whether ``mask`` [O, I] keeps at most N of every M columns."""
    kept, size = pattern
    return bool((mask.unflatten(1, (-1, size)).sum(-1) <= kept).all())
