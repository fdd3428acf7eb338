"""What a search trades off: metrics, the counted size, and the time of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer

from pqqp_lightning.errors import Problem
from pqqp_lightning.experiments.options import PipelineOptions
from pqqp_lightning.storage.files import read_json, write_json
from pqqp_lightning.storage.run_folder import RunFolder
from pqqp_lightning.trials.executors import LOCAL
from pqqp_lightning.trials.prefix_tree import Order
from pqqp_lightning.trials.verdict import Judge, deciding_metric

SIZE, LATENCY = "size", "latency_ms"
"""The objectives that are no metrics: the counted size, and the time of a forward pass."""


def check_objectives(options: PipelineOptions, trainer: Trainer) -> list[Problem]:
    """The problems of the objectives that no evaluation is needed for."""
    objectives = options.objectives
    if objectives is None:
        return []
    way_out = "Name the deciding metric first, as in [perplexity, size]."
    if not objectives or objectives[0] in (SIZE, LATENCY):
        return [Problem("objectives", objectives, "begins with no metric", way_out)]
    if len(set(objectives)) < len(objectives):
        return [Problem("objectives", objectives, "names one twice", "Name each once.")]
    if LATENCY in objectives and (options.executor != LOCAL or trainer.world_size > 1):
        text = f"has {LATENCY}, which processes that run side by side would disturb"
        way_out = "Use --executor local and trainer.devices: 1."
        return [Problem("objectives", objectives, text, way_out)]
    if options.metric is not None and options.metric != objectives[0]:
        text = f"begins with another metric than metric={options.metric!r}"
        return [Problem("objectives", objectives, text, "Leave metric out.")]
    return []


def further_metrics(options: PipelineOptions) -> list[str]:
    """The metrics among the objectives."""
    return [name for name in options.objectives or [] if name not in (SIZE, LATENCY)]


class Objectives:
    """The objectives of a search.

    Args:
        names: the deciding metric first.
        judge: has the results.
        module: knows the direction of its own metric.
        folder: of the run, where latencies are kept.

    Attributes:
        names: as given.
        judge: as given.
    """

    def __init__(self, names: Sequence[str], judge: Judge, module: LightningModule, folder: RunFolder) -> None:
        self.names = list(names)
        self.judge, self._module, self._folder = judge, module, folder

    def values(self, steps: Order) -> dict[str, float | None]:
        """The value of each objective for a measured pipeline; None if it is not finite."""
        record = self.judge.tree.measure(steps).record
        values: dict[str, float | None] = {}
        for name in self.names:
            if name == SIZE:
                values[name] = record["size_bytes"]
            elif name == LATENCY:
                values[name] = self._latency(steps)
            else:
                values[name] = record["metrics"][name]
        return values

    def scores(self, values: dict[str, float | None]) -> list[float]:
        """The values with more as better."""
        scores = []
        for name, value in values.items():
            if value is None:
                scores.append(float("-inf"))
            else:
                scores.append(value if self._is_higher_better(name) else -value)
        return scores

    def notes(self) -> list[str]:
        """What the latency was measured on, beside the dense model's."""
        if LATENCY not in self.names:
            return []
        dense_ms = self._latency(())
        inputs = read_json(self._folder.latencies)[self.judge.tree.key(())]["inputs"]
        return [f"{LATENCY}: median of a forward pass on inputs of shape {inputs}; the dense model's is {dense_ms:.3g}"]

    def _is_higher_better(self, name: str) -> bool:
        if name in (SIZE, LATENCY):
            return False
        if name == self.judge.metric:
            return self.judge.higher
        return deciding_metric(self._module, [name], name, None)[1]

    def _latency(self, steps: Order) -> float:
        """Milliseconds of a forward pass, measured once and kept: a resumed search goes on from the same numbers."""
        known = read_json(self._folder.latencies) if self._folder.latencies.is_file() else {}
        key = self.judge.tree.key(steps)
        if key not in known:
            found = self.judge.tree.latency(steps)
            known[key] = {"milliseconds": found.milliseconds, "inputs": found.inputs}
            write_json(self._folder.latencies, known)
        return known[key]["milliseconds"]
