"""Turns a grid of arguments into variants of the stages, and reports every problem of the grid at once."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations, product
from typing import Any

from pqqp_lightning.errors import Problem, RecipeError, suggest
from pqqp_lightning.runs.checks import check_places
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.stages.arguments import argument_value, arguments_of
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.trials.prefix_tree import Order

Grid = Mapping[str, Any]
"""Maps each stage's name to its arguments, and each argument to the list of its values, as the user gave them."""


@dataclass(frozen=True)
class Variant:
    """A stage with one choice of the values in the grid.

    Attributes:
        stage: the stage, with its name in the recipe.
        arguments: the arguments that the grid sets.
    """

    stage: Stage
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name

    @property
    def plain(self) -> dict[str, Any]:
        """The arguments as plain data."""
        return {name: self.stage.arguments()[name] for name in self.arguments}

    @property
    def step(self) -> str:
        """Its name in orders: ``"prune[sparsity=0.5]"``."""
        return f"{self.name}[{arguments_text(self.arguments)}]" if self.arguments else self.name


@dataclass(frozen=True)
class Point:
    """One variant of every stage, in each order that can run.

    Attributes:
        variants: in the recipe's order.
        orders: the orders that can run, as steps.
        refused: the orders that cannot run, with the reasons.
    """

    variants: tuple[Variant, ...]
    orders: list[Order] = field(default_factory=list)
    refused: dict[Order, list[Problem]] = field(default_factory=dict)


def arguments_text(arguments: Mapping[str, Any]) -> str:
    """``"sparsity=0.5, scope=global"``."""
    return ", ".join(
        f"{k}={v if isinstance(v, str | int | float) else json.dumps(v, default=str)}" for k, v in arguments.items()
    )


def make_variants(stages: Sequence[Stage], grid: Grid) -> dict[str, list[Variant]]:
    """The variants of every stage; a stage outside of the grid has one.

    Raises:
        RecipeError: with every problem of the grid itself.
    """
    named = {stage.name: stage for stage in stages}
    problems = []
    for name in grid:
        if name not in named:
            problem = Problem(text="there is no such stage", way_out=suggest(str(name), named).strip())
            problems.append(problem.within(f"grid.{name}"))
    lists: dict[str, dict[str, list[Any]]] = {name: {} for name in named}
    for name in [name for name in named if name in grid]:
        if not isinstance(grid[name], Mapping):
            text = "expected arguments with their values, as in {sparsity: [0.5, 0.7]}"
            problems.append(Problem(text=text).within(f"grid.{name}"))
            continue
        for argument, values in grid[name].items():
            lists[name][argument], found = read_values(named[name], str(argument), values)
            problems += [problem.within(f"grid.{name}", type(named[name]).__name__) for problem in found]
    if problems:
        raise RecipeError(problems)
    variants: dict[str, list[Variant]] = {}
    for name, stage in named.items():
        values = lists[name]
        choices = [dict(zip(values, choice, strict=True)) for choice in product(*values.values())]
        variants[name] = [vary(stage, choice) for choice in choices]
    return variants


def make_points(variants: Mapping[str, Sequence[Variant]], data: RunData, last: Sequence[str] = ()) -> list[Point]:
    """Every combination of variants, with the orders that can run.

    Args:
        variants: of every stage.
        data: the dense model and its data, for the checks.
        last: names of the stages that end every order.

    Raises:
        RecipeError: combinations that cannot run in any order.
    """
    points = [Point(chosen) for chosen in product(*variants.values())]
    for point in points:
        end = [variant for name in last for variant in point.variants if variant.name == name]
        for beginning in permutations([variant for variant in point.variants if variant.name not in last]):
            order = [*beginning, *end]
            steps = tuple(variant.step for variant in order)
            if found := check_places([variant.stage for variant in order], data):
                point.refused[steps] = [of_section("grid", problem, point.variants) for problem in found]
            else:
                point.orders.append(steps)
    stuck = [point for point in points if not point.orders]
    if stuck:
        raise RecipeError(dict.fromkeys(p for point in stuck for found in point.refused.values() for p in found))
    return points


def own_problems(variant: Variant, section: str = "grid") -> list[Problem]:
    """The problems of a variant's values, which ``section`` of the recipe sets, for any model."""
    problems = []
    for problem in variant.stage.check_arguments():
        placed = problem.within(f"stages.{variant.name}", type(variant.stage).__name__)
        problems.append(of_section(section, placed, [variant]))
    return problems


def read_values(stage: Stage, argument: str, values: Any) -> tuple[list[Any], list[Problem]]:
    """An argument's values converted for the stage, and their problems."""
    known = [name for name in arguments_of(type(stage)) if name in vars(stage)]
    if argument not in known:
        way_out = suggest(argument, known).strip()
        return [], [Problem(argument, text="is not an argument of this stage", way_out=way_out)]
    if not isinstance(values, list) or not values:
        text = "is empty" if values == [] else "is not a list"
        return [], [Problem(argument, values, text, f"Write its values as in [{vars(stage)[argument]}].")]
    problems, read = [], []
    for value in values:
        try:
            read.append(argument_value(type(stage), argument, value))
        except ValueError as error:
            problems.append(Problem(argument, value, f"is not accepted: expected {error}"))
    if twice := [value for i, value in enumerate(read) if value in read[:i]]:
        problems.append(Problem(argument, values, f"names {twice[0]!r} twice", "Name every value once."))
    return read, problems


def vary(stage: Stage, chosen: dict[str, Any], section: str = "grid") -> Variant:
    """A new stage with ``chosen`` among its arguments, which ``section`` sets, and with the same name.

    The constructor runs again, because it may derive attributes from the arguments.

    Raises:
        RecipeError: the stage does not keep all of its arguments as attributes.
    """
    if not chosen:
        return Variant(copy.deepcopy(stage), chosen)
    if lost := [name for name in arguments_of(type(stage)) if name not in vars(stage)]:
        text = f"cannot be created again, since it has no attribute {', '.join(lost)}"
        problem = Problem(text=text, way_out="Have its constructor keep every argument under its own name.")
        raise RecipeError(problem.within(f"{section}.{stage.name}", type(stage).__name__))
    kept = {name: vars(stage)[name] for name in arguments_of(type(stage))}
    changed = type(stage)(**copy.deepcopy(kept | chosen))
    changed.name = stage.name
    return Variant(changed, chosen)


def of_section(section: str, problem: Problem, variants: Iterable[Variant]) -> Problem:
    """The problem, with a key in the grid (or the space) if that sets its argument."""
    for variant in variants:
        if problem.section == f"stages.{variant.name}" and problem.argument in variant.arguments:
            return replace(problem, key=problem.argument).within(f"{section}.{variant.name}", problem.owner)
    return problem
