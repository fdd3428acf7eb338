"""Tensors mapped from files: their pages come into memory when they are read, and can leave it at any time."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_MAPS = Path("/proc/self/maps")
_PAGES = Path("/proc/self/pagemap")
_PAGE = mmap.PAGESIZE
_ENTRY = 8
"""Bytes that the page map has for each page."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file."""

    path: Path
    offset: int


class Mapping(mmap.mmap):
    """The part of a file that holds one tensor, mapped into memory; it lives as long as the tensor's storage.

    Attributes:
        place: where the tensor lies in a file that must not change. Writes to the tensor then stay in memory. None if
            the file belongs to the mapping, which writes into it.
    """

    place: Place | None = None

    def drop(self) -> None:
        """Let the pages leave memory. What was written to a tensor with a ``place`` is lost."""
        self.madvise(mmap.MADV_DONTNEED)


def map_tensor(descriptor: int, offset: int, like: Tensor, place: Place | None = None) -> tuple[Mapping, Tensor]:
    """Map a tensor of the shape and dtype of ``like`` from an open file.

    Args:
        descriptor: of the file.
        offset: of the tensor in it, in bytes.
        like: a contiguous tensor.
        place: see :class:`Mapping`.
    """
    lead = offset % mmap.ALLOCATIONGRANULARITY
    flags = mmap.MAP_SHARED if place is None else mmap.MAP_PRIVATE
    mapping = Mapping(descriptor, lead + like.nbytes, flags, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset - lead)
    mapping.place = place
    # An inference tensor would refuse to be written to later.
    with torch.inference_mode(False):
        flat = torch.frombuffer(mapping, dtype=like.dtype, count=like.numel(), offset=lead)
        return mapping, flat.view(like.shape)


def map_again(place: Place, like: Tensor) -> tuple[Mapping, Tensor]:
    """Map the tensor at ``place``, with the shape and dtype of ``like``."""
    with place.path.open("rb") as file:
        return map_tensor(file.fileno(), place.offset, like, place)


def mapped_files() -> list[tuple[int, int, Place]]:
    """The private, writable mappings of files in this process: first address, address behind the last, place.

    A library that loads a model may have mapped its weights. Only Linux tells.
    """
    regions = []
    for line in _MAPS.read_text().splitlines() if _MAPS.exists() else ():
        fields = line.split(maxsplit=5)  # "7f01-7f02 rw-p 00001000 fe:00 1234 /path"
        if len(fields) < 6 or fields[1] != "rw-p" or not fields[5].startswith("/"):
            continue
        start, end = (int(address, 16) for address in fields[0].split("-"))
        regions.append((start, end, Place(Path(fields[5]), int(fields[2], 16))))
    return regions


def place_of(tensor: Tensor, regions: list[tuple[int, int, Place]]) -> Place | None:
    """Where ``tensor`` lies in a mapped file; None for any other memory.

    Args:
        tensor: contiguous.
        regions: from :func:`mapped_files`.
    """
    first = tensor.data_ptr()
    for start, end, place in regions:
        if start <= first and first + tensor.nbytes <= end and place.path.is_file():
            return Place(place.path, place.offset + first - start)
    return None


def differs(tensor: Tensor, place: Place) -> bool:
    """Whether ``tensor``, which was mapped from ``place``, holds other bytes than the file."""
    if _untouched(tensor):
        return False
    # The pages were written to, perhaps with what they held before; or the system does not tell.
    _, original = map_again(place, tensor)
    return not torch.equal(as_bytes(tensor), as_bytes(original))


def as_bytes(tensor: Tensor) -> Tensor:
    """A view of a contiguous tensor as bytes, by which -0 and 0 differ and NaN equals itself."""
    return tensor.detach().view(-1).view(torch.uint8)


def _untouched(tensor: Tensor) -> bool:
    """Whether every page of ``tensor`` is certain to be the file's own; see proc_pid_pagemap(5)."""
    first = tensor.data_ptr() // _PAGE
    pages = -(-(tensor.data_ptr() + tensor.nbytes) // _PAGE) - first
    try:
        with _PAGES.open("rb", buffering=0) as file:
            file.seek(first * _ENTRY)
            entries = np.frombuffer(file.read(pages * _ENTRY), np.uint64)
    except OSError:
        return False
    held = entries >> np.uint64(62) != 0  # in memory or swapped out
    of_file = entries >> np.uint64(61) & np.uint64(1) == 1
    return len(entries) == pages and not bool((held & ~of_file).any())
