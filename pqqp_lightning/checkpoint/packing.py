"""Packs one weight into parts and unpacks it bit for bit: codes or kept values, mask or positions, scales, zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pqqp_lightning.algorithms.grid import Grid, decode, encode
from pqqp_lightning.algorithms.packing import (
    expand_kept,
    mask_to_positions,
    pack_bits,
    pack_mask,
    position_bits,
    positions_to_slots,
    unpack_bits,
    unpack_mask,
    zero_removed,
)
from pqqp_lightning.checkpoint.encoding import encode_weight
from pqqp_lightning.network.constraints import Constraints
from pqqp_lightning.network.layouts import Layout, as_matrix, as_weight, default_layout


def pack_weight(
    weight: Tensor, constraints: Constraints, layout: Layout | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Pack ``weight`` as its constraints allow.

    Args:
        weight: as the layer holds it.
        constraints: of its matrix.
        layout: how it holds the matrix; by default that of a Linear or a convolution.

    Returns:
        (parts by name, the manifest entry that :func:`unpack_weight` needs).
    """
    layout = layout or default_layout(weight.dim())
    matrix = as_matrix(weight, layout).cpu()
    grid = constraints.grid
    mask = constraints.mask()
    encoding = encode_weight(constraints, 8 * weight.element_size())
    values = matrix if grid is None else encode(matrix, grid)
    parts: dict[str, Tensor] = {}
    if mask is not None:
        values = values[mask]  # in the order of rows, then columns
        if encoding.mask == "positions":
            assert constraints.pattern is not None
            n, m = constraints.pattern
            parts["positions"] = pack_bits(mask_to_positions(mask, n, m), position_bits(m))
        else:
            parts["mask"] = pack_mask(mask)
    parts["values"] = values.flatten() if grid is None else pack_bits(values, grid.bits)
    if grid is not None:
        parts["scale"] = grid.scale
        if grid.zero is not None:
            parts["zero"] = pack_bits(grid.zero, grid.bits)
    entry = {
        "shape": list(weight.shape),
        "matrix": list(constraints.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "pattern": None if constraints.pattern is None else list(constraints.pattern),
        "bits": None if grid is None else grid.bits,
    }
    if grid is not None and grid.codebook is not None:
        entry["codebook"] = grid.codebook
    if layout != default_layout(weight.dim()):
        entry["layout"] = layout
    return parts, entry


def unpack_weight(entry: dict[str, Any], parts: dict[str, Tensor]) -> tuple[Tensor, Constraints]:
    """Rebuild a weight and its constraints from the results of :func:`pack_weight`."""
    mask = _unpack_mask(entry, parts)
    bits = parts.get("mask")
    if mask is not None and bits is None:
        bits = pack_mask(mask)
    rows, columns = entry["matrix"]
    pattern = None if entry["pattern"] is None else (entry["pattern"][0], entry["pattern"][1])
    return _unpack_values(entry, parts, mask), Constraints((rows, columns), bits, pattern, _unpack_grid(entry, parts))


def unpack_values(entry: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    """Rebuild a weight, without its constraints, on the device of ``parts``."""
    return _unpack_values(entry, parts, _unpack_mask(entry, parts))


def _unpack_values(entry: dict[str, Any], parts: dict[str, Tensor], mask: Tensor | None) -> Tensor:
    rows, columns = entry["matrix"]
    grid = _unpack_grid(entry, parts)
    values = parts["values"]
    if grid is not None:
        # An upper limit where a mask removes entries: padding codes at the end are never read.
        count = min(rows * columns, 8 * values.numel() // grid.bits)
        values = unpack_bits(values, grid.bits, count)
    # Code 0 does not decode to 0. The zero point does, which is one number in a symmetric grid.
    symmetric = grid is not None and grid.zero is None and grid.codebook is None
    fill = int(grid.middle) if grid is not None and symmetric else 0
    matrix = values.view(rows, columns) if mask is None else expand_kept(values, mask, fill)
    if grid is not None:
        matrix = decode(matrix, grid, getattr(torch, entry["dtype"]))
        if mask is not None and not symmetric:
            matrix = zero_removed(matrix, mask)
    return as_weight(matrix, entry["shape"], entry.get("layout", default_layout(len(entry["shape"]))))


def _unpack_grid(entry: dict[str, Any], parts: dict[str, Tensor]) -> Grid | None:
    if entry["bits"] is None:
        return None
    scale = parts["scale"]
    zero = None
    if "zero" in parts:
        zero = unpack_bits(parts["zero"], entry["bits"], scale.numel()).view(scale.shape)
    return Grid(entry["bits"], scale, zero, entry["matrix"][1], entry.get("codebook"))


def _unpack_mask(entry: dict[str, Any], parts: dict[str, Tensor]) -> Tensor | None:
    rows, columns = entry["matrix"]
    if "mask" in parts:
        return unpack_mask(parts["mask"], (rows, columns))
    if "positions" not in parts:
        return None
    n, m = entry["pattern"]
    groups = rows * columns // m
    positions = unpack_bits(parts["positions"], position_bits(m), groups * n).view(groups, n)
    return positions_to_slots(positions, m).view(rows, columns)
