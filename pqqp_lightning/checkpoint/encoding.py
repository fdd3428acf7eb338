"""How each tensor is stored, and so how many bytes it counts: one answer for the size report and the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from pqqp_lightning.algorithms.packing import packed_bytes, position_bits
from pqqp_lightning.network.constraints import Constraints

MaskKind = Literal["bits", "positions"]
_HIDDEN = ".parametrizations.weight.original"


@dataclass(frozen=True)
class Encoding:
    """The parts of one stored weight.

    Attributes:
        mask: how the mask is stored: one bit an entry, or the positions of the N kept of every M columns.
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
        """Bytes in all."""
        return self.values + self.mask_bytes + self.scale + self.zero


def encode_weight(constraints: Constraints, bits: int) -> Encoding:
    """The smallest encoding of a weight under ``constraints``.

    Args:
        constraints: what the weight obeys.
        bits: bits of an entry where there is no grid (32 for float32).
    """
    entries = constraints.shape[0] * constraints.shape[1]
    grid = constraints.grid
    kept, mask, mask_bytes = entries, None, 0
    if constraints.mask_bits is not None:
        kept = constraints.kept()
        mask, mask_bytes = _mask_encoding(constraints, entries, kept)
    scale = 0 if grid is None else grid.scale.numel() * grid.scale.element_size()
    zero = 0 if grid is None or grid.zero is None else packed_bytes(grid.zero.numel(), grid.bits)
    values = packed_bytes(kept, bits if grid is None else grid.bits)
    return Encoding(mask, values, mask_bytes, scale, zero)


def _mask_encoding(constraints: Constraints, entries: int, kept: int) -> tuple[MaskKind, int]:
    as_bits = packed_bytes(entries, 1)
    if constraints.pattern is not None:
        n, m = constraints.pattern
        positions = packed_bytes(kept, position_bits(m))
        if kept * m == entries * n and positions <= as_bits:
            return "positions", positions
    return "bits", as_bits


def weight_owner(name: str) -> tuple[str, bool]:
    """The layer that a stored tensor would be the weight of, and whether it is the hidden original of a weight that
    is computed (``torch.nn.utils.parametrize``): its mask holds for that too, its grid does not yet."""
    hidden = name.removesuffix(_HIDDEN)
    return (hidden, True) if hidden != name else (name.removesuffix(".weight"), False)


def stored_constraints(constraints: Constraints, hidden: bool) -> Constraints:
    """What a stored weight obeys, see :func:`weight_owner`."""
    return replace(constraints, grid=None) if hidden else constraints


def stored_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model's parameters and persistent buffers once each, and the names of others that share them.

    Returns:
        (name to tensor, alias to name): tied weights appear in the second.
    """
    first: dict[tuple[int, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor = tensor.detach()
        key = (tensor.data_ptr(), tensor.storage_offset(), tensor.numel(), *tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor
    return tensors, aliases
