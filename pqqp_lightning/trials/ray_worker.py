"""The task of a Ray worker: it measures a node as the driver would, with a copy of the driver's search."""

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

from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.storage.run_folder import RunFolder
from pqqp_lightning.trials.prefix_tree import Order, PrefixTree

RESULT_VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUBLAS_WORKSPACE_CONFIG")
"""Environment variables that change the numbers."""

VISIBLE_WITHIN_S = 60.0
"""A network file system shows a new file on other machines within this time."""


@dataclass(frozen=True)
class Settings:
    """The driver's process state that a worker adopts.

    Attributes:
        search: identifies the search of a task.
        base: the driver's ``PrefixTree.base``.
        folder: the working folder.
        path: ``sys.path``.
        environment: those of :data:`RESULT_VARIABLES` that are set.
        threads: torch's number of threads.
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
    """What a task did; its result is in the store.

    Attributes:
        applications: number of stages applied.
        seconds: time of each application.
        problems: what the user must put right.
    """

    applications: int = 0
    seconds: list[float] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


_trees: dict[str, PrefixTree] = {}
"""This process's copy of the latest search's tree, by search; a Ray worker runs many tasks."""


def pickle_search(trainer: Trainer, tree: PrefixTree) -> bytes:
    """Pickle the search for the workers; ``tree`` must not be open yet."""
    return cloudpickle.dumps((trainer, tree))


def read_settings(search: str, base: tuple[str, str] | None) -> Settings:
    """Read the settings of this process."""
    environment = {name: os.environ[name] for name in RESULT_VARIABLES if name in os.environ}
    path = [entry or os.getcwd() for entry in sys.path]
    return Settings(search, base, os.getcwd(), path, environment, torch.get_num_threads(), read_numerics())


def run_node(settings: Settings, copy: list[Any], node: Order, keep: bool, again: bool) -> Outcome:
    """Measure ``node``, unless its result is in the store.

    Args:
        settings: the driver's.
        copy: a reference to :func:`pickle_search`'s bytes, inside a list, because Ray would fetch a bare reference for
            every task.
        node: the node to measure; its parent's model is in the store.
        keep: make sure that the node's model is in the store, for its children.
        again: a worker died while measuring the node. It may have written the result, so its application counts.
    """
    try:
        tree = _tree_of(settings, copy)
        applications_before = tree.applications
        timed_before = len(tree.seconds)
        if node[:-1]:
            wait_until(lambda: tree.has_model(node[:-1]))
        tree.measure(node)
        if keep:
            tree.snapshot(node)
    except RecipeError as error:
        return Outcome(problems=error.problems)
    return Outcome(max(tree.applications - applications_before, int(again)), tree.seconds[timed_before:])


def wait_until(condition: Callable[[], bool]) -> bool:
    """Wait for a file of another machine to appear; returns whether ``condition`` became true in time."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start >= VISIBLE_WITHIN_S:
            return False
        time.sleep(0.5)
    return True


def not_shared_problem(folder: str) -> Problem:
    """The problem to report if this machine does not see the files of another one."""
    text = f"needs shared files: {socket.gethostname()} does not see the same files in {folder} as the other machines"
    way_out = "Work in a folder, with a store, that all machines share under one path, or use --executor local."
    return Problem("executor", "ray", text, way_out)


def read_numerics() -> dict[str, Any]:
    """Read torch's switches that change the numbers."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
    }


def _tree_of(settings: Settings, copy: list[Any]) -> PrefixTree:
    """The open tree of this search; a process's first task unpickles and opens it.

    Raises:
        RecipeError: this process would get other results than the driver, or does not see the driver's files.
    """
    if settings.search not in _trees:
        if not Path(settings.folder).is_dir():
            raise RecipeError(not_shared_problem(settings.folder))
        _adopt(settings)
        trainer, tree = cloudpickle.loads(ray.get(copy[0]))
        _redirect_output(trainer)
        tree.identify()
        # Equal digests mean equal model, data, packages and code: only then is a result of this process the driver's.
        if tree.base != settings.base:
            text = (
                f"needs the same model, data, packages and code on every machine: {socket.gethostname()} would give "
                "other results than the driver"
            )
            way_out = (
                "Give every machine the same packages and files, move classes of your own from a script or notebook "
                "to a module, or use --executor local."
            )
            raise RecipeError(Problem("executor", "ray", text, way_out))
        if not wait_until(lambda: tree.is_known(())):  # the driver has measured the dense model
            raise RecipeError(not_shared_problem(settings.folder))
        tree.open()
        _trees.clear()  # an earlier search's model would stay in memory
        _trees[settings.search] = tree
    return _trees[settings.search]


def _adopt(settings: Settings) -> None:
    """Make this process compute as the driver does."""
    os.chdir(settings.folder)
    sys.path[:0] = [entry for entry in settings.path if entry not in sys.path]
    for name in RESULT_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(settings.environment)
    torch.set_num_threads(settings.threads)
    numerics = settings.numerics
    torch.use_deterministic_algorithms(numerics["deterministic"], warn_only=numerics["warn_only"])
    torch.set_float32_matmul_precision(numerics["precision"])
    torch.set_default_dtype(numerics["dtype"])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = numerics["cudnn"]


def _redirect_output(trainer: Trainer) -> None:
    """Remove progress bars, and log training to a file of this process: two processes must not share one."""
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, ProgressBar)]
    if trainer.loggers:
        version = f"ray-{socket.gethostname()}-{os.getpid()}"
        logs = RunFolder(Path(trainer.default_root_dir)).logs
        trainer.loggers = [CSVLogger(trainer.default_root_dir, name=logs.name, version=version)]
