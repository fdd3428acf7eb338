"""``sweep``: measures a grid of arguments in every order, and tests the hypothesis about the order of compression."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.experiments.options import SweepOptions
from pqqp_lightning.experiments.session import (
    Show,
    check_experiment,
    exclusive_run_folder,
    open_search,
    store_of,
)
from pqqp_lightning.experiments.sweep_grid import Point
from pqqp_lightning.experiments.sweep_pair import PairAnalysis, analyse, pair_notes
from pqqp_lightning.experiments.sweep_plan import Plan, make_plan
from pqqp_lightning.report.pictures import draw_sweep
from pqqp_lightning.report.sweep_numbers import write_tables
from pqqp_lightning.runs.checks import read_data
from pqqp_lightning.runs.layer_probe import probe_layers
from pqqp_lightning.runs.preparation import prepare
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.trainer import Trainer
from pqqp_lightning.seeding import run_seed
from pqqp_lightning.storage.files import write_json
from pqqp_lightning.storage.records import finite_or_none, hardware, package_versions
from pqqp_lightning.storage.reports import AloneReport, PointReport, SweepReport
from pqqp_lightning.storage.result_store import ResultStore
from pqqp_lightning.storage.run_folder import RunFolder
from pqqp_lightning.trials.executors import Executor, open_executor
from pqqp_lightning.trials.prefix_tree import PrefixTree, prefixes
from pqqp_lightning.trials.progress import Progress, TimeLimit
from pqqp_lightning.trials.verdict import Judge


def sweep_grid(
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule | None,
    options: SweepOptions,
    *,
    resume: bool = False,
    show: Show | None = None,
) -> None:
    """Measure every point of ``options.grid`` in every order, and write ``sweep.json``, tables and figures.

    Args:
        trainer: has the stages, and the run folder as ``default_root_dir``.
        module: the dense model.
        datamodule: its data.
        options: the grid, the metric and the limits.
        resume: continue the sweep in the run folder.
        show: called with the run folder at the end, before another process may use it.

    Raises:
        RecipeError: with every problem, before any work.
    """
    results = store_of(trainer, options.store)
    data = RunData(module, datamodule=datamodule)
    prepare(trainer, data)
    plan = check_sweep(trainer, data, results, options)
    read_data(trainer, data, trainer.stages)
    if probe_layers(trainer, data, trainer.stages):  # it shows only now how the model uses its layers
        plan = check_sweep(trainer, data, results, options)
    with exclusive_run_folder(trainer, results, show):
        Sweep(trainer, data, plan, results, options).run(resume=resume)


def check_sweep(trainer: Trainer, data: RunData, store: ResultStore, options: SweepOptions) -> Plan:
    """The plan of the sweep.

    Raises:
        RecipeError: with every problem.
    """
    problems = check_experiment(trainer, data, store, options)
    max_points = options.max_points
    if max_points < 1:
        problems.append(Problem("max_points", max_points, "allows no point", "Use 1 or more."))
    # a bad max_points is already reported, so that make_plan must not report it again
    try:
        plan = make_plan(trainer.stages, data, replace(options, max_points=max(1, max_points)))
    except RecipeError as error:
        problems += error.problems
    if problems:
        raise RecipeError(problems)
    return plan


class Sweep:
    """Measures a plan and writes its results.

    Args:
        trainer: for evaluation and training.
        data: the dense model and its data.
        plan: what to measure.
        store: reads and keeps results.
        options: the grid as the user gave it, the executor and the limits.
    """

    def __init__(self, trainer: Trainer, data: RunData, plan: Plan, store: ResultStore, options: SweepOptions) -> None:
        self._trainer, self._data, self._plan = trainer, data, plan
        self._options = options
        # as it will be read back from the run folder, for the comparison when the sweep is resumed
        self._grid = json.loads(json.dumps(options.grid, default=str))
        self._folder = RunFolder(Path(trainer.default_root_dir))
        self._tree = PrefixTree(trainer, data, {step: v.stage for step, v in plan.steps.items()}, store)
        self._nodes = list(dict.fromkeys(node for sequence in plan.sequences for node in prefixes(sequence)))
        self._progress = Progress("sweep", trainer, self._tree)

    def run(self, *, resume: bool) -> None:
        """Measure what the store does not have, and write report, tables and figures."""
        asked: dict[str, Any] = {"command": "sweep", "grid": self._grid}
        if self._options.last:  # folders of earlier versions do not name them
            asked["last"] = list(self._options.last)
        with open_executor(self._options.executor, self._trainer, self._tree, self._progress) as executor:
            judge = open_search(self._trainer, self._data, self._tree, asked, self._options, resume=resume)
            self._announce()
            notes = self._measure(executor, self._options.time_limit)
        if self._trainer.is_global_zero:
            report = self._report(judge, notes)
            report["figures"] = draw_sweep(self._folder, report)
            write_json(self._folder.sweep, report)
            write_tables(self._folder, report)
        for node in self._tree.results():
            self._tree.drop(node)

    def _announce(self) -> None:
        known = sum(self._tree.is_known(node) for node in self._nodes)
        self._progress.most = most = len(self._tree.missing(self._nodes))
        if self._trainer.is_global_zero:
            points, orders = len(self._plan.points), sum(len(point.orders) for point in self._plan.points)
            words = f"sweep: {points} points, {orders} orders, {len(self._nodes)} results"
            words += f", {known} of them already measured" if known else ""
            print(f"{words}: {most} stage applications", flush=True)

    def _measure(self, executor: Executor, minutes: float | None) -> list[str]:
        """Measure every sequence; drop each model when no sequence still starts from it."""
        limit, left = TimeLimit(self._trainer, minutes), len(self._plan.sequences)
        waiting = Counter(node for sequence in self._plan.sequences for node in prefixes(sequence))
        for sequence in executor.measure(self._plan.sequences, limit.is_over):
            left -= 1
            for node in prefixes(sequence):
                waiting[node] -= 1
                if not waiting[node]:
                    self._tree.drop(node)
        if not left:
            return []
        of_all = f"{left} of {len(self._plan.sequences)} sequences of stages"
        return [f"stopped at time_limit={minutes:g} minutes: {of_all} not measured"]

    def _report(self, judge: Judge, notes: list[str]) -> SweepReport:
        """Plain data for ``sweep.json``."""
        plan, points = self._plan, [self._point(point, judge) for point in self._plan.points]
        report: SweepReport = {
            "status": "stopped" if notes else "finished",
            "seed": run_seed(),
            "versions": package_versions(),
            "hardware": hardware(),
            "metric": judge.metric,
            "higher_is_better": judge.higher,
            "stages": list(plan.variants),
            "grid": self._grid,
            "applications": self._tree.applications,
            "dense": self._tree.measure(()).record,
            "alone": self._alone(judge),
            "points": points,
            "notes": notes,
        }
        if self._options.last:
            report["last"] = self._options.last
        if plan.curve is not None:
            analysis = PairAnalysis(judge, plan.curve, self._options.last)
            curves = analysis.curves()
            for entry, point in zip(points, plan.points, strict=True):
                entry["pair"] = analysis.point(point, curves)
            report["pruning"], report["quantizing"] = plan.curve.other, plan.curve.name
            report["curves"] = curves
            report["hypothesis"] = analyse(points, plan.curve)
            notes += pair_notes(points, curves, plan.curve)
        return report

    def _alone(self, judge: Judge) -> list[AloneReport]:
        """Every variant that was measured alone; its intensity is M(dense) - M."""
        known = self._tree.results()
        return [
            {
                "step": step,
                "stage": variant.name,
                "knobs": variant.plain,
                "intensity": finite_or_none(judge.score(()) - judge.score((step,))),
                "record": known[(step,)].record,
            }
            for step, variant in self._plan.steps.items()
            if (step,) in known
        ]

    def _point(self, point: Point, judge: Judge) -> PointReport:
        """One point: its measured orders, and those that cannot run."""
        known, names = self._tree.results(), {v.step: v.name for v in point.variants}
        measured = [order for order in point.orders if order in known]
        marks = judge.marks(measured) if measured else {}
        ranked = sorted(measured, key=judge.score, reverse=True)
        return {
            "knobs": {variant.name: variant.plain for variant in point.variants},
            "steps": {variant.name: variant.step for variant in point.variants},
            "orders": [
                {
                    "order": [names[step] for step in order],
                    "record": known[order].record,
                    "marks": marks[order],
                }
                for order in ranked
            ],
            "refused": [
                {"order": [names[step] for step in order], "problems": list(map(str, problems))}
                for order, problems in point.refused.items()
            ],
        }
