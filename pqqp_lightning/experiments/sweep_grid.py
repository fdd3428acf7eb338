"""From a grid over knobs to variants of the stages, and everything about the grid that must be put right at once."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations, product
from typing import Any

from pqqp_lightning.errors import RecipeError, suggest
from pqqp_lightning.runs.checks import check_places
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.stages.knobs import knob_value, knobs
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.trials.prefix_tree import Order

Grid = Mapping[str, Any]
"""Stage name to knob to the list of its values, as the user gave it."""


@dataclass(frozen=True)
class Variant:
    """A stage with the knobs of one place in the grid.

    Attributes:
        stage: named as in the recipe.
        knobs: those that the grid sets.
    """

    stage: Stage
    knobs: dict[str, Any]

    @property
    def name(self) -> str:
        """The stage's."""
        return self.stage.name

    @property
    def plain(self) -> dict[str, Any]:
        """The knobs as plain data."""
        return {knob: self.stage.options()[knob] for knob in self.knobs}

    @property
    def step(self) -> str:
        """What orders call it: ``"prune[sparsity=0.5]"``."""
        return f"{self.name}[{knobs_text(self.knobs)}]" if self.knobs else self.name


@dataclass(frozen=True)
class Point:
    """One variant of every stage, in each order that can run.

    Attributes:
        variants: in the recipe's order.
        orders: of their steps.
        refused: the orders that cannot run, with the reasons.
    """

    variants: tuple[Variant, ...]
    orders: list[Order] = field(default_factory=list)
    refused: dict[Order, list[str]] = field(default_factory=dict)


def knobs_text(knobs: Mapping[str, Any]) -> str:
    """``"sparsity=0.5, scope=global"``."""
    return ", ".join(
        f"{k}={v if isinstance(v, str | int | float) else json.dumps(v, default=str)}" for k, v in knobs.items()
    )


def make_variants(stages: Sequence[Stage], grid: Grid) -> dict[str, list[Variant]]:
    """The variants of every stage; a stage that the grid leaves alone has one.

    Raises:
        RecipeError: with every problem of the grid itself.
    """
    named = {stage.name: stage for stage in stages}
    problems = [
        f"grid.{name}: there is no such stage.{suggest(str(name), named)}" for name in grid if name not in named
    ]
    lists: dict[str, dict[str, list[Any]]] = {name: {} for name in named}
    for name in [name for name in named if name in grid]:
        if not isinstance(grid[name], Mapping):
            problems.append(f"grid.{name}: expected knobs with their values, as in {{sparsity: [0.5, 0.7]}}.")
            continue
        for knob, values in grid[name].items():
            lists[name][knob], found = read_values(named[name], str(knob), values)
            problems += [f"grid.{name} ({type(named[name]).__name__}): {problem}" for problem in found]
    if problems:
        raise RecipeError(problems)
    return {name: [vary(stage, chosen) for chosen in _products(lists[name])] for name, stage in named.items()}


def make_points(variants: Mapping[str, Sequence[Variant]], data: RunData) -> list[Point]:
    """Every combination of variants, with the orders that can run.

    Raises:
        RecipeError: values that a stage refuses, or combinations that can run in no order.
    """
    if problems := [problem for own in variants.values() for v in own for problem in own_problems(v)]:
        raise RecipeError(dict.fromkeys(problems))
    points = [Point(chosen) for chosen in product(*variants.values())]
    for point in points:
        for order in permutations(point.variants):
            steps = tuple(variant.step for variant in order)
            if found := check_places([variant.stage for variant in order], data):
                point.refused[steps] = [_of_the_grid(problem, point.variants) for problem in found]
            else:
                point.orders.append(steps)
    stuck = [point for point in points if not point.orders]
    if stuck:
        raise RecipeError(dict.fromkeys(p for point in stuck for found in point.refused.values() for p in found))
    return points


def own_problems(variant: Variant) -> list[str]:
    """What the stage says of the values, whatever the model is."""
    where = f"stages.{variant.name} ({type(variant.stage).__name__})"
    return [_of_the_grid(f"{where}: {problem}", [variant]) for problem in variant.stage.check_knobs()]


def count_points(variants: Mapping[str, Sequence[Variant]]) -> int:
    """How many combinations there are."""
    return math.prod(len(own) for own in variants.values())


def read_values(stage: Stage, knob: str, values: Any) -> tuple[list[Any], list[str]]:
    """A knob's values as the stage takes them, and what is wrong with them."""
    known = [name for name in knobs(type(stage)) if name in vars(stage)]
    if knob not in known:
        return [], [f"'{knob}' is no knob.{suggest(knob, known)}"]
    if not isinstance(values, list) or not values:
        empty = "is empty" if values == [] else "is no list"
        return [], [f"{knob}={values} {empty}. Write its values as in [{vars(stage)[knob]}]."]
    problems, read = [], []
    for value in values:
        try:
            read.append(knob_value(type(stage), knob, value))
        except ValueError as error:
            problems.append(f"{knob}={value!r}: expected {error}")
    if twice := [value for i, value in enumerate(read) if value in read[:i]]:
        problems.append(f"{knob}={values!r} names {twice[0]!r} twice. Name every value once.")
    return read, problems


def _products(lists: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in product(*lists.values()):
        yield dict(zip(lists, values, strict=True))


def vary(stage: Stage, chosen: dict[str, Any]) -> Variant:
    """The stage made anew with these knobs, so that what its constructor derives from them follows; its name stays, and
    with it the address of what it gives.

    Raises:
        RecipeError: it cannot be made anew.
    """
    if not chosen:
        return Variant(copy.deepcopy(stage), chosen)
    if lost := [knob for knob in knobs(type(stage)) if knob not in vars(stage)]:
        raise RecipeError(
            f"grid.{stage.name} ({type(stage).__name__}): cannot be made anew, since it keeps no attribute "
            f"{', '.join(lost)}. Have its constructor keep every argument under its own name."
        )
    kept = {knob: vars(stage)[knob] for knob in knobs(type(stage))}
    changed = type(stage)(**copy.deepcopy(kept | chosen))
    changed.name = stage.name
    return Variant(changed, chosen)


def _of_the_grid(problem: str, variants: Iterable[Variant]) -> str:
    """The problem, said of the grid where it is about a value that comes from there."""
    for variant in variants:
        where = f"stages.{variant.name} ("
        if problem.startswith(where) and any(f"{knob}=" in problem for knob in variant.knobs):
            return f"grid.{problem.removeprefix('stages.')}"
    return problem
