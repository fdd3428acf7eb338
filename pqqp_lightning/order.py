"""The best order of the stages, each order from the same dense model, and how sure that is.

Which orders are measured is a strategy's choice (:mod:`pqqp_lightning.strategies`); :class:`PrefixTree` measures them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from pqqp_lightning.data_source import DataSource
from pqqp_lightning.errors import RecipeError, suggest
from pqqp_lightning.executor import LOCAL, Executor, Progress, TimeLimit, check_executor, executing
from pqqp_lightning.prefix_tree import Order, PrefixTree
from pqqp_lightning.recipe_check import check_recipe
from pqqp_lightning.results import ResultStore
from pqqp_lightning.run import MODEL, check_same_recipe, identity, open_folder
from pqqp_lightning.seeding import run_seed
from pqqp_lightning.stage import Stage
from pqqp_lightning.storage import check_writable, write_json
from pqqp_lightning.strategies import STRATEGIES, Strategy
from pqqp_lightning.trainer import Trainer
from pqqp_lightning.verdict import Judge, Verdict

ORDER = "order.json"
LOWER_IS_BETTER = ("perplexity", "loss", "error", "mse", "mae", "rmse")
HIGHER_IS_BETTER = ("top1", "top5", "accuracy", "acc", "f1", "auroc", "precision", "recall", "r2")
MOST_STAGES = 4
"""4 stages have 24 orders; 5 would have 120."""


def search_orders(
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule | None,
    *,
    resume: bool = False,
    metric: str | None = None,
    higher: bool | None = None,
    strategy: str = "exhaustive",
    max_runs: int | None = None,
    time_limit: float | None = None,
    comparable_only: bool = False,
    store: str | Path | None = None,
    executor: str = LOCAL,
) -> None:
    """Find the best order of the trainer's stages, and write ``order.json``.

    Args:
        trainer: has the stages, and the run folder as ``default_root_dir``.
        module: the dense model.
        datamodule: its data.
        resume: go on with the search in the run folder.
        metric: what decides; the module's ``primary_metric`` or the first metric by default.
        higher: whether more of it is better; known for common metrics.
        strategy: "exhaustive" for all orders that the stages' checks allow; "progressive" for the order of growing
            intensity and swaps of neighbours from there.
        max_runs: at most so many whole orders.
        time_limit: begin no further order after so many minutes.
        comparable_only: leave orders out that end larger than the smallest, or lose a constraint.
        store: folder of results that searches share; ``store`` beside the run folder by default.
        executor: "local", or "ray" for many nodes at the same time, on this machine or a cluster.

    Raises:
        RecipeError: everything that must be put right, before any work.
    """
    results = store_of(trainer, store)
    search = OrderSearch(trainer, DataSource(module, datamodule=datamodule), trainer.stages, results, executor)
    search.check(strategy, max_runs, time_limit)
    with alone(trainer, results):
        search.go(
            STRATEGIES[strategy], resume=resume, metric=metric, higher=higher, max_runs=max_runs, minutes=time_limit,
            comparable_only=comparable_only,
        )  # fmt: skip


class OrderSearch:
    """A search over the orders of ``stages``."""

    def __init__(
        self, trainer: Trainer, data: DataSource, stages: Sequence[Stage], store: ResultStore, executor: str = LOCAL
    ) -> None:
        self._trainer, self._data, self._stages = trainer, data, {stage.name: stage for stage in stages}
        self._folder = Path(trainer.default_root_dir)
        self._store, self._tree = store, PrefixTree(trainer, data, self._stages, store)
        self._executor, self._progress = executor, Progress("order", trainer, self._tree, bound="at most ")
        self._refused: dict[Order, list[str]] = {}
        self._allowed: list[Order] = []

    def check(self, strategy: str, max_runs: int | None, minutes: float | None) -> None:
        """Which orders can run; refuse if none can.

        Raises:
            RecipeError: too few or too many stages, bad options, or no order passes its checks.
        """
        problems = check_writable("store", self._store.folder) + check_executor(self._executor, self._trainer)
        if strategy not in STRATEGIES:
            problems.append(f"strategy='{strategy}' is none.{suggest(strategy, STRATEGIES)}")
        if max_runs is not None and max_runs < 1:
            problems.append(f"max_runs={max_runs} measures no order. Use 1 or more.")
        problems += check_time_limit(minutes)
        if not 2 <= len(self._stages) <= MOST_STAGES:
            problems.append(
                f"order: needs 2 to {MOST_STAGES} stages, but the recipe has {len(self._stages)}. Change the stages."
            )
        if problems:
            raise RecipeError(problems)
        for names in permutations(self._stages):
            try:
                check_recipe(self._trainer, self._data, [self._stages[name] for name in names])
                self._allowed.append(names)
            except RecipeError as error:
                self._refused[names] = error.problems
        if not self._allowed:
            raise RecipeError(dict.fromkeys(p for problems in self._refused.values() for p in problems))
        self._data.read(self._trainer)

    def go(
        self,
        strategy: type[Strategy],
        *,
        resume: bool,
        metric: str | None,
        higher: bool | None,
        max_runs: int | None,
        minutes: float | None,
        comparable_only: bool,
    ) -> None:
        """Search what is not searched yet."""
        with executing(self._executor, self._trainer, self._tree, self._progress) as executor:
            judge = open_search(
                self._trainer, self._data, self._tree, {"command": "order"}, resume=resume, metric=metric, higher=higher
            )
            chosen = strategy(list(self._stages), self._allowed, judge)
            self._announce(chosen, max_runs)
            measured, notes = self._measure(executor, chosen, max_runs, minutes)
        verdict = judge.decide(measured, comparable_only)
        self._finish(chosen, verdict, notes)

    def _measure(
        self, executor: Executor, strategy: Strategy, max_runs: int | None, minutes: float | None
    ) -> tuple[list[Order], list[str]]:
        """The orders that were measured, and why it are not more."""
        limit, measured = TimeLimit(self._trainer, minutes), list[Order]()
        for _ in executor.measure(strategy.first(), lambda: False):
            pass
        for round in strategy.rounds():
            before, done = measured, set[Order]()
            wanted = round if max_runs is None else round[: max_runs - len(before)]
            for order in executor.measure(wanted, lambda: bool(measured) and limit.is_over()):  # noqa: B023
                done.add(order)
                measured = [*before, *(o for o in wanted if o in done)]  # in the same order, whoever was first
                for node in strategy.finished(measured):
                    self._tree.drop(node)
            if len(done) < len(wanted):
                return measured, [f"stopped after {len(measured)} orders: time_limit={minutes:g} minutes"]
            if len(wanted) < len(round):
                return measured, [f"stopped after {max_runs} orders: max_runs={max_runs}"]
        return measured, []

    def _announce(self, strategy: Strategy, max_runs: int | None) -> None:
        most = strategy.most_applications(max_runs)
        known = sum(self._tree.is_known(node) for node in strategy.nodes(max_runs))
        self._progress.most = most - known
        if self._trainer.is_global_zero:
            words = f"order: {strategy.describe()}: at most {most} stage applications"
            print(words + (f", {known} of them known from before" if known else ""), flush=True)

    def _finish(self, strategy: Strategy, verdict: Verdict, notes: list[str]) -> None:
        model = self._tree.snapshot(verdict.best)
        if self._trainer.is_global_zero:
            _link_folder(model, self._folder / MODEL)
            write_json(
                self._folder / ORDER,
                {
                    "status": "finished",
                    "seed": run_seed(),
                    "strategy": strategy.name,
                    "applications": self._tree.applications,
                    **verdict.report(),
                    "refused": [{"order": list(order), "problems": p} for order, p in self._refused.items()],
                    "notes": notes,
                },
            )
        for node in self._tree.results():
            if node != verdict.best:
                self._tree.drop(node)


def store_of(trainer: Trainer, store: str | Path | None) -> ResultStore:
    """The results in ``store``, or beside the run folder."""
    return ResultStore(Path(store) if store is not None else Path(trainer.default_root_dir).parent / "store")


def check_time_limit(minutes: float | None) -> list[str]:
    """A problem if that is no time."""
    return (
        [f"time_limit={minutes} is no time. Give minutes above 0."] if minutes is not None and not minutes > 0 else []
    )


def open_search(
    trainer: Trainer,
    data: DataSource,
    tree: PrefixTree,
    asked: dict[str, Any],
    *,
    resume: bool,
    metric: str | None,
    higher: bool | None,
) -> Judge:
    """Measure the dense model, settle what decides, and then begin in the run folder, or go on there.

    Args:
        trainer: has the stages, and the run folder as ``default_root_dir``.
        data: the dense model and its data.
        tree: not open yet.
        asked: the command and what else makes two searches the same.
        resume: go on with the search in the run folder.
        metric: what the user wants.
        higher: what the user says.

    Raises:
        RecipeError: the run folder holds another search, or the metric is not known.
    """
    folder, started = Path(trainer.default_root_dir), identity(trainer, data, trainer.stages) | asked
    if resume:
        check_same_recipe(folder, started)
    dense = tree.open()
    judge = Judge(tree, *deciding_metric(data.module, dense["metrics"], metric, higher))
    if not resume and trainer.is_global_zero:
        open_folder(folder, started, trainer.recipe_text)
    return judge


@contextmanager
def alone(trainer: Trainer, store: ResultStore) -> Iterator[None]:
    """One process at a time searches in a run folder; the next one finds everything in the store."""
    if not trainer.is_global_zero:
        yield
        return
    folder = Path(trainer.default_root_dir)
    with store.locked(f"run-{folder.name}", f"{folder}: another process searches here"):
        yield


def deciding_metric(
    module: LightningModule, metrics: dict[str, float | None], metric: str | None, higher: bool | None
) -> tuple[str, bool]:
    """The metric that decides, and whether more of it is better.

    Args:
        module: may say both (``primary_metric``, ``higher_is_better``).
        metrics: what is measured.
        metric: what the user wants.
        higher: what the user says.

    Raises:
        RecipeError: it is not measured, or its direction is not known.
    """
    own = getattr(module, "primary_metric", None)
    chosen = metric or own or next(iter(metrics), "")
    if chosen not in metrics:
        raise RecipeError(f"metric='{chosen}' is not measured.{suggest(chosen, metrics)}")
    if higher is None and chosen == own:
        higher = getattr(module, "higher_is_better", None)
    word = chosen.lower()
    if higher is None and any(w in word for w in LOWER_IS_BETTER):
        higher = False
    if higher is None and any(w in word for w in HIGHER_IS_BETTER):
        higher = True
    if higher is None:
        raise RecipeError(f"metric='{chosen}': is more of it better? Say --higher_is_better true or false.")
    return chosen, higher


def _link_folder(source: Path, target: Path) -> None:
    """``target`` with the files of ``source``, which take no further disk where links can be made."""
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
