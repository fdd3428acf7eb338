"""``analyze``: compares the layers under the two orders of two stages.

It measures each layer on its inputs in the dense model: the relative errors of its outputs after each stage alone and
after both orders, and the interference Delta = e(both) - e(one) - e(other). It also tests on this model what the
theorems of Kim et al. (arXiv 2603.18426) assume: disjoint selectivity, and independence of the layers' errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from lightning.pytorch import LightningDataModule, LightningModule

from pqqp_lightning.algorithms.interference import additivity
from pqqp_lightning.calibration.layer_errors import (
    Layers,
    block_changes,
    layer_errors,
    layers_of,
    mixed_share,
)
from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.experiments.options import AnalysisOptions
from pqqp_lightning.experiments.session import Show, check_experiment, exclusive_run_folder, open_search, store_of
from pqqp_lightning.report.analysis_numbers import layer_rows, order_key
from pqqp_lightning.report.pictures import draw_analysis
from pqqp_lightning.runs.checks import check_places, read_data
from pqqp_lightning.runs.layer_probe import probe_layers
from pqqp_lightning.runs.preparation import prepare
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.trainer import Trainer
from pqqp_lightning.seeding import run_seed
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.storage.disk_tensors import DiskTensors
from pqqp_lightning.storage.files import write_csv, write_json
from pqqp_lightning.storage.records import hardware, package_versions
from pqqp_lightning.storage.reports import AdditivityReport, AnalysisReport
from pqqp_lightning.storage.result_store import ResultStore
from pqqp_lightning.storage.run_folder import RunFolder
from pqqp_lightning.trials.prefix_tree import Order, PrefixTree
from pqqp_lightning.trials.verdict import Judge

BLOCKWISE = 2
"""Samples for the changes by single blocks, which take one pass for each block."""


def analyze_pair(
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule | None,
    options: AnalysisOptions = AnalysisOptions(),  # noqa: B008 (frozen)
    *,
    resume: bool = False,
    show: Show | None = None,
) -> None:
    """Compare the layers after each of two stages and after both orders, and write ``analysis.json``.

    Args:
        trainer: has the two stages, and the run folder as ``default_root_dir``.
        module: the dense model.
        datamodule: its data.
        options: the metric that judges the orders, and the samples to compare on.
        resume: continue the analysis in the run folder.
        show: called with the run folder at the end, before another process may use it.

    Raises:
        RecipeError: with every problem, before any work.
    """
    results = store_of(trainer, options.store)
    data = RunData(module, datamodule=datamodule)
    prepare(trainer, data)
    orders = check_analysis(trainer, data, results, options)
    read_data(trainer, data, trainer.stages)
    if probe_layers(trainer, data, trainer.stages):  # it shows only now how the model uses its layers
        orders = check_analysis(trainer, data, results, options)
    with exclusive_run_folder(trainer, results, show):
        Analysis(trainer, data, orders, results, options).run(resume=resume)


def check_analysis(trainer: Trainer, data: RunData, store: ResultStore, options: AnalysisOptions) -> list[Order]:
    """The orders of the two stages that can run.

    Raises:
        RecipeError: with every problem.
    """
    stages: Sequence[Stage] = trainer.stages
    problems = check_experiment(trainer, data, store, options)
    samples = options.samples
    if samples < 1:
        problems.append(Problem("samples", samples, "compares nothing", "Use 1 or more."))
    if len(stages) != 2:
        text = f"analyze needs 2 stages, but the recipe has {len(stages)}"
        problems.append(Problem(text=text, way_out="Change the stages.").within("stages"))
    text = "changes the inputs and outputs of layers, so that they cannot be compared with the dense ones"
    problem = Problem(text=text, way_out="Apply it first with fit, and analyze two other stages on that run's model.")
    for stage in stages:
        if not stage.comparable_layers:
            problems.append(problem.within(f"stages.{stage.name}", type(stage).__name__))
    if problems:
        raise RecipeError(problems)
    found: dict[Order, list[Problem]] = {
        (a.name, b.name): check_places([a, b], data) for a, b in (stages, stages[::-1])
    }
    if orders := [order for order, refused in found.items() if not refused]:
        return orders
    raise RecipeError(dict.fromkeys(problem for refused in found.values() for problem in refused))


class Analysis:
    """Measures two stages alone and in ``orders``, and compares the layers.

    Args:
        trainer: for evaluation and training.
        data: the dense model and its data.
        orders: the orders that can run.
        store: reads and keeps results.
        options: the metric that judges the orders, and the samples to compare on.
    """

    def __init__(
        self, trainer: Trainer, data: RunData, orders: Sequence[Order], store: ResultStore, options: AnalysisOptions
    ) -> None:
        self._trainer, self._data, self._orders = trainer, data, orders
        self._options, self._samples = options, options.samples
        self._folder = RunFolder(Path(trainer.default_root_dir))
        self._store = store
        self._stages = {stage.name: stage for stage in trainer.stages}
        self._tree = PrefixTree(trainer, data, self._stages, store)

    def run(self, *, resume: bool) -> None:
        """Measure what the store does not have, compare, and write the report."""
        asked = {"command": "analyze", "samples": self._samples}
        judge = open_search(self._trainer, self._data, self._tree, asked, self._options, resume=resume)
        nodes = [*((order[0],) for order in self._orders), *self._orders]
        for node in nodes:
            self._tree.measure(node)
        with DiskTensors(self._store.folder) as disk:
            names = self._tree.targeted
            variants = {order_key(n): layers_of(self._tree.bring_to(n), names, disk) for n in nodes}
            report = self._report(judge, variants)
        if self._trainer.is_global_zero:
            write_csv(self._folder.layers, layer_rows(report))
            report["figures"] = draw_analysis(self._folder, report)
            write_json(self._folder.analysis, report)
        # the models are large, and the report is complete; the records stay in the store
        for node in self._tree.results():
            self._tree.drop(node)

    def _report(self, judge: Judge, variants: Mapping[str, Layers]) -> AnalysisReport:
        """Plain data for ``analysis.json``."""
        self._tree.bring_to(())
        best = max(self._orders, key=judge.score)
        with self._tree.walking("analyze") as walk:
            compared = walk.first(self._samples)
            errors = layer_errors(compared, variants)
            few = walk.first(min(BLOCKWISE, self._samples))
            # a model without blocks is one block, and has no changes to add up
            adding = None if "" in walk.blocks else additivity(*block_changes(few, variants[order_key(best)]))
        first, second = self._orders[0], self._orders[-1]
        return {
            "status": "finished",
            "seed": run_seed(),
            "versions": package_versions(),
            "hardware": hardware(),
            "metric": judge.metric,
            "higher_is_better": judge.higher,
            "stages": list(self._stages),
            "orders": [list(order) for order in self._orders],
            "samples": compared.samples,
            "records": {order_key(node): result.record for node, result in self._tree.results().items()},
            "advantage": None if first == second else judge.difference(first, second).plain(),
            "best": list(best),
            "layers": [{"name": name, "errors": found} for name, found in errors.items()],
            "gone": {
                key: [name for name, layer in layers.items() if layer is None] for key, layers in variants.items()
            },
            "selectivity": {order_key(order): mixed_share(variants[order_key(order)]) for order in self._orders},
            "additivity": None if adding is None else cast(AdditivityReport, asdict(adding)),
        }
