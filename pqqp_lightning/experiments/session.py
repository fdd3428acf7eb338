"""The parts that all experiments share: their store, their run folder, and its lock."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.experiments.options import ExperimentOptions, SearchOptions
from pqqp_lightning.runs.checks import check_run
from pqqp_lightning.runs.run import run_identity
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.trainer import Trainer
from pqqp_lightning.storage.result_store import ResultStore
from pqqp_lightning.storage.run_folder import RunFolder, check_writable
from pqqp_lightning.trials.executors import check_executor
from pqqp_lightning.trials.prefix_tree import PrefixTree
from pqqp_lightning.trials.verdict import Judge, deciding_metric

Show = Callable[[Path], None]
"""Shows the results in a run folder."""


def store_of(trainer: Trainer, store: str | Path | None) -> ResultStore:
    """The store at ``store``, or next to the run folder."""
    return ResultStore(Path(store) if store else Path(trainer.default_root_dir).parent / "store")


def check_experiment(trainer: Trainer, data: RunData, store: ResultStore, options: ExperimentOptions) -> list[Problem]:
    """The problems of the run, the store, the time limit and the executor, which every experiment looks for first."""
    problems = check_run(trainer, data, trainer.stages) + _check_store(trainer, store)
    if isinstance(options, SearchOptions):
        problems += _check_time_limit(options.time_limit) + check_executor(options.executor, trainer)
    return problems


def _check_store(trainer: Trainer, store: ResultStore) -> list[Problem]:
    """The problems of the store's folder."""
    problems, folder = check_writable("store", store.folder), Path(trainer.default_root_dir)
    if store.folder.resolve().is_relative_to(folder.resolve()):
        text = f"is inside run_dir='{folder}', which the next search moves aside"
        problems.append(Problem("store", str(store.folder), text, "Choose another --store."))
    return problems


def _check_time_limit(minutes: float | None) -> list[Problem]:
    """The problem of a time limit that is not positive."""
    if minutes is None or minutes > 0:
        return []
    return [Problem("time_limit", minutes, "is not above 0", "Give minutes, or leave it out.")]


def open_search(
    trainer: Trainer,
    data: RunData,
    tree: PrefixTree,
    asked: dict[str, Any],
    options: ExperimentOptions,
    *,
    resume: bool,
    objectives: Sequence[str] = (),
) -> Judge:
    """Measure the dense model, choose the deciding metric, then start or resume in the run folder.

    Args:
        trainer: has the stages, and the run folder as ``default_root_dir``.
        data: the dense model and its data.
        tree: not open yet.
        asked: the command, and the options that a resumed search must share.
        options: with the metric and its direction.
        resume: continue the search in the run folder.
        objectives: further metrics that the evaluation must measure.

    Raises:
        RecipeError: the run folder has another search, or a metric is unknown.
    """
    metric, higher = options.metric, options.higher_is_better

    def check(names: Iterable[str]) -> tuple[str, bool]:
        measured = list(names)
        for name in objectives:
            direction = higher if name == metric else None  # the user says that of the deciding metric only
            try:
                deciding_metric(data.module, measured, name, direction)
            except RecipeError as error:
                raise RecipeError([replace(problem, key="objectives") for problem in error.problems]) from error
        return deciding_metric(data.module, measured, metric, higher)

    # Resuming checks the folder before any work. A new search moves an old folder aside, so only once it can run.
    if resume:
        start_or_resume(trainer, data, asked, resume=True)
    dense = tree.open(check)
    judge = Judge(tree, *check(dense["metrics"]))
    if not resume:
        start_or_resume(trainer, data, asked, resume=False)
    return judge


def start_or_resume(trainer: Trainer, data: RunData, asked: dict[str, Any], *, resume: bool) -> None:
    """Start a search in the run folder, or check that the search in it is the same.

    Raises:
        RecipeError: the search in it is another one.
    """
    folder = RunFolder(Path(trainer.default_root_dir))
    started = run_identity(trainer, data, trainer.stages) | asked
    if resume:
        folder.resume(started)
        if trainer.is_global_zero:
            folder.keep_recipe(trainer.recipe_text)
    elif trainer.is_global_zero:
        folder.open(started, trainer.recipe_text)


@contextmanager
def exclusive_run_folder(trainer: Trainer, store: ResultStore, show: Show | None) -> Iterator[None]:
    """Let one process at a time use the run folder; the next one finds the results in the store."""
    if not trainer.is_global_zero:
        yield
        return
    folder = Path(trainer.default_root_dir)
    # the lock lies in the store: the run folder itself may be moved aside
    whose = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    with store.locked(f"run-{whose}", f"{folder}: another process uses this run folder"):
        yield
        if show is not None:
            show(folder)


def link_folder(source: Path, target: Path) -> None:
    """Copy the folder ``source`` to ``target``, with hard links where the file system supports them."""
    temporary = target.with_name(f".{target.name}.tmp")
    for left in (temporary, target):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=_link)
    temporary.replace(target)


def _link(source: Any, target: Any) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
