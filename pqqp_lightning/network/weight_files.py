"""Weights that lie in files: those that a model was loaded from, and scratch files once they have changed."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable
from pathlib import Path
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.mapped_tensors import (
    Mapping,
    as_bytes,
    differs,
    map_again,
    map_tensor,
    mapped_files,
    place_of,
)

SMALLEST = 1 << 20
"""Bytes; smaller tensors stay in memory."""


class WeightFiles:
    """Maps tensors from files, and lets their pages leave memory.

    Attributes:
        folder: where scratch files go; the system's folder for temporary files if it does not exist.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._mappings: WeakValueDictionary[int, Mapping] = WeakValueDictionary()  # by the address of the storage
        self._originals: WeakSet[Mapping] = WeakSet()

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Map anew those tensors that a library has mapped: such a mapping can be dropped without its neighbours."""
        regions = mapped_files()
        for tensor in tensors:
            place = place_of(tensor, regions) if _is_worth_it(tensor) else None
            if place is not None and not differs(tensor, place):
                mapping, mapped = map_again(place, tensor)
                self._mappings[_address(mapped)] = mapping
                replace(tensor, mapped)

    def settle(self, tensor: Tensor) -> None:
        """Write ``tensor`` into a scratch file if only that frees its memory, and let its pages leave memory."""
        if self.is_changed(tensor):
            replace(tensor, self.stored(tensor))
        elif (mapping := self._mapping_of(tensor)) is not None:
            mapping.drop()

    def is_changed(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` holds memory that only a scratch file can free."""
        mapping = self._mapping_of(tensor)
        if mapping is None:
            return _is_worth_it(tensor)
        return mapping.place is not None and differs(tensor, mapping.place)

    def existing_folder(self) -> Path:
        """The folder where scratch files go now."""
        return self.folder if self.folder is not None and self.folder.is_dir() else Path(tempfile.gettempdir())

    def stored(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` in a scratch file of its own, whose space is free again when the copy is.

        Raises:
            RecipeError: the file cannot be written.
        """
        on_host = tensor.detach().cpu().contiguous()
        # At the same place within a page: by the alignment, kernels choose how to sum.
        lead = on_host.data_ptr() % mmap.PAGESIZE
        folder = self.existing_folder()
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.seek(lead)
                file.write(as_bytes(on_host).numpy().data)
                file.flush()
                mapping, mapped = map_tensor(file.fileno(), lead, on_host)
        except OSError as error:
            raise not_stored(folder, "a weight", error) from error
        self._mappings[_address(mapped)] = mapping
        return mapped

    def original(self, tensor: Tensor) -> Tensor | None:
        """A second mapping of ``tensor``, which does not change with it; None if a scratch file or none holds it."""
        mapping = self._mapping_of(tensor)
        if mapping is None or mapping.place is None or differs(tensor, mapping.place):
            return None
        again, original = map_again(mapping.place, tensor)
        self._originals.add(again)
        return original

    def drop_originals(self) -> None:
        """Let the pages of second mappings leave memory."""
        for original in self._originals:
            original.drop()

    def _mapping_of(self, tensor: Tensor) -> Mapping | None:
        return None if tensor.device.type != "cpu" else self._mappings.get(_address(tensor))


def not_stored(folder: Path, what: str, error: OSError) -> RecipeError:
    """The error of a scratch file in ``folder`` that has no room for ``what``."""
    way_out = "Free some space, or set TMPDIR or --run_dir to a folder on another disk."
    return RecipeError(f"{folder}: {what} cannot be stored: {error.strerror or error}. {way_out}")


def replace(tensor: Tensor, new: Tensor) -> None:
    """Let ``tensor`` hold ``new``; it stays the same object."""
    with torch.inference_mode(False), torch.no_grad():
        tensor.data = new


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_worth_it(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.nbytes >= SMALLEST and tensor.is_contiguous()
