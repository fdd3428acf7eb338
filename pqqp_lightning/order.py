"""Every order of the stages, each from the same dense model; a common prefix is computed once.

The orders form a tree: a node is a sequence of stages, its children add one more. The tree is walked depth first.
Every node is saved as a packed checkpoint with its record, so that a killed search goes on where it was, and one
model is in memory. A node's checkpoint is removed when everything below it is done; the best order's is kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule

from pqqp_lightning.checkpoint import MANIFEST, save_checkpoint
from pqqp_lightning.data_source import DataSource
from pqqp_lightning.errors import RecipeError, suggest
from pqqp_lightning.recipe_check import check_recipe
from pqqp_lightning.record import Record, package_versions
from pqqp_lightning.run import MODEL, check_same_recipe, identity, open_folder
from pqqp_lightning.runner import Runner
from pqqp_lightning.seeding import run_seed
from pqqp_lightning.stage import Stage
from pqqp_lightning.storage import append_line, read_lines, write_json
from pqqp_lightning.trainer import Trainer

Order = tuple[str, ...]
ORDER, NODES, FOLDERS = "order.json", "nodes.jsonl", "nodes"
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
) -> None:
    """Apply the trainer's stages in every order that their checks allow, and write ``order.json``.

    Args:
        trainer: has the stages, and the run folder as ``default_root_dir``.
        module: the dense model.
        datamodule: its data.
        resume: go on with the search in the run folder.
        metric: what decides; the module's ``primary_metric`` or the first metric by default.
        higher: whether more of it is better; known for common metrics.

    Raises:
        RecipeError: everything that must be put right, before any work.
    """
    data = DataSource(module, datamodule=datamodule)
    search = OrderSearch(trainer, data, trainer.stages)
    search.go(resume=resume, metric=metric, higher=higher)


class OrderSearch:
    """An exhaustive search over the orders of ``stages``."""

    def __init__(self, trainer: Trainer, data: DataSource, stages: Sequence[Stage]) -> None:
        self._trainer, self._data, self._runner = trainer, data, Runner(trainer, data)
        self._stages = {stage.name: stage for stage in stages}
        self._folder = Path(trainer.default_root_dir)
        self._nodes: dict[Order, Record] = {}
        self._refused: dict[Order, list[str]] = {}
        self._orders: list[Order] = []
        self._metric, self._higher = "", True

    def go(self, *, resume: bool, metric: str | None, higher: bool | None) -> None:
        """Search what is not searched yet."""
        self._check()
        started = identity(self._trainer, self._data, list(self._stages.values())) | {"command": "order"}
        if resume:
            check_same_recipe(self._folder, started)
            self._nodes = {tuple(n["order"]): n["record"] for n in read_lines(self._folder / NODES)}
        dense = self._measure_dense()
        self._metric, self._higher = self._deciding_metric(dense["metrics"], metric, higher)
        if not resume and self._trainer.is_global_zero:
            open_folder(self._folder, started, self._trainer.recipe_text)
        self._save_dense(dense)
        self._visit(())
        self._finish()

    def _check(self) -> None:
        """Which orders can run; refuse if none can.

        Raises:
            RecipeError: too few or too many stages, or no order passes its checks.
        """
        count = len(self._stages)
        if not 2 <= count <= MOST_STAGES:
            raise RecipeError(f"order: needs 2 to {MOST_STAGES} stages, but the recipe has {count}. Change the stages.")
        for names in permutations(self._stages):
            try:
                check_recipe(self._trainer, self._data, [self._stages[name] for name in names])
                self._orders.append(names)
            except RecipeError as error:
                self._refused[names] = error.problems
        if not self._orders:
            raise RecipeError(dict.fromkeys(p for problems in self._refused.values() for p in problems))
        self._data.read(self._trainer)

    def _measure_dense(self) -> Record:
        """The baseline's record; nothing is written yet."""
        stages = list(self._stages.values())
        if () in self._nodes:
            self._runner.resume()
            self._runner.describe_dense(stages)
            self._runner.dense = self._nodes[()]
            return self._nodes[()]
        loggers, self._trainer.loggers = self._trainer.loggers, []
        try:
            return self._runner.measure_dense(stages)
        finally:
            self._trainer.loggers = loggers

    def _save_dense(self, record: Record) -> None:
        if () not in self._nodes:
            self._add((), record)
        if self._trainer.is_global_zero and not self._is_saved(()):
            save_checkpoint(self._data.module, self._node_folder(()))
        self._trainer.strategy.barrier("dense")

    def _visit(self, prefix: Order) -> None:
        """Everything below ``prefix`` that is not done yet."""
        for name in self._stages:
            child = (*prefix, name)
            below = [order for order in self._orders if order[: len(child)] == child]
            if not below or all(order in self._nodes for order in below):
                continue
            if child not in self._nodes or not self._is_saved(child):
                self._load(prefix)
                self._add(child, self._runner.apply(self._stages[name], self._node_folder(child)))
            self._visit(child)
            self._drop(child if len(child) < len(self._stages) else None)

    def _load(self, node: Order) -> None:
        """Bring the model to ``node``."""
        self._runner.load(self._node_folder(node))

    def _drop(self, node: Order | None) -> None:
        """Remove a finished node's checkpoint, and those of whole orders that are not the best so far."""
        if self._trainer.is_global_zero:
            best = self._best()
            whole = [o for o in self._orders if o in self._nodes and o != best]
            for finished in [*whole, *([] if node is None else [node])]:
                shutil.rmtree(self._node_folder(finished), ignore_errors=True)
        self._trainer.strategy.barrier("dropped")

    def _finish(self) -> None:
        if not self._trainer.is_global_zero:
            return
        best = self._best()
        assert best is not None
        if self._is_saved(best):
            shutil.rmtree(self._folder / MODEL, ignore_errors=True)
            self._node_folder(best).replace(self._folder / MODEL)
        write_json(self._folder / ORDER, self._report(best))
        shutil.rmtree(self._folder / FOLDERS, ignore_errors=True)

    def _report(self, best: Order) -> dict[str, object]:
        dense = self._nodes[()]
        orders = [
            {
                "order": list(order),
                "stages": [dense, *(self._nodes[order[: i + 1]] for i in range(len(order)))],
                "metrics": self._nodes[order]["metrics"],
                "size_bytes": self._nodes[order]["size_bytes"],
            }
            for order in self._orders
        ]
        return {
            "status": "finished",
            "seed": run_seed(),
            "versions": package_versions(),
            "metric": self._metric,
            "higher_is_better": self._higher,
            "orders": sorted(orders, key=lambda o: self._score(tuple(o["order"])), reverse=True),
            "best": list(best),
            "advantage": self._advantages(),
            "refused": [{"order": list(order), "problems": p} for order, p in self._refused.items()],
        }

    def _advantages(self) -> dict[str, float | None]:
        """A(f1->f2) = M(f2(f1(model))) - M(f1(f2(model))) of each pair, from the orders that begin with it."""
        found = {}
        for first, second in permutations(self._stages, 2):
            there, back = self._nodes.get((first, second)), self._nodes.get((second, first))
            if there and back:
                a, b = self._score((first, second)), self._score((second, first))
                finite = max(abs(a), abs(b)) != float("inf")
                found[f"{first}->{second}"] = a - b if finite else None
        return found

    def _best(self) -> Order | None:
        done = [order for order in self._orders if order in self._nodes]
        return max(done, key=self._score) if done else None

    def _score(self, node: Order) -> float:
        """M: higher is better; minus infinity where the metric is not finite."""
        value = self._nodes[node]["metrics"][self._metric]
        if value is None:
            return float("-inf")
        return value if self._higher else -value

    def _deciding_metric(
        self, metrics: dict[str, float | None], metric: str | None, higher: bool | None
    ) -> tuple[str, bool]:
        own = getattr(self._data.module, "primary_metric", None)
        chosen = metric or own or next(iter(metrics), "")
        if chosen not in metrics:
            raise RecipeError(f"metric='{chosen}' is not measured.{suggest(chosen, metrics)}")
        if higher is None and chosen == own:
            higher = getattr(self._data.module, "higher_is_better", None)
        if higher is None:
            word = chosen.lower()
            higher = next((False for w in LOWER_IS_BETTER if w in word), None)
            if higher is None:
                higher = next((True for w in HIGHER_IS_BETTER if w in word), None)
        if higher is None:
            raise RecipeError(f"metric='{chosen}': is more of it better? Say --higher_is_better true or false.")
        return chosen, higher

    def _add(self, node: Order, record: Record) -> None:
        self._nodes[node] = record
        if self._trainer.is_global_zero:
            append_line(self._folder / NODES, json.dumps({"order": list(node), "record": record}))

    def _is_saved(self, node: Order) -> bool:
        return (self._node_folder(node) / MANIFEST).is_file()

    def _node_folder(self, node: Order) -> Path:
        return self._folder / FOLDERS / ("+".join(node) or "dense")
