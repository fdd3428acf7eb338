"""Bit packing: integers at their bit width (least significant bit first), masks as bits, N:M masks as positions."""

from __future__ import annotations

import math
from math import gcd

import torch
from torch import Tensor


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
    if 8 % bits == 0:  # no code crosses a byte: one shift for all
        offsets = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[:, None] >> offsets) & (2**bits - 1)).flatten()[:count]
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


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask of any shape, one bit per entry."""
    return pack_bits(mask.flatten().to(torch.uint8), 1)


def unpack_mask(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the bool mask of ``shape`` that :func:`pack_mask` packed."""
    return unpack_bits(packed, 1, torch.Size(shape).numel()).bool().view(shape)


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
