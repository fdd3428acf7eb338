"""The space of a search: values of the stages' arguments, stages that may be left out, and orders."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

from pqqp_lightning.errors import Problem, RecipeError, suggest
from pqqp_lightning.experiments.sweep_grid import Variant, own_problems, read_values, vary
from pqqp_lightning.stages.stage import Stage

SPACE = "space"
OPTIONAL, ORDER = "optional", "order"
ANY, FIXED = "any", "fixed"
RANGE = ("low", "high", "step")
MOST_STAGES = 5
"""5 stages have 120 orders; 6 would have 720."""
MOST_VALUES = 100
"""A longer range is a mistake in its step."""

Names = tuple[str, ...]


@dataclass(frozen=True)
class Space:
    """What a search chooses from.

    Attributes:
        values: the values of each argument, by stage; numbers ascend.
        variants: each stage with each choice of these values that its own checks accept, by the values' indices.
        asked: the stages whose values the user named.
        optional: the stages that may be left out.
        orders: the allowed orders of all stages.
    """

    values: dict[str, dict[str, list[Any]]]
    variants: dict[str, dict[tuple[int, ...], Variant]]
    asked: frozenset[str]
    optional: frozenset[str]
    orders: list[Names]

    @property
    def steps(self) -> dict[str, Variant]:
        """Every variant by its name in orders."""
        return {variant.step: variant for own in self.variants.values() for variant in own.values()}

    def sequences(self) -> list[Names]:
        """The names of the stages that a pipeline may apply, in order, each sequence once; never none of them."""
        found: dict[Names, None] = {}
        for order in self.orders:
            for left_out in _subsets(sorted(self.optional)):
                names = tuple(name for name in order if name not in left_out)
                if names:
                    found[names] = None
        return list(found)

    def count(self) -> int:
        """The number of pipelines."""
        return sum(math.prod(len(self.variants[name]) for name in names) for names in self.sequences())

    def pipelines(self) -> Iterator[tuple[Variant, ...]]:
        """Every pipeline, in the order of compression."""
        for names in self.sequences():
            yield from product(*(self.variants[name].values() for name in names))

    def plain(self) -> dict[str, Any]:
        """The space as plain data."""
        found: dict[str, Any] = {name: dict(values) for name, values in self.values.items()}
        for name in self.optional:
            found[name][OPTIONAL] = True
        return {**found, ORDER: [list(order) for order in self.orders]}


def read_space(stages: Sequence[Stage], given: Mapping[str, Any]) -> Space:
    """Read the space of the user, and each stage's own where the user names none.

    A stage that the user does not name stays as the recipe has it, unless no stage is named.

    Raises:
        RecipeError: with every problem of the space.
    """
    named = {stage.name: stage for stage in stages}
    problems = _check_stages(named, given)
    asked = [name for name in named if name in given]
    values: dict[str, dict[str, list[Any]]] = {}
    listed: set[str] = set()
    optional: set[str] = set()
    for name, stage in named.items():
        arguments, may_be_left_out, found = _read_stage(stage, given.get(name))
        problems += [problem.within(f"{SPACE}.{name}", type(stage).__name__) for problem in found]
        values[name] = arguments
        if may_be_left_out:
            optional.add(name)
        if arguments:
            listed.add(name)
        elif name in asked or not asked:
            values[name] = {argument: list(several) for argument, several in stage.search_space.items()}
    orders = _read_orders(named, given.get(ORDER), problems)
    if problems:
        raise RecipeError(problems)
    variants: dict[str, dict[tuple[int, ...], Variant]] = {}
    for name, stage in named.items():
        variants[name] = _variants(stage, values[name], name in listed, problems)
        if not variants[name] and name not in listed:  # its own space does not go with what the recipe sets
            values[name] = {}
            variants[name] = {(): vary(stage, {}, SPACE)}
    if problems:
        raise RecipeError(problems)
    space = Space(values, variants, frozenset(listed), frozenset(optional), orders)
    if space.count() < 2:
        text = "has nothing to choose: no stage has a search space of its own"
        way_out = f"Add --{SPACE}.STAGE.ARGUMENT [a,b], where STAGE is {' or '.join(named)}."
        raise RecipeError(Problem(text=text, way_out=way_out).within(SPACE))
    return space


def _check_stages(named: Mapping[str, Stage], given: Mapping[str, Any]) -> list[Problem]:
    problems = []
    if not 1 <= len(named) <= MOST_STAGES:
        text = f"search needs 1 to {MOST_STAGES} stages, but the recipe has {len(named)}"
        problems.append(Problem(text=text, way_out="Change the stages.").within("stages"))
    if ORDER in named:
        text = f"'{ORDER}' cannot be a stage's name here, since {SPACE}.{ORDER} is the order of the stages"
        problems.append(Problem(text=text, way_out="Give it another name.").within("stages"))
    for name in given:
        if name not in named and name != ORDER:
            near = suggest(str(name), [*named, ORDER]).strip()
            problems.append(Problem(text="there is no such stage", way_out=near).within(f"{SPACE}.{name}"))
    return problems


def _read_stage(stage: Stage, own: Any) -> tuple[dict[str, list[Any]], bool, list[Problem]]:
    """The values of each argument that the user names, whether the stage may be left out, and the problems."""
    if own is None:
        return {}, False, []
    if not isinstance(own, Mapping):
        return {}, False, [Problem(text="expected arguments with their values, as in {sparsity: [0.5, 0.7]}")]
    optional = own.get(OPTIONAL, False)
    values, problems = _read_arguments(stage, {name: entry for name, entry in own.items() if name != OPTIONAL})
    if not isinstance(optional, bool):
        problems.append(Problem(OPTIONAL, optional, "is not true or false"))
    if not problems and not values and not optional and not stage.search_space:
        way_out = f"Name values, as in --{SPACE}.{stage.name}.ARGUMENT [a,b]."
        problems.append(Problem(text="has no search space of its own", way_out=way_out))
    return values, optional is True, problems


def _read_arguments(stage: Stage, given: Mapping[str, Any]) -> tuple[dict[str, list[Any]], list[Problem]]:
    """The values of each argument, numbers ascending, and their problems."""
    values: dict[str, list[Any]] = {}
    problems: list[Problem] = []
    for name, entry in given.items():
        argument, listed = str(name), entry
        if isinstance(entry, Mapping):
            listed, found = _spread(argument, entry)
            problems += found
            if found:
                continue
        elif isinstance(entry, str) and entry.startswith("{"):  # a mapping without blanks, which YAML reads as text
            way_out = "Write it in quotes, with blanks after the colons: '{low: 0.3, high: 0.7, step: 0.1}'."
            problems.append(Problem(argument, entry, "is not a range", way_out))
            continue
        values[argument], found = read_values(stage, argument, listed)
        problems += found
        if values[argument] and all(_is_number(value) for value in values[argument]):
            values[argument].sort()
    return values, problems


def _spread(argument: str, entry: Mapping[str, Any]) -> tuple[list[Any], list[Problem]]:
    """The values from low to high, both included where the step meets them."""
    example = "Write a list of values, or {low: 0.3, high: 0.7, step: 0.1}."
    if not {"low", "high"} <= set(entry) <= set(RANGE) or not all(_is_number(value) for value in entry.values()):
        return [], [Problem(argument, dict(entry), "is not a range of numbers", example)]
    low, high = entry["low"], entry["high"]
    whole = isinstance(low, int) and isinstance(high, int)
    step = entry.get("step", 1 if whole else None)
    if step is None or step <= 0 or low > high:
        text = "needs low <= high and a step above 0"
        return [], [Problem(argument, dict(entry), text, example)]
    count = math.floor((high - low) / step + 1e-9) + 1
    if count > MOST_VALUES:
        text = f"has {count} values, more than {MOST_VALUES}"
        return [], [Problem(argument, dict(entry), text, "Raise the step.")]
    # rounded, so that 0.3 + 4 * 0.1 is 0.7 as a person would write it
    return [low + i * step if whole and isinstance(step, int) else round(low + i * step, 10) for i in range(count)], []


def _read_orders(named: Mapping[str, Stage], given: Any, problems: list[Problem]) -> list[Names]:
    recipe = tuple(named)
    if given is None or given == ANY:
        return list(permutations(recipe)) if len(recipe) <= MOST_STAGES else [recipe]
    if given == FIXED:
        return [recipe]
    way_out = f"Write {ANY}, {FIXED}, or a list of orders as in [[{', '.join(recipe)}]]."
    if not isinstance(given, list) or not given or not all(isinstance(order, list) for order in given):
        problems.append(Problem(ORDER, given, "is not an order", way_out).within(SPACE))
        return []
    for order in given:
        if sorted(map(str, order)) != sorted(recipe):
            problems.append(Problem(ORDER, order, "does not name every stage once", way_out).within(SPACE))
    return list(dict.fromkeys(tuple(map(str, order)) for order in given))


def _variants(
    stage: Stage, values: Mapping[str, list[Any]], listed: bool, problems: list[Problem]
) -> dict[tuple[int, ...], Variant]:
    """The stage with each choice of ``values``; of its own space only what its checks accept."""
    found: dict[tuple[int, ...], Variant] = {}
    for indices in product(*(range(len(several)) for several in values.values())):
        chosen = {name: several[i] for (name, several), i in zip(values.items(), indices, strict=True)}
        variant = vary(stage, chosen, SPACE)
        refused = own_problems(variant, SPACE)
        if not refused:
            found[indices] = variant
        elif listed:
            problems += refused
    return found


def _subsets(names: Sequence[str]) -> Iterator[frozenset[str]]:
    for chosen in product((False, True), repeat=len(names)):
        yield frozenset(name for name, is_in in zip(names, chosen, strict=True) if is_in)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
