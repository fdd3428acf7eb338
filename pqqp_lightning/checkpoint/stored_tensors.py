"""The tensors of a checkpoint's weights file by name, whatever its format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BUNDLE = "bundle"
"""The tensor in which format 1 kept the small tensors, as bytes one after another."""


class StoredTensors:
    """The tensors of an open weights file by name, whatever the checkpoint's format.

    Args:
        file: from ``safetensors.safe_open``.
        small: (name, dtype, shape) of each small tensor of format 1, in order; empty in format 2.
    """

    def __init__(self, file: Any, small: list[tuple[str, str, list[int]]]) -> None:
        self._file = file
        self._names = set(file.keys())
        self._small: dict[str, Tensor] = {}
        if not small:
            return
        self._names.remove(BUNDLE)
        rest = file.get_tensor(BUNDLE)
        for name, dtype_name, shape in small:
            dtype = getattr(torch, dtype_name)
            size_bytes = torch.Size(shape).numel() * dtype.itemsize
            self._small[name] = rest[:size_bytes].clone().view(dtype).view(shape)  # a copy is aligned for its dtype
            rest = rest[size_bytes:]

    def weight_names(self) -> set[str]:
        """The names of the model's tensors, whether they are stored whole or in parts."""
        return {key.partition(":")[0] for key in (*self._names, *self._small) if not key.startswith("plan.")}

    def parts(self, name: str) -> dict[str, Tensor]:
        """The parts of a packed weight."""
        prefix = f"{name}:"
        stored = [key for key in (*self._names, *self._small) if key.startswith(prefix)]
        return {key.removeprefix(prefix): self.get(key) for key in stored}

    def shape(self, name: str) -> list[int]:
        """The shape of the tensor ``name``, which is not read."""
        return list(self._small[name].shape) if name in self._small else self._file.get_slice(name).get_shape()

    def get(self, name: str) -> Tensor:
        """The tensor ``name``."""
        return self._small[name] if name in self._small else self._file.get_tensor(name)
