"""Tensors stored in a temporary file, so that a model and its packed copy need not be in memory together."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from weakref import WeakValueDictionary

import torch
from torch import Tensor

SMALLEST = 1 << 20
"""Bytes; smaller tensors stay in memory."""
ALIGNMENT = mmap.ALLOCATIONGRANULARITY
"""Bytes; a part of a file is mapped from a multiple of this on."""


class DiskTensors:
    """Stores tensors in an unnamed file; the operating system loads and drops their pages as memory allows.

    Args:
        folder: on a disk with enough space.
    """

    def __init__(self, folder: Path) -> None:
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115 - closed on exit
        # by the address of their data; a mapping ends with its tensor
        self._mappings: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()

    def put(self, tensor: Tensor) -> Tensor:
        """Store a tensor and return an equal one that is mapped from the file."""
        if tensor.numel() * tensor.element_size() < SMALLEST:
            return tensor
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        end = self._file.seek(0, os.SEEK_END)
        start = end + -end % ALIGNMENT
        self._file.seek(start)
        self._file.write(data.data)
        self._file.flush()
        mapping = mmap.mmap(self._file.fileno(), data.nbytes, offset=start)
        mapped = torch.frombuffer(mapping, dtype=tensor.dtype).view(tensor.shape)
        self._mappings[mapped.data_ptr()] = mapping
        return mapped

    def copy(self, stored: Tensor, device: torch.device) -> Tensor:
        """Return a copy of a tensor that :meth:`put` returned, and drop the pages that were loaded for it.

        Pages that were read count as the process's memory until the system needs them: reading a model's weights one
        after another would hold all of them.
        """
        copied = stored.to(device, copy=True)
        mapping = self._mappings.get(stored.data_ptr())
        if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on every system
            mapping.madvise(mmap.MADV_DONTNEED)
        return copied

    def __enter__(self) -> DiskTensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
