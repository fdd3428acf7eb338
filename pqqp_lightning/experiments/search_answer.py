"""What a search found: the front, the best pipeline and how sure that is, and its recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml

from pqqp_lightning.experiments.options import PipelineOptions
from pqqp_lightning.experiments.search_budget import Candidate, Candidates
from pqqp_lightning.experiments.search_space import Space
from pqqp_lightning.experiments.sweep_grid import arguments_text
from pqqp_lightning.report.formatting import human_bytes
from pqqp_lightning.seeding import run_seed
from pqqp_lightning.storage.records import hardware, package_versions
from pqqp_lightning.storage.reports import PipelineEntry, SearchReport
from pqqp_lightning.trials.prefix_tree import Order
from pqqp_lightning.trials.rungs import Stop
from pqqp_lightning.trials.verdict import Difference, Judge, format_number

COMPARED = 12
"""The best pipelines whose differences hold together; more would make every interval wider."""


@dataclass(frozen=True)
class Measured:
    """A pipeline that was measured.

    Attributes:
        number: counted from 1, in the order in which they were chosen.
        trial: number of its trial in Optuna's study.
        candidate: its steps and expected size.
        values: of the objectives.
        scores: the same, with more as better.
        fits: whether its counted size is within the budget.
        applications: of stages that all pipelines up to this one need.
        stop: why its evaluation was stopped; its values are then those on its first samples.
    """

    number: int
    trial: int
    candidate: Candidate
    values: dict[str, float | None]
    scores: list[float]
    fits: bool
    applications: int
    stop: Stop | None = None

    @property
    def steps(self) -> Order:
        """Its variants' names, in the order of compression."""
        return self.candidate.steps


class Answer:
    """Ranks the measured pipelines.

    Args:
        judge: has their results.
        space: what they are made of.
        candidates: the pipelines that could have been chosen.
        measured: in the order in which they were chosen.
        objectives: their names, the deciding metric first.
        recipe_text: the whole recipe; empty for a search that was started from Python.
    """

    def __init__(
        self,
        judge: Judge,
        space: Space,
        candidates: Candidates,
        measured: Sequence[Measured],
        objectives: Sequence[str],
        recipe_text: str,
    ) -> None:
        self._judge, self._space, self._candidates = judge, space, candidates
        self._measured, self._objectives = measured, objectives
        self._recipe_text = recipe_text
        self._variants = space.steps
        self._fitting = [one for one in measured if one.fits and one.stop is None]

    @cached_property
    def front(self) -> list[Measured]:
        """The pipelines that fit and that no other beats in the objectives and in size, the smallest first."""
        points = {one.number: (*one.scores, -self._size_bytes(one)) for one in self._fitting}
        kept: list[Measured] = []
        for one in sorted(self._fitting, key=lambda one: (self._size_bytes(one), -one.scores[0], one.number)):
            mine = points[one.number]
            beaten = any(_beats(points[other.number], mine) for other in self._fitting)
            if not beaten and all(points[other.number] != mine for other in kept):
                kept.append(one)
        return kept

    @cached_property
    def best(self) -> Measured | None:
        """The pipeline with the best metric under a budget; without one, the smallest that is not clearly behind."""
        if not self._fitting:
            return None
        ranked = self._ranked
        if self._candidates.budget.name:
            return ranked[0]
        level = [one for one in ranked if one is ranked[0] or not self._is_behind(one)]
        return min(level, key=lambda one: (self._size_bytes(one), ranked.index(one)))

    @cached_property
    def _ranked(self) -> list[Measured]:
        return sorted(self._fitting, key=lambda one: (-one.scores[0], self._size_bytes(one), one.number))

    @cached_property
    def _leads(self) -> Mapping[Order, Difference]:
        """M of the best minus M of the next ones; their intervals hold together with 95%."""
        competing = [one.steps for one in self._ranked[:COMPARED]]
        leads = dict(self._judge.decide(competing).leads)
        for one in self._ranked[COMPARED:]:
            leads[one.steps] = self._judge.difference(competing[0], one.steps)
        return leads

    def _is_behind(self, one: Measured) -> bool:
        lead = self._leads[one.steps]
        if lead.value is None:
            return True
        return lead.is_clear if lead.low is not None else lead.value > 0

    def _size_bytes(self, one: Measured) -> int:
        return self._judge.tree.measure(one.steps).record["size_bytes"]

    def verdict(self, applications: int) -> str:
        """The answer in a sentence."""
        best = self.best
        stopped = sum(one.stop is not None for one in self._measured)
        early = f" ({stopped} stopped early)" if stopped else ""
        effort = f"{len(self._measured)} trials{early}, {applications} stage applications"
        if best is None:
            return f"No measured pipeline is within the budget once its size is counted; {effort}."
        record = self._judge.tree.measure(best.steps).record
        value = f"{self._judge.metric} {format_number(record['metrics'][self._judge.metric])}"
        size = f"{human_bytes(record['size_bytes'])}, {record['compression_rate']:.2f}x"
        found = f"{self._words(best)}: {value} at {size}"
        if under := self._candidates.budget.words():
            return f"{under}: {found}{self._lead_words()}, {effort}."
        words = f"{len(self.front)} of {len(self._measured)} pipelines are on the front"
        return f"{words}; the smallest that is not clearly behind the best is {found}, {effort}."

    def _lead_words(self) -> str:
        if len(self._ranked) < 2:
            return ", the only one measured"
        following = self._ranked[1]
        lead = self._leads[following.steps]
        if lead.value is None:
            return f", the only one with a finite {self._judge.metric}"
        if lead.low is None or lead.high is None:
            return f", ahead of the next by {format_number(lead.value)} (without an interval)"
        ends = f"{format_number(lead.value)} ({format_number(lead.low)} to {format_number(lead.high)})"
        return f", ahead of the next by {ends}" if lead.is_clear else f", not clearly ahead of the next: {ends}"

    def _words(self, one: Measured) -> str:
        """``"prune (sparsity=0.5) -> quantize (bits=3)"``."""
        return " -> ".join(self._step_words(step) for step in one.steps)

    def _step_words(self, step: str) -> str:
        variant = self._variants[step]
        return f"{variant.name} ({arguments_text(variant.arguments)})" if variant.arguments else variant.name

    def report(
        self, importance: Mapping[str, float], sampler: str, applications: int, notes: Sequence[str]
    ) -> SearchReport:
        """Plain data for ``search.json``."""
        found, smallest = self._candidates, self._candidates.smallest
        budget = found.budget
        needed = self._measured[-1].applications if self._measured else 0
        over = [one.number for one in self._measured if not one.fits]
        more = [f"{len(over)} pipelines are over the budget once counted: {over}"] if over else []
        return {
            "status": "finished",
            "seed": run_seed(),
            "versions": package_versions(),
            "hardware": hardware(),
            "metric": self._judge.metric,
            "higher_is_better": self._judge.higher,
            "objectives": list(self._objectives),
            "sampler": sampler,
            "budget": {
                "name": budget.name,
                "value": budget.value,
                "size_bytes": budget.size_bytes,
                "bits": budget.bits,
            },
            "space": self._space.plain(),
            "fitting": len(found.fitting),
            "over": found.over,
            "refused": found.refused,
            "smallest": {"steps": list(smallest.steps), "size_bytes": smallest.expected.size_bytes},
            "dense": self._judge.tree.measure(()).record,
            "trials": [self._entry(one) for one in self._measured],
            "front": [one.number for one in self.front],
            "best": None if self.best is None else self.best.number,
            "verdict": self.verdict(needed),
            "importance": dict(importance),
            "applications": applications,
            "notes": [*notes, *more],
        }

    def _entry(self, one: Measured) -> PipelineEntry:
        variants = [self._variants[step] for step in one.steps]
        lead = self._leads.get(one.steps) if one.fits and one.stop is None else None
        stopped = ""
        if one.stop is not None:
            lead = one.stop.behind
            stopped = f"stopped after {one.stop.samples} samples"
        return {
            "number": one.number,
            "order": [variant.name for variant in variants],
            "steps": list(one.steps),
            "arguments": {variant.name: variant.plain for variant in variants},
            "expected_bytes": one.candidate.expected.size_bytes,
            "exact": one.candidate.expected.exact,
            "fits": one.fits,
            "record": None if one.stop else self._judge.tree.measure(one.steps).record,
            "values": one.values,
            "interval": None if one.stop else self._judge.interval(one.steps),
            "behind": None if lead is None else lead.plain(),
            "stopped": stopped,
            "applications": one.applications,
        }

    def recipe(self) -> str:
        """The recipe of the best pipeline, for ``fit``; empty without a best one or without a recipe."""
        if self.best is None or not self._recipe_text:
            return ""
        content: dict[str, Any] = yaml.safe_load(self._recipe_text)
        for option in (*PipelineOptions.__dataclass_fields__, "run_dir", "stage_order"):
            content.pop(option, None)
        (content.get("trainer") or {}).pop("default_root_dir", None)
        stages: dict[str, Any] = {}
        for step in self.best.steps:
            variant = self._variants[step]
            stage = content["stages"][variant.name]
            stage["init_args"] = {**(stage.get("init_args") or {}), **variant.plain}
            stages[variant.name] = stage
        content["stages"] = stages
        return _HEAD + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


_HEAD = "# The best pipeline that a search found.\n#\n#   pqqp-lightning fit --config best.yaml\n"


def _beats(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether ``a`` is at least as good as ``b`` in everything and better in something."""
    return all(x >= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)
