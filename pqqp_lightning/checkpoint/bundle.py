"""Many small tensors as one, so that a file's header does not outweigh a small model's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALL_BYTES = 1 << 16
"""Smaller tensors are bundled: above it, a header entry of 100 bytes is below 0.2%."""
BUNDLE = "bundle"

Table = list[tuple[str, str, list[int]]]


def bundle_small(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Table]:
    """Replace the small tensors by one uint8 tensor named ``bundle``.

    Returns:
        (tensors to store, (name, dtype, shape) of each bundled one in order).
    """
    small = {name: t for name, t in tensors.items() if t.numel() * t.element_size() < SMALL_BYTES}
    kept = {name: t.contiguous() for name, t in tensors.items() if name not in small}
    if small:
        kept[BUNDLE] = torch.cat([t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in small.values()])
    return kept, [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in small.items()]


class BundleReader:
    """Tensors by name from an open safetensors file, bundled or not.

    Args:
        file: from ``safetensors.safe_open``.
        table: from :func:`bundle_small`.
    """

    def __init__(self, file: Any, table: Table) -> None:
        self._file = file
        self._places: dict[str, tuple[int, int, torch.dtype, list[int]]] = {}
        start = 0
        for name, dtype_name, shape in table:
            dtype = getattr(torch, dtype_name)
            stop = start + torch.Size(shape).numel() * dtype.itemsize
            self._places[name] = (start, stop, dtype, shape)
            start = stop
        self._bundle = file.get_tensor(BUNDLE) if table else torch.empty(0, dtype=torch.uint8)

    def names(self) -> list[str]:
        """The names of all tensors."""
        return [*(name for name in self._file.keys() if name != BUNDLE), *self._places]  # noqa: SIM118 - no iterator

    def get(self, name: str) -> Tensor:
        """The tensor ``name``."""
        if name not in self._places:
            return self._file.get_tensor(name)
        start, stop, dtype, shape = self._places[name]
        return self._bundle[start:stop].clone().view(dtype).view(shape)
