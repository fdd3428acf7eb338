"""Tensors stored in a temporary file, so that a model and its packed copy need not be in memory together."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1 << 20
"""Bytes; smaller tensors stay in memory."""
ALIGNMENT = 64
"""Bytes; torch needs tensors aligned to their dtype, and the CPU reads whole cache lines."""


class DiskTensors:
    """Stores tensors in an unnamed file; the operating system loads and drops their pages as memory allows.

    Args:
        folder: on a disk with enough space.
    """

    def __init__(self, folder: Path) -> None:
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115 - closed on exit

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
        mapped = np.memmap(self._file, np.uint8, "r+", start, data.shape)
        return torch.from_numpy(mapped).view(tensor.dtype).view(tensor.shape)

    def __enter__(self) -> DiskTensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
