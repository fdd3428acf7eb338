"""The pipelines of a space that can run and fit the budget, known before anything runs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from pqqp_lightning.checkpoint.expected import ExpectedSize
from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.experiments.options import PipelineOptions
from pqqp_lightning.experiments.search_space import SPACE, Space
from pqqp_lightning.experiments.sweep_grid import of_section
from pqqp_lightning.report.formatting import human_bytes
from pqqp_lightning.runs.forecast import Forecast
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.trials.prefix_tree import Order

TARGETS = ("target_rate", "target_size", "target_bits")
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Budget:
    """The largest allowed size.

    Attributes:
        name: the option that sets it; empty for none.
        value: as the user gave it.
        size_bytes: the largest counted size of the whole model; None if bits are limited, or nothing.
        bits: the largest average of stored bits for each targeted weight; None if bytes are limited, or nothing.
    """

    name: str = ""
    value: float | int | str | None = None
    size_bytes: float | None = None
    bits: float | None = None

    def allows(self, size_bytes: int, bits: float) -> bool:
        """Whether a model of this size fits."""
        return (self.size_bytes is None or size_bytes <= self.size_bytes) and (self.bits is None or bits <= self.bits)

    def words(self) -> str:
        """``"Under 67.2 MB"``; empty without a budget."""
        if self.size_bytes is not None:
            rate = f" ({self.value:g}x)" if self.name == "target_rate" else ""
            return f"Under {human_bytes(self.size_bytes)}{rate}"
        return "" if self.bits is None else f"Under {self.bits:g} bits a weight"


@dataclass(frozen=True)
class Candidate:
    """A pipeline that can run.

    Attributes:
        steps: its variants' names, in the order of compression.
        expected: its size.
        bits: its expected average of stored bits for each targeted weight.
    """

    steps: Order
    expected: ExpectedSize
    bits: float


@dataclass(frozen=True)
class Candidates:
    """The pipelines of a space.

    Attributes:
        dense_bytes: the dense model's size.
        budget: the largest allowed size.
        fitting: those within the budget, by their steps.
        over: number of those over it.
        smallest: the one with the smallest size.
        refused: number of pipelines that cannot run.
        savings: the bytes that each step alone saves of the dense model; 0 for one that cannot run first.
    """

    dense_bytes: int
    budget: Budget
    fitting: dict[Order, Candidate]
    over: int
    smallest: Candidate
    refused: int
    savings: dict[str, int]


def check_targets(options: PipelineOptions) -> list[Problem]:
    """The problems of the budget that no model is needed for."""
    given = [name for name in TARGETS if getattr(options, name) is not None]
    if len(given) > 1:
        text = f"and {' and '.join(given[1:])} are both budgets"
        return [Problem(given[0], getattr(options, given[0]), text, "Set one of them.")]
    problems = []
    for name in given:
        value = getattr(options, name)
        if name == "target_size":
            number, example = _bytes_of(value), "Write bytes, or a number with a unit, as in 60MB."
        else:
            number, example = float(value), "8 is an eighth." if name == "target_rate" else "4 is four bits a weight."
        if number is None or not math.isfinite(number) or number <= 0:
            problems.append(Problem(name, value, "is not a size above 0", example))
    return problems


def find_candidates(space: Space, data: RunData, options: PipelineOptions) -> Candidates:
    """Check every pipeline, and count its size.

    Args:
        space: with at most ``options.max_points`` pipelines.
        data: the dense model and its data, which has been read.
        options: with a valid budget.

    Raises:
        RecipeError: a value that no pipeline can use, or no pipeline that fits.
    """
    steps = space.steps
    stages = [variant.stage for variant in steps.values()]
    forecast = Forecast(data, stages)
    dense = forecast.after([]).size
    targeted: dict[str, int] = {}
    for stage in stages:
        targeted.update({name: layer.weight.numel() for name, layer in stage.find_layers(data.module).items()})
    entries = max(1, sum(targeted.values()))
    budget = _budget(options, dense.size_bytes)
    runnable: list[Candidate] = []
    usable: set[str] = set()
    problems: dict[str, tuple[Problem, ...]] = {}
    refused = 0
    for pipeline in space.pipelines():
        turn = forecast.after([variant.stage for variant in pipeline])
        if turn.problems:
            refused += 1
            for variant in pipeline:
                placed = tuple(of_section(SPACE, problem, [variant]) for problem in turn.problems)
                problems.setdefault(variant.step, placed)
            continue
        usable.update(variant.step for variant in pipeline)
        names = tuple(variant.step for variant in pipeline)
        runnable.append(Candidate(names, turn.size, 8 * turn.size.layer_bytes / entries))
    unusable = [step for step, variant in steps.items() if step not in usable and variant.name in space.asked]
    if unusable or not runnable:
        named = unusable or list(problems)
        raise RecipeError(dict.fromkeys(problem for step in named for problem in problems[step]))
    by_size = sorted(runnable, key=lambda c: c.expected.size_bytes if budget.bits is None else c.bits)
    fitting = {c.steps: c for c in runnable if budget.allows(c.expected.size_bytes, c.bits)}
    if not fitting:
        raise RecipeError(_too_small(budget, by_size[0], dense.size_bytes))
    savings = {step: dense.size_bytes - forecast.after([v.stage]).size.size_bytes for step, v in steps.items()}
    over = len(runnable) - len(fitting)
    return Candidates(dense.size_bytes, budget, fitting, over, by_size[0], refused, savings)


def check_count(space: Space, most: int) -> list[Problem]:
    """The problem of a space with too many pipelines to look at."""
    if most < 1:
        return [Problem("max_points", most, "allows no pipeline", "Use 1 or more.")]
    if space.count() <= most:
        return []
    text = f"has {space.count()} pipelines, more than max_points={most}"
    return [Problem(text=text, way_out="Shorten it, or raise max_points.").within(SPACE)]


def _budget(options: PipelineOptions, dense_bytes: int) -> Budget:
    if options.target_rate is not None:
        return Budget("target_rate", options.target_rate, dense_bytes / options.target_rate)
    if options.target_size is not None:
        return Budget("target_size", options.target_size, _bytes_of(options.target_size))
    if options.target_bits is not None:
        return Budget("target_bits", options.target_bits, bits=options.target_bits)
    return Budget()


def _too_small(budget: Budget, smallest: Candidate, dense_bytes: int) -> Problem:
    size_bytes = smallest.expected.size_bytes
    reached = f"{human_bytes(size_bytes)} ({dense_bytes / size_bytes:.2f}x, {smallest.bits:.2f} bits a weight)"
    text = f"is below the smallest pipeline's size: {' -> '.join(smallest.steps)} takes {reached}"
    way_out = "Raise the budget, or add stronger values to the space."
    if budget.name == "target_rate":
        text = f"is more than the smallest pipeline reaches: {' -> '.join(smallest.steps)} takes {reached}"
        way_out = "Lower it, or add stronger values to the space."
    return Problem(budget.name, budget.value, text, way_out)


def _bytes_of(size: int | float | str) -> float | None:
    """The bytes of ``60MB``, or None."""
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    if found is None or found[2].lower() not in UNITS:
        return None
    try:
        return float(found[1]) * UNITS[found[2].lower()]
    except ValueError:
        return None
