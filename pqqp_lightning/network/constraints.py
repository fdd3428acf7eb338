"""What a compressed weight has promised: a mask and a grid, kept with its layer and verified exactly.

Masks are held as bits (1/32 of a float32 weight), grids as scales and zero points; the codes follow from the weight.
Constraints travel with the module (``copy.deepcopy``, pickling), outside its state dict.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pqqp_lightning.algorithms.grid import Grid, round_to_grid
from pqqp_lightning.algorithms.packing import pack_mask, unpack_mask
from pqqp_lightning.algorithms.selection import Pattern
from pqqp_lightning.network.layers import LAYER_TYPES, Layer, columns_of, weight_matrix

_ATTRIBUTE = "_pqqp_constraints"


@dataclass(frozen=True)
class Constraints:
    """The constraints of one weight matrix [O, I].

    Attributes:
        shape: (O, I).
        mask_bits: the packed keep-mask, or None.
        pattern: (N, M) where the mask keeps at most N of every M columns.
        grid: the quantization grid, or None.
    """

    shape: tuple[int, int]
    mask_bits: Tensor | None = None
    pattern: Pattern | None = None
    grid: Grid | None = None

    def mask(self, device: torch.device | None = None) -> Tensor | None:
        """The keep-mask, bool [O, I], or None."""
        return None if self.mask_bits is None else unpack_mask(self.mask_bits.to(device), self.shape)

    def with_mask(self, mask: Tensor, pattern: Pattern | None = None) -> Constraints:
        """Also this mask (within the earlier one); an earlier N:M pattern still holds."""
        return replace(self, mask_bits=pack_mask(mask).cpu(), pattern=pattern or self.pattern)

    def with_grid(self, grid: Grid) -> Constraints:
        """This grid in place of an earlier one."""
        return replace(self, grid=grid.to(torch.device("cpu")))

    def select(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Constraints:
        """The constraints of the matrix that keeps these rows and columns alone; an N:M pattern goes with its columns.

        Args:
            rows: indices of the rows kept, or None for all.
            columns: indices of the matrix's columns kept, or None for all.

        Raises:
            ValueError: the grid has groups of columns, which cannot be cut.
        """
        mask = self.mask()
        mask = mask if mask is None or rows is None else mask[rows.cpu()]
        mask = mask if mask is None or columns is None else mask[:, columns.cpu()]
        shape = self.shape[0] if rows is None else len(rows), self.shape[1] if columns is None else len(columns)
        pattern = self.pattern if columns is None else None
        grid = None if self.grid is None else _select_grid(self.grid, rows, columns)
        return Constraints(shape, None if mask is None else pack_mask(mask), pattern, grid)

    def kept(self) -> int:
        """Entries that the mask keeps."""
        entries = self.shape[0] * self.shape[1]
        return entries if self.mask_bits is None else int(unpack_mask(self.mask_bits, self.shape).sum())

    def without_broken(self, matrix: Tensor, earlier: Constraints) -> Constraints:
        """Without those parts of ``earlier`` that are still promised here but that ``matrix`` [O, I] breaks."""
        if tuple(matrix.shape) != self.shape:
            return Constraints((matrix.shape[0], matrix.shape[1]))
        left = self
        if left.mask_bits is earlier.mask_bits and replace(left, grid=None).violations(matrix):
            left = replace(left, mask_bits=None, pattern=None)
        mask = left.mask()
        if left.pattern is not None and left.pattern == earlier.pattern and mask is not None:
            left = left if _fits(mask, left.pattern) else replace(left, pattern=None)
        if left.grid is earlier.grid and replace(left, mask_bits=None).violations(matrix):
            left = replace(left, grid=None)
        return left

    def violations(self, matrix: Tensor) -> list[str]:
        """How ``matrix`` [O, I] breaks the constraints, exactly; empty if it does not."""
        found = []
        if tuple(matrix.shape) != self.shape:
            return [f"its shape is {tuple(matrix.shape)} instead of {self.shape}"]
        if not bool(torch.isfinite(matrix).all()):
            found.append("it holds NaN or infinite values")
        mask = self.mask(matrix.device)
        if mask is not None:
            revived = int((matrix[~mask] != 0).sum())
            if revived:
                found.append(f"{revived} pruned entries are not zero any more")
            if self.pattern is not None and not _fits(mask, self.pattern):
                found.append(f"its mask is not {self.pattern[0]}:{self.pattern[1]}")
        if self.grid is not None:
            off = int((round_to_grid(matrix, self.grid.to(matrix.device)) != matrix).sum())
            if off:
                found.append(f"{off} entries are off the {self.grid.bits}-bit grid")
        return found


def constraints_of(layer: Layer) -> Constraints:
    """The constraints that ``layer``'s weight carries (none at first)."""
    found = getattr(layer, _ATTRIBUTE, None)
    return found if found is not None else Constraints((layer.weight.shape[0], columns_of(layer)))


def set_constraints(layer: nn.Module, constraints: Constraints | None) -> None:
    """Attach constraints to a layer, or take them away."""
    layer.__dict__[_ATTRIBUTE] = constraints


def constrained_layers(model: nn.Module) -> Iterator[tuple[str, Layer, Constraints]]:
    """(name, layer, constraints) of every layer that carries a mask or a grid."""
    for name, module in model.named_modules():
        found = module.__dict__.get(_ATTRIBUTE)
        if found is not None and isinstance(module, LAYER_TYPES):
            yield name, module, found


def collect_constraints(model: nn.Module) -> dict[str, Constraints]:
    """Every layer's constraints by name, as they are now."""
    return {name: constraints for name, _, constraints in constrained_layers(model)}


def broken_constraints(model: nn.Module, promised: dict[str, Constraints]) -> dict[str, list[str]]:
    """Which promises of ``promised`` the model's weights break: layer name to what is wrong."""
    broken = {}
    modules = dict(model.named_modules())
    for name, constraints in promised.items():
        layer = modules.get(name)
        if not isinstance(layer, LAYER_TYPES):
            broken[name] = ["the layer is gone"]
        elif found := constraints.violations(weight_matrix(layer)):
            broken[name] = found
    return broken


@dataclass(frozen=True)
class Promise:
    """What one layer, by whatever name, promised before a stage."""

    name: str
    layer: Layer
    constraints: Constraints


def collect_promises(model: nn.Module) -> list[Promise]:
    """The constraints of every layer as they are now, tied to the layers themselves: a stage may rename them."""
    return [Promise(*found) for found in constrained_layers(model)]


def broken_promises(model: nn.Module, promises: list[Promise]) -> list[tuple[Promise, list[str]]]:
    """Which promises the model breaks, and how. A layer that is gone as a whole has nothing left to keep.

    A layer of another shape must carry constraints of that shape, as :meth:`Constraints.select` makes them.
    """
    present = {id(module) for module in model.modules()}
    broken = []
    for promise in promises:
        if id(promise.layer) not in present:
            continue
        matrix, promised = weight_matrix(promise.layer), promise.constraints
        if tuple(matrix.shape) == promised.shape:
            found = promised.violations(matrix)
        else:
            now = constraints_of(promise.layer)
            lost = {"mask": (promised.mask_bits, now.mask_bits), "grid": (promised.grid, now.grid)}
            found = [
                f"its {what} is gone" for what, (then, after) in lost.items() if then is not None and after is None
            ]
        if found:
            broken.append((promise, found))
    return broken


def _select_grid(grid: Grid, rows: Tensor | None, columns: Tensor | None) -> Grid:
    if columns is not None and grid.scale.shape[1] > 1:
        raise ValueError(f"its grid has groups of {grid.group_size} columns, which cannot be cut")
    if rows is not None and grid.scale.shape[0] > 1:
        rows = rows.cpu()
        grid = replace(grid, scale=grid.scale[rows], zero=None if grid.zero is None else grid.zero[rows])
    return grid if columns is None else replace(grid, columns=len(columns))


def _fits(mask: Tensor, pattern: Pattern) -> bool:
    kept, size = pattern
    return bool((mask.unflatten(1, (-1, size)).sum(-1) <= kept).all())
