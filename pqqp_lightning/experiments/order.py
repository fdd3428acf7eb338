"""Searches the best order of the stages, each from the same dense model, and how certain it is.

A strategy chooses the orders (:mod:`pqqp_lightning.trials.strategies`); :class:`PrefixTree` measures them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from pqqp_lightning.errors import Problem, RecipeError, suggest
from pqqp_lightning.experiments.options import OrderOptions
from pqqp_lightning.experiments.prediction import PREDICT, Prediction, check_prediction
from pqqp_lightning.experiments.repeats import Repeats, check_draws, check_repeats
from pqqp_lightning.experiments.session import (
    Show,
    check_experiment,
    exclusive_run_folder,
    link_folder,
    open_search,
    start_or_resume,
    store_of,
)
from pqqp_lightning.runs.checks import check_places, read_data
from pqqp_lightning.runs.layer_probe import probe_layers
from pqqp_lightning.runs.preparation import prepare
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.trainer import Trainer
from pqqp_lightning.seeding import run_seed
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.storage.files import write_json
from pqqp_lightning.storage.reports import RepeatsReport
from pqqp_lightning.storage.result_store import ResultStore
from pqqp_lightning.storage.run_folder import RunFolder
from pqqp_lightning.trials.executors import Executor, open_executor
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
    options: OrderOptions = OrderOptions(),  # noqa: B008 (frozen)
    *,
    resume: bool = False,
    show: Show | None = None,
) -> None:
    """Find the best order of the trainer's stages, and write ``order.json``.

    Args:
        trainer: has the stages, and the run folder as ``default_root_dir``.
        module: the dense model.
        datamodule: its data.
        options: the metric, the strategy and its limits.
        resume: continue the search in the run folder.
        show: called with the run folder at the end, before another process may use it.

    Raises:
        RecipeError: with every problem, before any work.
    """
    results = store_of(trainer, options.store)
    data = RunData(module, datamodule=datamodule)
    prepare(trainer, data)
    search = OrderSearch(trainer, data, trainer.stages, results, options)
    search.check()
    with exclusive_run_folder(trainer, results, show):
        if options.strategy == PREDICT:
            search.predict(resume=resume)
        else:
            search.run(resume=resume)


class OrderSearch:
    """A search over the orders of ``stages``."""

    def __init__(
        self,
        trainer: Trainer,
        data: RunData,
        stages: Sequence[Stage],
        store: ResultStore,
        options: OrderOptions,
    ) -> None:
        self._trainer = trainer
        self._data = data
        self._stages = {stage.name: stage for stage in stages}
        self._options = options
        self._folder = RunFolder(Path(trainer.default_root_dir))
        self._store = store
        self._tree = PrefixTree(trainer, data, self._stages, store)
        self._progress = Progress("order", trainer, self._tree, bound="at most ")
        self._refused: dict[Order, list[Problem]] = {}
        self._allowed: list[Order] = []

    def check(self) -> None:
        """Find the orders that can run, and refuse if there is none.

        Raises:
            RecipeError: too few or too many stages, bad options, or no order passes its checks.
        """
        stages, options = list(self._stages.values()), self._options
        problems = check_experiment(self._trainer, self._data, self._store, options) + self._check_strategy()
        if options.max_runs is not None and options.max_runs < 1:
            problems.append(Problem("max_runs", options.max_runs, "measures no order", "Use 1 or more."))
        problems += check_repeats(options.repeats, self._data, stages)
        if not 2 <= len(self._stages) <= MOST_STAGES:
            text = f"order needs 2 to {MOST_STAGES} stages, but the recipe has {len(self._stages)}"
            problems.append(Problem(text=text, way_out="Change the stages.").within("stages"))
        problems += self._check_orders()
        if problems:
            raise RecipeError(problems)
        read_data(self._trainer, self._data, stages)
        # how the model uses its layers shows only once there is data to run it on
        if probe_layers(self._trainer, self._data, stages) and (problems := self._check_orders()):
            raise RecipeError(problems)
        # draws can be compared only once the data is read
        if self._trainer.is_global_zero and (problems := check_draws(self._data, options.repeats)):
            raise RecipeError(problems)

    def _check_orders(self) -> list[Problem]:
        """Find the allowed and the refused orders; the problems of all if none is allowed."""
        self._refused, self._allowed = {}, []
        for names in permutations(self._stages) if len(self._stages) <= MOST_STAGES else ():
            if found := check_places([self._stages[name] for name in names], self._data):
                self._refused[names] = found
            else:
                self._allowed.append(names)
        # order.json reports refused orders; they are an error only if no order is left
        return [] if self._allowed else [problem for found in self._refused.values() for problem in found]

    def _check_strategy(self) -> list[Problem]:
        """The problems of the strategy, and of options that it does not use."""
        strategy = self._options.strategy
        known = (*STRATEGIES, PREDICT)
        if strategy not in known:
            return [Problem("strategy", strategy, "is unknown", suggest(strategy, known).strip())]
        if strategy != PREDICT:
            return []
        problems: list[Problem] = list(check_prediction(list(self._stages.values())))
        for name in ("max_runs", "time_limit", "repeats", "comparable_only", "executor"):
            value = getattr(self._options, name)
            if value != getattr(OrderOptions, name):
                reason = f"has no effect with strategy='{PREDICT}', which measures no order"
                problems.append(Problem(name, value, reason, "Leave it out."))
        return problems

    def run(self, *, resume: bool) -> None:
        """Measure the orders that are not known yet, and write ``order.json``."""
        options = self._options
        with open_executor(options.executor, self._trainer, self._tree, self._progress) as executor:
            judge = open_search(self._trainer, self._data, self._tree, {"command": "order"}, options, resume=resume)
            chosen = STRATEGIES[options.strategy](list(self._stages), self._allowed, judge)
            self._announce(chosen, options.max_runs, options.repeats)
            limit = TimeLimit(self._trainer, options.time_limit)
            measured, notes = self._measure(executor, chosen, options.max_runs, limit)
        verdict = judge.decide(measured, options.comparable_only)
        if options.comparable_only and all(verdict.marks.values()):
            notes.append("comparable_only leaves no order: every one is marked, and so all of them compete")
        again = Repeats(self._trainer, self._data, self._stages, self._store, self._tree, judge)
        repeated = again.report(verdict.ranked, options.repeats, limit)
        if repeated and len(repeated["seeds"]) < options.repeats:
            drawn = f"{len(repeated['seeds'])} of {options.repeats} draws"
            notes.append(f"stopped after {drawn}: time_limit={options.time_limit:g} minutes")
        self._finish(chosen, verdict, notes, repeated, again.applications)

    def predict(self, *, resume: bool) -> None:
        """Predict the best order without measuring any, and write ``prediction.json``."""
        start_or_resume(self._trainer, self._data, {"command": "order", "strategy": PREDICT}, resume=resume)
        self._tree.identify()
        prediction = Prediction(self._tree, self._stages, self._allowed, self._store.folder)
        metric, higher = self._options.metric, self._options.higher_is_better
        report = prediction.report() | {"measured": prediction.measured(self._data.module, metric, higher)}
        self._tree.drop(())
        if self._trainer.is_global_zero:
            report["refused"] = self._refused_orders()
            write_json(self._folder.prediction, report)

    def _refused_orders(self) -> list[dict[str, Any]]:
        """The orders that cannot run, with the reasons, as plain data."""
        return [
            {"order": list(order), "problems": list(map(str, problems))} for order, problems in self._refused.items()
        ]

    def _measure(
        self, executor: Executor, strategy: Strategy, max_runs: int | None, limit: TimeLimit
    ) -> tuple[list[Order], list[str]]:
        """The measured orders, and the reason if the search stopped early."""
        measured = list[Order]()
        for _ in executor.measure(strategy.first(), lambda: False):
            pass
        for round in strategy.rounds():
            before, done = measured, set[Order]()
            most = len(round) if max_runs is None else max_runs - len(before)
            # orders beyond max_runs cost nothing if they are known
            wanted = [order for i, order in enumerate(round) if i < most or self._tree.is_known(order)]
            for order in executor.measure(wanted, lambda: bool(measured) and limit.is_over()):  # noqa: B023
                done.add(order)
                measured = [
                    *before,
                    *(o for o in wanted if o in done),
                ]  # in the strategy's order, whichever process finished first
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
            words += f", {known} of them already measured" if known else ""
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
                    "refused": self._refused_orders(),
                    "notes": notes,
                },
            )
        for node in self._tree.results():
            if node != verdict.best:
                self._tree.drop(node)
