"""Bit packing: integers at their bit width (least significant bit first), masks as bits, N:M masks as positions."""

from __future__ import annotations

import math
from functools import cache
from math import gcd

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type of as many bytes."""


def packed_bytes(count: int, bits: float) -> int:
    """Return the bytes that ``count`` integers of ``bits`` bits, or of so many on average, take."""
    return math.ceil(count * bits / 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 ``codes`` [n] below 2^bits into a uint8 tensor of ``ceil(n * bits / 8)`` bytes."""
    count = codes.numel()
    lanes = 8 // gcd(bits, 8)  # the fewest codes that fill whole bytes: packed together, all groups at once
    groups = -(-count // lanes)
    padded = torch.zeros(groups * lanes, dtype=torch.uint8, device=codes.device)
    padded[:count] = codes.flatten()
    source = padded.view(groups, lanes)
    packed = torch.zeros(groups, lanes * bits // 8, dtype=torch.uint8, device=codes.device)
    for lane in range(lanes):
        byte, offset = divmod(lane * bits, 8)
        packed[:, byte] |= source[:, lane] << offset
        if offset + bits > 8:  # the code continues in the next byte
            packed[:, byte + 1] |= source[:, lane] >> (8 - offset)
    return packed.flatten()[: packed_bytes(count, bits)]


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the ``count`` codes (uint8) that :func:`pack_bits` packed."""
    if 8 % bits == 0:  # no code crosses a byte: look up all codes of a byte at once
        return _codes_of_bytes(bits, packed.device).index_select(0, packed.int()).view(torch.uint8)[:count]
    groups = (count + 7) // 8
    padded = torch.zeros(groups * bits, dtype=torch.uint8, device=packed.device)
    padded[: packed.numel()] = packed
    source = padded.view(groups, bits)
    lanes = torch.empty(groups, 8, dtype=torch.uint8, device=packed.device)
    for lane in range(8):
        byte, offset = divmod(lane * bits, 8)
        value = source[:, byte] >> offset
        if offset + bits > 8:
            value = value | (source[:, byte + 1] << (8 - offset))
        lanes[:, lane] = value & (2**bits - 1)
    return lanes.flatten()[:count]


@cache
@torch.inference_mode(False)  # the cached tensor outlives this call
def _codes_of_bytes(bits: int, device: torch.device) -> Tensor:
    """The codes in each of the 256 bytes, [256]: an entry is one integer, whose bytes are the 8 / bits codes."""
    offsets = torch.arange(0, 8, bits, device="cpu")
    codes = (torch.arange(256, device="cpu")[:, None] >> offsets) & (2**bits - 1)  # [256, codes in a byte]
    return codes.to(torch.uint8).contiguous().view(_INTEGERS[8 // bits]).flatten().to(device)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask of any shape, one bit per entry."""
    return pack_bits(mask.flatten().to(torch.uint8), 1)


def unpack_mask(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the bool mask of ``shape`` that :func:`pack_mask` packed."""
    return unpack_bits(packed, 1, torch.Size(shape).numel()).bool().view(shape)


def expand_kept(values: Tensor, mask: Tensor, fill: int = 0) -> Tensor:
    """Return the matrix [O, I] that holds ``values`` [n], in order, where ``mask`` [O, I] is True, else ``fill``.

    Boolean indexing would branch at every entry, which takes ten times as long on a CPU.
    """
    if values.numel() == 0:
        return values.new_full(mask.shape, fill)
    counter = torch.int32 if mask.numel() < 2**31 else torch.int64
    position = mask.flatten().cumsum(0, dtype=counter).sub_(1).clamp_(min=0)  # of each entry's value, if it has one
    kept = zero_removed(values.index_select(0, position).view(mask.shape), mask)
    return kept.add_(mask.logical_not().to(kept.dtype), alpha=fill) if fill else kept


def zero_removed(matrix: Tensor, mask: Tensor) -> Tensor:
    """Return ``matrix`` with zeros where ``mask`` is False, whatever it held there, NaN included."""
    integer = _INTEGERS[matrix.element_size()]
    every_bit = mask.view(torch.uint8).to(integer).neg()  # 0 or -1: no bits or all bits
    return matrix.view(integer).bitwise_and(every_bit).view(matrix.dtype)


def position_bits(size: int) -> int:
    """Return the bits that a position among ``size`` columns takes (2 for N:4)."""
    return max(1, (size - 1).bit_length())


def mask_to_positions(mask: Tensor, kept: int, size: int) -> Tensor:
    """Return the positions (uint8 [groups, kept]) of the kept entries in every ``size`` columns of ``mask`` [O, I].

    Every group gets exactly ``kept`` positions: if it keeps fewer entries, its first removed ones fill up. These hold
    zeros.
    """
    grouped = mask.reshape(-1, size).to(torch.uint8)
    chosen = grouped.argsort(dim=-1, descending=True, stable=True)[:, :kept]
    return chosen.sort(dim=-1).values.to(torch.uint8)


def positions_to_slots(positions: Tensor, size: int) -> Tensor:
    """Return bool [groups, size], True at the ``positions`` [groups, kept]."""
    slots = torch.zeros(positions.shape[0], size, dtype=torch.bool, device=positions.device)
    return slots.scatter_(1, positions.long(), True)
