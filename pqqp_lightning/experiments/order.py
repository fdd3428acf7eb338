"""The best order of the stages, each order from the same dense model, and how sure that is.

A strategy chooses the orders (:mod:`pqqp_lightning.trials.strategies`); :class:`PrefixTree` measures them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from pqqp_lightning.errors import RecipeError, suggest
from pqqp_lightning.experiments.prediction import PREDICT, Prediction, check_prediction
from pqqp_lightning.experiments.repeats import Repeats, check_draws, check_repeats
from pqqp_lightning.experiments.session import (
    Show,
    alone,
    begin,
    check_store,
    check_time_limit,
    link_folder,
    open_search,
    store_of,
)
from pqqp_lightning.runs.checks import check_places, check_run
from pqqp_lightning.runs.run_data import DataSource
from pqqp_lightning.runs.trainer import Trainer
from pqqp_lightning.seeding import run_seed
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.storage.files import write_json
from pqqp_lightning.storage.reports import RepeatsReport
from pqqp_lightning.storage.result_store import ResultStore
from pqqp_lightning.storage.run_folder import RunFolder
from pqqp_lightning.trials.executors import LOCAL, Executor, check_executor, executing
from pqqp_lightning.trials.prefix_tree import Order, PrefixTree
from pqqp_lightning.trials.progress import Progress, TimeLimit
from pqqp_lightning.trials.strategies import STRATEGIES, Strategy
from pqqp_lightning.trials.verdict import Verdict

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
    repeats: int = 1,
    store: str | Path | None = None,
    executor: str = LOCAL,
    show: Show | None = None,
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
            intensity and moves of one stage from there; "predict" to measure nothing, and only say which order the
            layers' errors on calibration data speak for.
        max_runs: at most so many whole orders.
        time_limit: begin no further order after so many minutes.
        comparable_only: leave orders out that end larger than the smallest, or lose a constraint.
        repeats: measure the orders with so many draws of calibration samples, the recipe's own among them.
        store: folder of results that searches share; ``store`` beside the run folder by default.
        executor: "local", or "ray" for many nodes at the same time, on this machine or a cluster.
        show: what to do with the run folder at the end, before another process may search there.

    Raises:
        RecipeError: everything that must be put right, before any work.
    """
    results = store_of(trainer, store)
    search = OrderSearch(trainer, DataSource(module, datamodule=datamodule), trainer.stages, results, executor)
    search.check(strategy, max_runs, time_limit, repeats, comparable_only)
    with alone(trainer, results, show):
        if strategy == PREDICT:
            search.predict(resume=resume, metric=metric, higher=higher)
            return
        search.go(
            STRATEGIES[strategy], resume=resume, metric=metric, higher=higher, max_runs=max_runs, minutes=time_limit,
            comparable_only=comparable_only, repeats=repeats,
        )  # fmt: skip


class OrderSearch:
    """A search over the orders of ``stages``."""

    def __init__(
        self, trainer: Trainer, data: DataSource, stages: Sequence[Stage], store: ResultStore, executor: str = LOCAL
    ) -> None:
        self._trainer, self._data, self._stages = trainer, data, {stage.name: stage for stage in stages}
        self._folder = RunFolder(Path(trainer.default_root_dir))
        self._store, self._tree = store, PrefixTree(trainer, data, self._stages, store)
        self._executor, self._progress = executor, Progress("order", trainer, self._tree, bound="at most ")
        self._refused: dict[Order, list[str]] = {}
        self._allowed: list[Order] = []

    def check(
        self, strategy: str, max_runs: int | None, minutes: float | None, repeats: int, comparable_only: bool
    ) -> None:
        """Which orders can run; refuse if none can.

        Raises:
            RecipeError: too few or too many stages, bad options, or no order passes its checks.
        """
        problems = check_store(self._trainer, self._store) + check_executor(self._executor, self._trainer)
        if strategy not in (*STRATEGIES, PREDICT):
            problems.append(f"strategy='{strategy}' is none.{suggest(strategy, (*STRATEGIES, PREDICT))}")
        if strategy == PREDICT:
            problems += check_prediction(list(self._stages.values()))
            given: dict[str, tuple[Any, Any]] = {
                "max_runs": (max_runs, None),
                "time_limit": (minutes, None),
                "repeats": (repeats, 1),
                "comparable_only": (comparable_only, False),
                "executor": (self._executor, LOCAL),
            }
            problems += [
                f"{option}={value} has no effect with strategy={PREDICT}, which measures no order. Leave it out."
                for option, (value, default) in given.items()
                if value != default
            ]
        if max_runs is not None and max_runs < 1:
            problems.append(f"max_runs={max_runs} measures no order. Use 1 or more.")
        problems += check_time_limit(minutes) + check_repeats(repeats, self._data, list(self._stages.values()))
        problems += check_run(self._trainer, self._data, list(self._stages.values()))
        if not 2 <= len(self._stages) <= MOST_STAGES:
            problems.append(
                f"order: needs 2 to {MOST_STAGES} stages, but the recipe has {len(self._stages)}. Change the stages."
            )
        for names in permutations(self._stages) if len(self._stages) <= MOST_STAGES else ():
            if found := check_places([self._stages[name] for name in names], self._data):
                self._refused[names] = found
            else:
                self._allowed.append(names)
        if not self._allowed:
            problems += [problem for found in self._refused.values() for problem in found]
        if problems:
            raise RecipeError(dict.fromkeys(problems))
        self._data.read(self._trainer)
        if self._trainer.is_global_zero and (problems := check_draws(self._data, repeats)):
            raise RecipeError(problems)

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
        repeats: int = 1,
    ) -> None:
        """Search what is not searched yet."""
        with executing(self._executor, self._trainer, self._tree, self._progress) as executor:
            judge = open_search(
                self._trainer, self._data, self._tree, {"command": "order"}, resume=resume, metric=metric, higher=higher
            )
            chosen = strategy(list(self._stages), self._allowed, judge)
            self._announce(chosen, max_runs, repeats)
            limit = TimeLimit(self._trainer, minutes)
            measured, notes = self._measure(executor, chosen, max_runs, limit)
        verdict = judge.decide(measured, comparable_only)
        if comparable_only and all(verdict.marks.values()):
            notes.append("comparable_only leaves no order: every one is marked, and so all of them compete")
        again = Repeats(self._trainer, self._data, self._stages, self._store, self._tree, judge)
        repeated = again.report(verdict.ranked, repeats, limit)
        if repeated and len(repeated["seeds"]) < repeats:
            notes.append(f"stopped after {len(repeated['seeds'])} of {repeats} draws: time_limit={minutes:g} minutes")
        self._finish(chosen, verdict, notes, repeated, again.applications)

    def predict(self, *, resume: bool, metric: str | None, higher: bool | None) -> None:
        """Say which order is best without measuring any, and write ``prediction.json``."""
        begin(self._trainer, self._data, {"command": "order", "strategy": PREDICT}, resume=resume)
        self._tree.identify()
        prediction = Prediction(self._tree, self._stages, self._allowed, self._store.folder)
        report = prediction.report() | {"measured": prediction.measured(self._data.module, metric, higher)}
        self._tree.drop(())
        if self._trainer.is_global_zero:
            report["refused"] = [{"order": list(order), "problems": p} for order, p in self._refused.items()]
            write_json(self._folder.prediction, report)

    def _measure(
        self, executor: Executor, strategy: Strategy, max_runs: int | None, limit: TimeLimit
    ) -> tuple[list[Order], list[str]]:
        """The orders that were measured, and why it are not more."""
        measured = list[Order]()
        for _ in executor.measure(strategy.first(), lambda: False):
            pass
        for round in strategy.rounds():
            before, done = measured, set[Order]()
            most = len(round) if max_runs is None else max_runs - len(before)
            wanted = [order for i, order in enumerate(round) if i < most or self._tree.is_known(order)]
            for order in executor.measure(wanted, lambda: bool(measured) and limit.is_over()):  # noqa: B023
                done.add(order)
                measured = [*before, *(o for o in wanted if o in done)]  # in the same order, whoever was first
                for node in strategy.finished(measured):
                    self._tree.drop(node)
            if len(done) < len(wanted):
                return measured, [f"stopped after {len(measured)} orders: time_limit={limit.minutes:g} minutes"]
            if len(wanted) < len(round):
                return measured, [f"stopped after {len(measured)} orders: max_runs={max_runs}"]
        if left := strategy.untried():
            words = ", ".join(" -> ".join(order) for order in left)
            return measured, [f"stopped after {len(measured)} orders, as many as this strategy tries; untried: {words}"]
        return measured, []

    def _announce(self, strategy: Strategy, max_runs: int | None, repeats: int) -> None:
        most, sure = strategy.most_applications(max_runs), set(strategy.nodes(max_runs))
        known = len(sure - self._tree.missing(sure))
        self._progress.most = most - known
        if self._trainer.is_global_zero:
            words = f"order: {strategy.describe()}: at most {most} stage applications"
            words += f", {known} of them known from before" if known else ""
            words += (
                f"; as many again for each of {repeats - 1} further draws of calibration samples" if repeats > 1 else ""
            )
            print(words, flush=True)

    def _finish(
        self, strategy: Strategy, verdict: Verdict, notes: list[str], repeats: RepeatsReport | None, more: int
    ) -> None:
        self._tree.take_model(verdict.best, lambda model: link_folder(model, self._folder.model))
        if self._trainer.is_global_zero:
            write_json(
                self._folder.order,
                {
                    "status": "finished",
                    "seed": run_seed(),
                    "strategy": strategy.name,
                    "applications": self._tree.applications + more,
                    **verdict.report(),
                    "repeats": repeats,
                    "refused": [{"order": list(order), "problems": p} for order, p in self._refused.items()],
                    "notes": notes,
                },
            )
        for node in self._tree.results():
            if node != verdict.best:
                self._tree.drop(node)
