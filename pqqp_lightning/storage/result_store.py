"""Results kept by what they depend on, so that nothing is computed twice: one folder for each sequence of stages.

``store/prune+quantize-3f2a.../`` holds ``record.json``, ``samples.safetensors`` (what every evaluation sample added to
the metrics) and, as long as something may go on from it, the compressed model in ``model/``. A lock file beside the
folder lets one process at a time work on it; a killed process lets go of it.
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
    """What was measured of one sequence of stages.

    Attributes:
        record: of its last stage.
        samples: float64 [N, S] by metric, see :mod:`pqqp_lightning.metrics.samples`.
        paths: the model's module that is the metric, by metric.
    """

    record: Record
    samples: dict[str, Tensor]
    paths: dict[str, str]


class ResultStore:
    """The results in ``folder``.

    Args:
        folder: shared by all searches that may use each other's results; made when the first result is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """The folder of a result; ``key`` is a name that tells people what it is, and a digest."""
        return self.folder / key

    def has(self, key: str) -> bool:
        """Whether the result is there."""
        return (self.path(key) / RECORD).is_file()

    def read(self, key: str) -> Result | None:
        """The result, if it is there; one whose files are damaged is none, and is measured again."""
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
                print(f"{self.path(key)}: does not say whose samples it holds, and is measured again.", flush=True)
                return None
            return Result(cast(Record, measured), states, paths)
        except (RecipeError, SafetensorError):
            print(f"{self.path(key)}: is damaged, and is measured again.", flush=True)
            return None

    def write(self, key: str, result: Result) -> None:
        """Keep the result; its record comes last, so that it is whole where there is one."""
        folder = self.path(key)
        folder.mkdir(parents=True, exist_ok=True)
        if result.samples:
            temporary = folder / f".{SAMPLES_FILE}.tmp"
            save_file(result.samples, temporary, result.paths)
            sync(temporary)
            temporary.replace(folder / SAMPLES_FILE)
        write_json(folder / RECORD, result.record)

    def snapshot(self, key: str) -> Path:
        """Where the compressed model lies, if it is there."""
        return self.path(key) / MODEL

    def has_snapshot(self, key: str) -> bool:
        """Whether the compressed model is there."""
        return (self.snapshot(key) / MANIFEST).is_file()

    def drop_snapshot(self, key: str) -> None:
        """Remove the compressed model, and keep what was measured."""
        if self.snapshot(key).is_dir():
            with self.locked(key):
                shutil.rmtree(self.snapshot(key), ignore_errors=True)
                with suppress(OSError):
                    self.path(key).rmdir()  # nothing was measured

    @contextmanager
    def locked(self, key: str, taken: str = "") -> Iterator[None]:
        """Hold the lock of this name; says what is ``taken`` where another process has it, and waits."""
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
