"""How each tensor is stored and how many bytes it takes: the size report and the checkpoint both use this module."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from pqqp_lightning.algorithms.packing import packed_bytes, position_bits
from pqqp_lightning.algorithms.selection import Pattern
from pqqp_lightning.network.constraints import Constraints

MaskKind = Literal["bits", "positions"]


@dataclass(frozen=True)
class Encoding:
    """The parts of one stored weight.

    Attributes:
        mask: how the mask is stored: one bit per entry, or the positions of the N kept of every M columns; None if the
            weight has no mask.
        values: bytes of the kept values or codes.
        mask_bytes: bytes of the mask.
        scale: bytes of the scales.
        zero: bytes of the zero points.
    """

    mask: MaskKind | None
    values: int
    mask_bytes: int = 0
    scale: int = 0
    zero: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts together."""
        return self.values + self.mask_bytes + self.scale + self.zero


def encode_weight(constraints: Constraints, bits: int) -> Encoding:
    """Choose the smallest encoding of a weight.

    Args:
        constraints: the constraints of the weight.
        bits: bits of an entry without a grid (32 for float32).
    """
    kept = None if constraints.mask_bits is None else constraints.kept()
    entries = constraints.shape[0] * constraints.shape[1]
    grid = constraints.grid
    if grid is None:
        return encode_numbers(entries, kept, constraints.pattern, bits)
    scale = grid.scale.numel() * grid.scale.element_size()
    zero = 0 if grid.zero is None else packed_bytes(grid.zero.numel(), grid.bits)
    return encode_numbers(entries, kept, constraints.pattern, grid.bits, scale, zero)


def encode_numbers(
    entries: int, kept: int | None, pattern: Pattern | None, bits: float, scale: int = 0, zero: int = 0
) -> Encoding:
    """Choose the smallest encoding from numbers alone.

    Args:
        entries: of the matrix.
        kept: entries that the mask keeps; None without a mask.
        pattern: (N, M) of the mask, if it has one.
        bits: bits of a stored value, which may be an average over several weights.
        scale: bytes of the scales.
        zero: bytes of the zero points.
    """
    if kept is None:
        return Encoding(None, packed_bytes(entries, bits), 0, scale, zero)
    mask: MaskKind = "bits"
    mask_bytes = packed_bytes(entries, 1)
    if pattern is not None:
        n, m = pattern
        position_bytes = packed_bytes(kept, position_bits(m))
        # Positions name N entries of every group, so they describe the mask only if every group keeps exactly N.
        if kept * m == entries * n and position_bytes <= mask_bytes:
            mask = "positions"
            mask_bytes = position_bytes
    return Encoding(mask, packed_bytes(kept, bits), mask_bytes, scale, zero)


def stored_constraints(constraints: Constraints, hidden: bool) -> Constraints:
    """Return the constraints of a stored tensor.

    The original of a parametrized weight (``hidden``, see :func:`~pqqp_lightning.network.layers.stored_weights`) keeps
    the mask, but only the computed weight lies on the grid.
    """
    return replace(constraints, grid=None) if hidden else constraints


def stored_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Collect the model's parameters and persistent buffers, each tensor once.

    Returns:
        (name to tensor, alias to name): the further names of tied weights are aliases.
    """
    first_name: dict[tuple[int, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, held in model.state_dict(keep_vars=True).items():
        tensor = held.detach()
        # Tensors are the same if they view the same memory in the same way. Empty tensors all have address 0.
        key = (tensor.data_ptr(), tensor.storage_offset(), tensor.numel(), *tensor.stride())
        if tensor.is_meta:  # a weightless copy: every tensor has address 0, and a tied one is the same object
            key = (id(held),)
        if tensor.numel() and key in first_name:
            aliases[name] = first_name[key]
        else:
            first_name[key] = name
            tensors[name] = tensor
    return tensors, aliases
