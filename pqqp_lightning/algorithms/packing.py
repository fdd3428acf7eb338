"""Integers packed at their bit width, least significant bit first; masks as bits; N:M masks as positions."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` integers of ``bits`` bits take."""
    return (count * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 ``codes`` [n] below 2^bits into a uint8 tensor of ``ceil(n * bits / 8)`` bytes."""
    count, lanes = codes.numel(), 8 // gcd(bits, 8)  # so many codes fill whole bytes
    groups = -(-count // lanes)
    padded = torch.zeros(groups * lanes, dtype=torch.uint8, device=codes.device)
    padded[:count] = codes.flatten()
    source = padded.view(groups, lanes)
    packed = torch.zeros(groups, lanes * bits // 8, dtype=torch.uint8, device=codes.device)
    for lane in range(lanes):
        byte, offset = divmod(lane * bits, 8)
        packed[:, byte] |= source[:, lane] << offset
        if offset + bits > 8:
            packed[:, byte + 1] |= source[:, lane] >> (8 - offset)
    return packed.flatten()[: packed_bytes(count, bits)]


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The ``count`` codes (uint8) that :func:`pack_bits` packed."""
    if 8 % bits == 0:
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
    """A bool mask of any shape as bits."""
    return pack_bits(mask.flatten().to(torch.uint8), 1)


def unpack_mask(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The bool mask of ``shape`` that :func:`pack_mask` packed."""
    return unpack_bits(packed, 1, torch.Size(shape).numel()).bool().view(shape)


def position_bits(size: int) -> int:
    """Bits of a position among ``size`` columns (2 for N:4)."""
    return max(1, (size - 1).bit_length())


def mask_to_positions(mask: Tensor, kept: int, size: int) -> Tensor:
    """Positions (uint8 [groups, kept]) of exactly ``kept`` slots of every ``size`` columns of ``mask`` [O, I].

    Where a group keeps fewer than ``kept``, its first empty slots fill up: they hold zeros.
    """
    grouped = mask.reshape(-1, size).to(torch.uint8)
    chosen = grouped.argsort(dim=-1, descending=True, stable=True)[:, :kept]
    return chosen.sort(dim=-1).values.to(torch.uint8)


def positions_to_slots(positions: Tensor, size: int) -> Tensor:
    """Bool [groups, size], True at the slots that ``positions`` [groups, kept] name."""
    slots = torch.zeros(positions.shape[0], size, dtype=torch.bool, device=positions.device)
    return slots.scatter_(1, positions.long(), True)
