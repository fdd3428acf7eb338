"""What a process of Ray does for a search: the same as the driver would, with a copy of what the driver has."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger
from ray import cloudpickle

from pqqp_lightning.errors import RecipeError
from pqqp_lightning.storage.run_folder import RunFolder
from pqqp_lightning.trials.prefix_tree import Order, PrefixTree

DECIDING = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUBLAS_WORKSPACE_CONFIG")
"""Environment variables that decide the numbers."""

LATEST_S = 60.0
"""So long may a network file system hide a new file."""


@dataclass(frozen=True)
class Settings:
    """What a worker takes over from the driver's process.

    Attributes:
        search: the one that a task is of.
        base: the driver's digests of all that results depend on besides the stages.
        folder: the working folder.
        path: where modules are imported from.
        environment: those of :data:`DECIDING` that are set.
        threads: torch's.
        numerics: torch's switches, from :func:`read_numerics`.
    """

    search: str
    base: tuple[str, str] | None
    folder: str
    path: list[str]
    environment: dict[str, str]
    threads: int
    numerics: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a task did; the result itself is in the store.

    Attributes:
        applications: stages applied.
        seconds: what one of them took, for each.
        problems: what the user has to put right.
    """

    applications: int = 0
    seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


_trees: dict[str, PrefixTree] = {}
"""This process's copy of the latest search's tree."""


def pack(trainer: Trainer, tree: PrefixTree) -> bytes:
    """The copy that workers get; ``tree`` is not open yet."""
    return cloudpickle.dumps((trainer, tree))


def settings_of(search: str, base: tuple[str, str] | None) -> Settings:
    """This process's."""
    environment = {name: os.environ[name] for name in DECIDING if name in os.environ}
    path = [entry or os.getcwd() for entry in sys.path]
    return Settings(search, base, os.getcwd(), path, environment, torch.get_num_threads(), read_numerics())


def run_node(settings: Settings, copy: list[Any], node: Order, keep: bool, again: bool) -> Outcome:
    """Measure ``node``, unless somebody has.

    Args:
        settings: the driver's.
        copy: a reference to what :func:`pack` made, in a list, so that Ray does not read it for every task.
        node: its parent's model is in the store.
        keep: the model is needed too, for the nodes that go on from it.
        again: a worker was lost over it, perhaps after it had written the result: that application counts.
    """
    try:
        tree = _tree_of(settings, copy)
        before, timed = tree.applications, len(tree.seconds)
        if node[:-1]:
            soon(lambda: tree.has_model(node[:-1]))
        tree.measure(node)
        if keep:
            tree.snapshot(node)
    except RecipeError as error:
        return Outcome(problems=error.problems)
    return Outcome(max(tree.applications - before, int(again)), tree.seconds[timed:])


def soon(ask: Callable[[], bool]) -> bool:
    """Whether that becomes true while a network file system may still hide a new file."""
    start = time.monotonic()
    while not (true := ask()) and time.monotonic() - start < LATEST_S:
        time.sleep(0.5)
    return true


def not_shared(folder: str) -> str:
    """What to say where this machine does not see what another one wrote."""
    return (
        f"executor=ray: {socket.gethostname()} does not see the same files in {folder} as the other machines. Work in "
        "a folder, with a store, that all machines share under one path, or use --executor local."
    )


def read_numerics() -> dict[str, Any]:
    """The switches of torch that decide the numbers."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
    }


def _set_numerics(found: dict[str, Any]) -> None:
    torch.use_deterministic_algorithms(found["deterministic"], warn_only=found["warn_only"])
    torch.set_float32_matmul_precision(found["precision"])
    torch.set_default_dtype(found["dtype"])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = found["cudnn"]


def _tree_of(settings: Settings, copy: list[Any]) -> PrefixTree:
    """The tree of this search, open; made by the first task that a process gets.

    Raises:
        RecipeError: this process would measure something else than the driver, or where the driver does not look.
    """
    if settings.search not in _trees:
        if not Path(settings.folder).is_dir():
            raise RecipeError(not_shared(settings.folder))
        _take_over(settings)
        trainer, tree = cloudpickle.loads(ray.get(copy[0]))
        _leave_the_terminal(trainer)
        tree.identify()
        if tree.base != settings.base:
            raise RecipeError(
                f"executor=ray: on {socket.gethostname()} the model, the data, the packages or the code are not the "
                "driver's, and so its results would not be. Give every machine the same packages and files, move "
                "classes of your own from a script or notebook to a module, or use --executor local."
            )
        if not soon(lambda: tree.is_known(())):
            raise RecipeError(not_shared(settings.folder))
        tree.open()
        _trees.clear()
        _trees[settings.search] = tree
    return _trees[settings.search]


def _take_over(settings: Settings) -> None:
    os.chdir(settings.folder)
    sys.path[:0] = [entry for entry in settings.path if entry not in sys.path]
    for name in DECIDING:
        os.environ.pop(name, None)
    os.environ.update(settings.environment)
    torch.set_num_threads(settings.threads)
    _set_numerics(settings.numerics)


def _leave_the_terminal(trainer: Trainer) -> None:
    """No progress bars; logs of training go to a file of this process."""
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, ProgressBar)]
    if trainer.loggers:
        version = f"ray-{socket.gethostname()}-{os.getpid()}"
        logs = RunFolder(Path(trainer.default_root_dir)).logs
        trainer.loggers = [CSVLogger(trainer.default_root_dir, name=logs.name, version=version)]
