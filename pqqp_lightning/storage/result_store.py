"""Results looked up by what they depend on, so that nothing is computed twice: one folder per sequence of stages.

``store/prune+quantize-3f2a.../`` holds ``record.json``, ``samples.safetensors`` (what every evaluation sample added to
the metrics) and, while later stages may be applied to it, the compressed model in ``model/``. A lock file next to the
folder admits one process at a time; the system releases the lock of a killed process.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.storage.files import read_json, sync, write_json
from pqqp_lightning.storage.reports import Record
from pqqp_lightning.storage.run_folder import MANIFEST

RECORD, SAMPLES_FILE, MODEL = "record.json", "samples.safetensors", "model"


@dataclass(frozen=True)
class Result:
    """The measurement of one sequence of stages.

    Attributes:
        record: of its last stage.
        samples: float64 [N, S] by metric, see :mod:`pqqp_lightning.metrics.samples`.
        paths: name of the metric's module in the model, by metric.
    """

    record: Record
    samples: dict[str, Tensor]
    paths: dict[str, str]


class ResultStore:
    """The results in ``folder``.

    Args:
        folder: shared by all searches that reuse each other's results; created with the first result.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """The folder of a result; ``key`` is a readable name and a digest."""
        return self.folder / key

    def has(self, key: str) -> bool:
        """Whether the result exists."""
        return (self.path(key) / RECORD).is_file()

    def read(self, key: str) -> Result | None:
        """The result; None if missing or corrupted, so that it is measured again."""
        if not self.has(key):
            return None
        record = self.path(key) / RECORD
        samples = self.path(key) / SAMPLES_FILE
        try:
            measured = read_json(record, "name", "metrics")
            if not samples.is_file():
                return Result(cast(Record, measured), {}, {})
            with safe_open(samples, "pt") as opened:
                states = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
                paths = opened.metadata()
            if paths is None:
                print(f"{self.path(key)}: does not name the metrics of its samples; measuring it again.", flush=True)
                return None
            return Result(cast(Record, measured), states, paths)
        except (RecipeError, SafetensorError):
            print(f"{self.path(key)}: is damaged; measuring it again.", flush=True)
            return None

    def write(self, key: str, result: Result) -> None:
        """Write the result; the record comes last, so a result with a record is complete."""
        folder = self.path(key)
        folder.mkdir(parents=True, exist_ok=True)
        if result.samples:
            temporary = folder / f".{SAMPLES_FILE}.tmp"
            save_file(result.samples, temporary, result.paths)
            sync(temporary)
            temporary.replace(folder / SAMPLES_FILE)
        write_json(folder / RECORD, result.record)

    def snapshot(self, key: str) -> Path:
        """The folder of the compressed model, which may not exist."""
        return self.path(key) / MODEL

    def has_snapshot(self, key: str) -> bool:
        """Whether the compressed model exists."""
        return (self.snapshot(key) / MANIFEST).is_file()

    def drop_snapshot(self, key: str) -> None:
        """Delete the compressed model and keep the measurement."""
        if self.snapshot(key).is_dir():
            with self.locked(key):
                shutil.rmtree(self.snapshot(key), ignore_errors=True)
                with suppress(OSError):
                    self.path(key).rmdir()  # succeeds only if nothing was measured

    @contextmanager
    def locked(self, key: str, taken: str = "") -> Iterator[None]:
        """Hold the lock of ``key``; if another process has it, print ``taken`` and wait."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"cannot be created: {error.strerror}"
            raise RecipeError(Problem("store", str(self.folder), text, "Choose another --store.")) from error
        lock = FileLock(self.folder / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{taken or f'{key}: another process is computing it'}; waiting.", flush=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
