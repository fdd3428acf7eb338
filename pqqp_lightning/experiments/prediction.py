"""Predicts the best order from calibration alone: it evaluates no model and runs no order.

Each stage compresses the dense model alone. Its intensity is the relative error of the layers' outputs on a few
calibration samples. The Progressive Intensity Hypothesis (Kim et al., arXiv 2603.18426) puts the weakest stage first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from pqqp_lightning.calibration.layer_errors import SAMPLES, Layers, layer_errors, layers_of
from pqqp_lightning.errors import Problem
from pqqp_lightning.seeding import run_seed
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.storage.disk_tensors import DiskTensors
from pqqp_lightning.storage.records import hardware, package_versions
from pqqp_lightning.trials.prefix_tree import Order, PrefixTree
from pqqp_lightning.trials.strategies import nearest_order
from pqqp_lightning.trials.verdict import Judge, deciding_metric

PREDICT = "predict"


def check_prediction(stages: Sequence[Stage]) -> list[Problem]:
    """The problems of ``stages`` whose order cannot be predicted."""
    problems = []
    for stage in stages:
        section, owner, way_out = f"stages.{stage.name}", type(stage).__name__, "Use --strategy progressive."
        if stage.epochs:
            text = "trains, which calibration does not foresee"
            problems.append(Problem("epochs", stage.epochs, text, way_out).within(section, owner))
        elif not stage.comparable_layers and not stage.keeps_function:
            text = "changes the inputs and outputs of layers, so that predict cannot compare them with the dense ones"
            problems.append(Problem(text=text, way_out=way_out).within(section, owner))
    return problems


class Prediction:
    """Predicts the best of the ``allowed`` orders.

    Args:
        tree: the tree of the dense model, identified.
        stages: the stages by name.
        allowed: the orders that can run.
        folder: holds the compressed layers' weights during the comparison.
    """

    def __init__(self, tree: PrefixTree, stages: Mapping[str, Stage], allowed: Sequence[Order], folder: Path) -> None:
        self._tree, self._stages, self._allowed, self._folder = tree, stages, allowed, folder
        self._samples = 0
        self._gone: dict[str, int] = {}  # how many layers each stage removes

    def report(self) -> dict[str, Any]:
        """The intensities and the predicted order: plain data for ``prediction.json``."""
        intensity = self._intensities()
        known = {name: value for name, value in intensity.items() if value is not None}
        # a stage that cannot run first has no intensity and goes to the end
        wanted = tuple(sorted(self._stages, key=lambda name: known.get(name, float("inf"))))
        order = nearest_order(wanted, self._allowed)
        return {
            "status": "finished",
            "seed": run_seed(),
            "versions": package_versions(),
            "hardware": hardware(),
            "strategy": PREDICT,
            "predicted": list(order),
            "exactly": order == wanted,
            "intensity": intensity,
            "samples": self._samples,
            "layers": len(self._tree.targeted),
            "gone": self._gone,
        }

    def measured(self, module: LightningModule, metric: str | None, higher: bool | None) -> dict[str, Any] | None:
        """The metric's lead of the best order over the others, if earlier searches measured at least two."""
        known = [order for order in self._allowed if self._tree.is_known(order)]
        if len(known) < 2 or not self._tree.is_known(()):
            return None
        dense = self._tree.measure(()).record
        judge = Judge(self._tree, *deciding_metric(module, dense["metrics"], metric, higher))
        verdict = judge.decide(known)
        return {"verdict": verdict.sentence(), "best": list(verdict.best), "metric": judge.metric} | {
            "behind": {" -> ".join(order): lead.plain() for order, lead in verdict.leads.items()}
        }

    def _intensities(self) -> dict[str, float | None]:
        """The mean relative error of the layers' outputs after each stage alone; None if a stage cannot run first."""
        first = {order[0] for order in self._allowed}
        found: dict[str, float | None] = {
            name: 0.0 if stage.keeps_function else None for name, stage in self._stages.items()
        }
        variants: dict[str, Layers] = {}
        self._folder.mkdir(parents=True, exist_ok=True)
        with DiskTensors(self._folder) as disk:
            for name, stage in self._stages.items():
                if name in first and not stage.keeps_function:
                    variants[name] = layers_of(self._tree.compress_alone(name), self._tree.targeted, disk)
                    self._gone[name] = sum(layer is None for layer in variants[name].values())
            self._tree.bring_to(())
            with self._tree.walking(PREDICT) as walk:
                compared = walk.first(SAMPLES)
                self._samples = compared.samples
                errors = layer_errors(compared, variants) if variants else {}
        for name in variants:
            found[name] = sum(error[name] for error in errors.values()) / len(errors)
        return found
