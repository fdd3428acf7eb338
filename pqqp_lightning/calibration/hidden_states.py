"""The hidden states between two blocks: on the device while they fit, then in host memory or in a scratch file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import Any, Literal

import torch
from torch import Tensor

from pqqp_lightning.network.free_memory import free_memory
from pqqp_lightning.network.offload import Offload
from pqqp_lightning.network.weight_files import not_stored

ALIGNMENT = 4096
"""Bytes; a state begins at a page of the file."""
SHARE = 0.5
"""Of the memory that is free when the first state comes; the rest is for a block and its activations."""

Place = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class _InFile:
    """A state in the scratch file.

    Attributes:
        start: of its bytes.
        like: an empty tensor of its shape, strides and dtype.
    """

    start: int
    like: Tensor


class HiddenStates(Sequence[Tensor]):
    """A list of tensors that lie on their device, in host memory or in an unnamed file.

    Where a model is not offloaded, they stay where they are. On a GPU they take half of the memory that is free there,
    then half of that of the host, then the file. If a model on disk runs on a CPU, all of them lie in the file, since
    there is no memory to spare.

    A state comes back with its values and, if its entries are dense in memory, with its strides: a product of another
    layout may round differently.

    Args:
        offload: of the model.
    """

    def __init__(self, offload: Offload) -> None:
        self._offload = offload
        self._file: Any = None
        self._end = 0
        self._room: dict[Place, int] = {}  # bytes that a place may still take
        self._states: list[Tensor | _InFile | None] = []
        self._homes: list[tuple[Place, torch.device]] = []

    def __len__(self) -> int:
        return len(self._states)

    def append(self, state: Tensor) -> None:
        """Keep ``state`` where there is room for it."""
        self._homes.append((self._place(state), state.device))
        self._states.append(None)
        self._keep(len(self._states) - 1, state)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override] # no slices
        state = self._states[index]
        assert state is not None, "the state was forgotten"
        _, device = self._homes[index]
        return self._read(state, device) if isinstance(state, _InFile) else state.to(device)

    def __setitem__(self, index: int, state: Tensor) -> None:
        """Replace a state by its successor, in the same place."""
        self._keep(index, state)

    def forget(self, index: int) -> None:
        """Free the memory of a state that is not needed any more."""
        self._states[index] = None

    def _place(self, state: Tensor) -> Place:
        """The place for ``state``, which takes the room that it needs there."""
        if self._offload.mode == "none":
            return "device"
        if not _is_on_gpu(state):
            return "disk" if self._offload.mode == "disk" else "device"
        places: tuple[Place, ...] = ("device", "host")
        for place in places:
            if place not in self._room:
                self._room[place] = int(SHARE * _free_bytes(place, state.device))
            if state.nbytes <= self._room[place]:
                self._room[place] -= state.nbytes
                return place
        return "disk"

    def _keep(self, index: int, state: Tensor) -> None:
        place, _ = self._homes[index]
        if place == "disk":
            self._states[index] = self._write(state, self._states[index])
        else:
            self._states[index] = state.cpu() if place == "host" else state

    def _write(self, state: Tensor, earlier: Tensor | _InFile | None) -> _InFile:
        """Write ``state``, over the bytes of ``earlier`` if they are as many.

        Raises:
            RecipeError: there is no space.
        """
        if isinstance(earlier, _InFile) and earlier.like.nbytes == state.nbytes:
            start = earlier.start
        else:
            start = self._end
            self._end += state.nbytes + -state.nbytes % ALIGNMENT
        folder = self._offload.folder
        try:
            if self._file is None:
                self._file = TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as this object
            self._file.seek(start)
            self._file.write(_bytes_of(state.detach().cpu()))
            self._file.flush()
        except OSError as error:
            raise not_stored(folder, "hidden states", error) from error
        return _InFile(start, torch.empty_like(state, device="meta"))  # a dense tensor's strides, else ordinary ones

    def _read(self, state: _InFile, device: torch.device) -> Tensor:
        # Not mapped: the pages of a mapping would stay in memory, and each block overwrites its input.
        tensor = torch.empty_like(state.like, device="cpu")
        self._file.seek(state.start)
        self._file.readinto(_bytes_of(tensor))
        return tensor.to(device)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in the order of its strides; those of ``tensor`` itself if it is dense in memory."""
    like = torch.empty_like(tensor, device="meta")
    in_order = tensor.permute(sorted(range(tensor.dim()), key=like.stride, reverse=True))
    array: Any = in_order.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _is_on_gpu(state: Tensor) -> bool:
    return state.device.type != "cpu"


def _free_bytes(place: Place, device: torch.device) -> int:
    """Memory that is free in ``place``; 0 where nobody tells."""
    if place == "device":
        return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return free_memory() or 0
