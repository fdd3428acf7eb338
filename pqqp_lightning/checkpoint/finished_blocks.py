"""The blocks that an unfinished stage has compressed, kept in its folder: a killed run resumes at the next block.

``blocks/`` in the stage's folder has one file for each block: its weights, packed as in a checkpoint, and what the
stage had noted by then. The stage's checkpoint replaces the folder as a whole. A file's name ends with its checksum: a
damaged one is not used, and therefore none has to be flushed to the disk.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pqqp_lightning.checkpoint.nested import CannotStore, describe, rebuild
from pqqp_lightning.checkpoint.packing import pack_weight, unpack_values, unpack_weight
from pqqp_lightning.checkpoint.save import own_memory
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.constraints import constraints_of, set_constraints
from pqqp_lightning.network.layers import Layer, layout_of
from pqqp_lightning.storage.files import sha256_of
from pqqp_lightning.storage.run_folder import BLOCKS

FORMAT = 1
PAUSE_S, SHARE = 1.0, 0.03
"""Seconds between two writes at least, and the share of the stage's time that writing may take: a stage that is quick
in itself, or for the size of its blocks, keeps nothing."""

_WRITING_S = 2.5e-8
"""Seconds that writing takes for each entry, until it has been measured."""
_SAMPLE = 1 << 16
"""Entries of a weight that identify it."""
_HEADER, _STATE, _END, _TEMPORARY = "pqqp", "state", "end", "unfinished"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Finished:
    """A finished block that is not written yet: its layers, the header of its file, and the header's tensors."""

    key: str
    layers: Mapping[str, Layer]
    header: dict[str, Any]
    tensors: list[Tensor]


@dataclass(frozen=True)
class _File:
    """A file that is not damaged, with its header."""

    path: Path
    header: dict[str, Any]


class FinishedBlocks:
    """The finished blocks of one stage. The first rank writes them, all ranks read them.

    Args:
        folder: of the stage's checkpoint; without one, nothing is kept.
        identity: plain data; files of another one are not used.
        writes: whether this is the first rank.
        agree: gives every rank the first one's answer.

    Attributes:
        earlier_s: the seconds that killed runs spent on the blocks that were read.
    """

    def __init__(
        self,
        folder: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        *,
        writes: bool = True,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self._folder = Path() if folder is None else folder / BLOCKS
        self._identity = json.loads(json.dumps([FORMAT, identity], default=str))
        self._reads = folder is not None  # until the first file is missing
        self._writes = folder is not None and writes
        self._agree = agree
        self._parts = 0
        self._used: set[Path] = set()
        self._unwritten: list[_Finished] = []
        self._entry_s = _WRITING_S
        self._started = self._flushed = time.monotonic()
        self.earlier_s = 0.0

    def part(self, state: Callable[[], Any], set_state: Callable[[Any], None]) -> Part:
        """The next part of the stage: one walk over the blocks, or one measurement. A resumed stage has the same parts.

        Args:
            state: what the stage has found so far, see :func:`~pqqp_lightning.checkpoint.nested.describe`.
            set_state: brings the stage to such a state.
        """
        if self._unwritten:  # this part may change the same layers
            if self._is_affordable():
                self._flush()
            else:
                self._stop()
        self._parts += 1
        return Part(self, self._parts, state, set_state)

    def drop(self) -> None:
        """Delete all files."""
        if self._writes:
            rmtree(self._folder, ignore_errors=True)

    @property
    def active(self) -> bool:
        """Whether this rank reads or writes."""
        return self._reads or self._writes

    def has(self, key: str) -> bool:
        """Whether there is a file of this key, which may be damaged."""
        return self._reads and next(self._folder.glob(f"{key}.*"), None) is not None

    def find(self, key: str, before: Mapping[str, int]) -> Path | None:
        """The file of a block; from the first one on that cannot be used, None.

        Args:
            key: of the block.
            before: a digest of each of its layers' weights before the stage.
        """
        if not self._reads:
            return None
        file = self._sound(key)
        if not self._is_usable(file is not None and file.header["before"] == before):
            self._end_reading()
            return None
        assert file is not None
        self._used.add(file.path)
        return file.path

    def find_all(self, part: str, before: Callable[[], Mapping[str, int]]) -> list[Path]:
        """The files of a part that is finished, the last one that of its end; else none.

        Args:
            part: its name.
            before: digests of all its layers' weights before the stage.
        """
        if not self._reads:
            return []
        files: list[_File | None] = []
        if self.has(f"{part}-{_END}"):
            while self.has(f"{part}-{len(files)}"):
                files.append(self._sound(f"{part}-{len(files)}"))
            files.append(self._sound(f"{part}-{_END}"))
        sound = [file for file in files if file is not None]
        kept: dict[str, int] = {}
        for file in sound:
            kept.update(file.header["before"])
        if not self._is_usable(bool(sound) and len(sound) == len(files) and kept == before()):
            return []
        self._used.update(file.path for file in sound)
        return [file.path for file in sound]

    def read(self, path: Path, layers: Mapping[str, Layer]) -> Any:
        """Set the weights and constraints of a block from its file, and return the content that was kept with them.

        Args:
            path: of the file.
            layers: by name, those of the block and perhaps more.
        """
        header = _header(path)
        with safe_open(path, "pt") as opened, torch.no_grad():
            names = list(opened.keys())
            for name, entry in header["packed"].items():
                keys = [key for key in names if key.startswith(f"{name}:")]
                parts = {key.removeprefix(f"{name}:"): opened.get_tensor(key) for key in keys}
                weight, constraints = unpack_weight(entry, parts)
                layers[name].weight.copy_(weight)
                set_constraints(layers[name], constraints)
            tensors = [opened.get_tensor(f"{_STATE}:{number}") for number in range(header["tensors"])]
        self.earlier_s = header["elapsed_s"]
        return rebuild(header["content"], tensors)

    def keep(self, key: str, layers: Mapping[str, Layer], before: Mapping[str, int], content: Any) -> None:
        """Write a finished block, now or with the next ones.

        Args:
            key: of the block.
            layers: by name; their weights do not change before the part's end.
            before: see :meth:`find`.
            content: what to keep with it; if it is not plain, nothing is kept from here on.
        """
        self._end_reading()
        if not self._writes:
            return
        tensors: list[Tensor] = []
        try:
            described = describe(content, tensors)
        except CannotStore:
            self._stop()
            return
        if any(tensor.device.type != "cpu" for tensor in tensors):  # it would not come back to its device
            self._stop()
            return
        header = {
            "identity": self._identity,
            "before": before,
            "content": described,
            "tensors": len(tensors),
            "elapsed_s": self.earlier_s + time.monotonic() - self._started,
        }
        self._unwritten.append(_Finished(key, layers, header, [tensor.clone() for tensor in tensors]))
        if time.monotonic() - self._flushed >= PAUSE_S and self._is_affordable():
            self._flush()

    def _is_usable(self, usable: bool) -> bool:
        """The first rank's answer.

        Raises:
            RecipeError: it can use a file that this rank cannot.
        """
        agreed = self._agree(usable)
        if agreed and not usable:
            raise RecipeError(f"{self._folder}: a process cannot read what another one reads. Use a shared disk.")
        return agreed

    def _is_affordable(self) -> bool:
        return self._entry_s * self._unwritten_entries() <= SHARE * (time.monotonic() - self._flushed)

    def _unwritten_entries(self) -> int:
        return sum(layer.weight.numel() for item in self._unwritten for layer in item.layers.values())

    def _flush(self) -> None:
        start, entries = time.monotonic(), self._unwritten_entries()
        while self._unwritten and self._writes:
            try:
                self._write(self._unwritten.pop(0))
            except (OSError, SafetensorError) as error:
                rank_zero_warn(f"{self._folder}: finished blocks cannot be kept, the run goes on without: {error}")
                self._stop()
        self._flushed = time.monotonic()
        if entries:
            self._entry_s = (self._flushed - start) / entries

    def _write(self, finished: _Finished) -> None:
        stored = {f"{_STATE}:{number}": tensor for number, tensor in enumerate(finished.tensors)}
        entries: dict[str, Any] = {}
        for name, layer in finished.layers.items():
            weight = layer.weight.detach()
            parts, entries[name] = pack_weight(weight, constraints_of(layer), layout_of(layer))
            if not _holds(parts, entries[name], weight):  # it breaks its constraints, which the stage's end must see
                self._stop()
                return
            stored.update({f"{name}:{part}": own_memory(tensor) for part, tensor in parts.items()})
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / _TEMPORARY
        save_file(stored, temporary, {_HEADER: json.dumps(finished.header | {"packed": entries})})
        temporary.replace(self._folder / f"{finished.key}.{sha256_of(temporary)}")

    def _sound(self, key: str) -> _File | None:
        """The file of ``key``, if it is undamaged and of this stage; the first rank looks for all."""
        for path in self._folder.glob(f"{key}.*"):
            if path.suffix == f".{sha256_of(path)}":
                file = _File(path, _header(path))
                if file.header["identity"] == self._identity:
                    return file
        return None

    def _end_reading(self) -> None:
        """Delete the files from the first missing one on: their blocks are computed again."""
        if self._reads and self._writes and self._folder.is_dir():
            for path in set(self._folder.iterdir()) - self._used:
                path.unlink()
        self._reads = False

    def _stop(self) -> None:
        """Keep nothing from here on."""
        self._writes = False
        self._unwritten.clear()


class Part:
    """A part of a stage, see :meth:`FinishedBlocks.part`.

    Attributes:
        value: what was given to :meth:`finish`, perhaps in the run that was killed.
    """

    def __init__(
        self, finished: FinishedBlocks, number: int, state: Callable[[], Any], set_state: Callable[[Any], None]
    ) -> None:
        self._finished, self._name = finished, str(number)
        self._state, self._set_state = state, set_state
        self._blocks = 0
        self._before: dict[str, int] = {}
        self.value: Any = None

    @property
    def waiting(self) -> int:
        """The number of finished blocks that can be restored next."""
        count = 0
        while self._finished.has(f"{self._name}-{self._blocks + count}"):
            count += 1
        return count

    def restore(self, layers: Mapping[str, Layer]) -> bool:
        """Restore the next block; if it is not finished, return False: it is then compressed and kept.

        Args:
            layers: the block's, by name.
        """
        if not self._finished.active:
            return False
        self._before = _digests(layers)
        path = self._finished.find(f"{self._name}-{self._blocks}", self._before)
        if path is None:
            return False
        self._set_state(self._finished.read(path, layers))
        self._blocks += 1
        return True

    def keep(self, layers: Mapping[str, Layer]) -> None:
        """Keep the block that :meth:`restore` did not find."""
        if self._finished.active:
            self._finished.keep(f"{self._name}-{self._blocks}", layers, self._before, self._state())
            self._blocks += 1

    def restore_all(self, layers: Mapping[str, Layer]) -> bool:
        """Restore the whole part, if it is finished.

        Args:
            layers: of all its blocks, by name.
        """
        content: dict[str, Any] = {}
        for path in self._finished.find_all(self._name, lambda: _digests(layers)):
            content = self._finished.read(path, layers)
        if not content:
            return False
        self.value = content["value"]
        self._set_state(content["state"])
        return True

    def finish(self, value: Any = None) -> None:
        """Keep that the part is finished.

        Args:
            value: plain data, the part's result.
        """
        self.value = value
        if self._finished.active:
            self._finished.keep(f"{self._name}-{_END}", {}, {}, {"state": self._state(), "value": value})


def _header(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as opened:
        return json.loads(opened.metadata()[_HEADER])


def _holds(parts: dict[str, Tensor], entry: dict[str, Any], weight: Tensor) -> bool:
    """Whether the parts of a packed weight are all of it: nothing is outside its mask or off its grid."""
    if entry["bits"] is None:  # the kept values are as they were; counting is faster than unpacking
        return int(parts["values"].count_nonzero()) == int(weight.count_nonzero())
    return torch.equal(unpack_values(entry, parts), weight.cpu())


def _digests(layers: Mapping[str, Layer]) -> dict[str, int]:
    """The sum of some entries of each weight, taken as integers of the same bits: exact in any order."""
    found = {}
    for name, layer in layers.items():
        entries = layer.weight.detach().flatten()
        sample = entries[:: max(1, len(entries) // _SAMPLE)].contiguous()
        found[name] = int(sample.view(_INTEGERS[sample.element_size()]).sum(dtype=torch.int64))
    return found
