"""Plans a sweep: every point of the grid in every order that can run, and the curve of quantization alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from pqqp_lightning.errors import Problem, RecipeError, suggest
from pqqp_lightning.experiments.options import SweepOptions
from pqqp_lightning.experiments.sweep_grid import (
    Point,
    Variant,
    arguments_text,
    make_points,
    make_variants,
    own_problems,
    read_values,
    vary,
)
from pqqp_lightning.runs.checks import check_places
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.trials.prefix_tree import Order

BITS = "bits"
MOST_STAGES = 4
Variants = Mapping[str, Sequence[Variant]]


@dataclass(frozen=True)
class Curve:
    """The quantizing stage alone at all its rates, as the reference for the other stage.

    Attributes:
        name: the name of the stage.
        other: the name of the other stage.
        along: the arguments that vary along a curve; each choice of the other arguments has its own curve.
        variants: the variants of the grid and of ``--curve_bits``.
    """

    name: str
    other: str
    along: frozenset[str]
    variants: list[Variant]

    def label(self, variant: Variant) -> str:
        """The label of a variant's curve."""
        return arguments_text({name: value for name, value in variant.arguments.items() if name not in self.along})


@dataclass(frozen=True)
class Plan:
    """The plan of a sweep.

    Attributes:
        variants: the variants of every stage.
        points: the points of the grid.
        curve: the curve of quantization alone, for two stages of which one quantizes.
    """

    variants: dict[str, list[Variant]]
    points: list[Point]
    curve: Curve | None

    @property
    def steps(self) -> dict[str, Variant]:
        """Every variant of the grid and of the curve, by step."""
        extra = self.curve.variants if self.curve else []
        return {variant.step: variant for variant in chain(*self.variants.values(), extra)}

    @property
    def sequences(self) -> list[Order]:
        """The sequences to measure: the curve, then point by point, so that a sweep that stops has complete points."""
        alone = [(variant.step,) for variant in self.curve.variants] if self.curve else []
        return [*alone, *(order for point in self.points for order in point.orders)]


def make_plan(
    stages: Sequence[Stage],
    data: RunData,
    options: SweepOptions,
) -> Plan:
    """Check the grid and make the plan.

    Args:
        stages: of the recipe.
        data: the dense model and its data, for the checks.
        options: the grid, the curve, the stages that stay last and the limit of points.

    Raises:
        RecipeError: with every problem.
    """
    if not 1 <= len(stages) <= MOST_STAGES:
        text = f"sweep needs 1 to {MOST_STAGES} stages, but the recipe has {len(stages)}"
        raise RecipeError(Problem(text=text, way_out="Change them.").within("stages"))
    if not options.grid:
        names = " or ".join(stage.name for stage in stages)
        way_out = f"Add --grid.STAGE.ARGUMENT [a,b], where STAGE is {names}."
        raise RecipeError(Problem(text="is missing", way_out=way_out).within("grid"))
    variants = make_variants(stages, options.grid)
    problems = [problem for own in variants.values() for variant in own for problem in own_problems(variant)]
    problems += _check_last(options.last, variants)
    ordered = {name: own for name, own in variants.items() if name not in options.last}
    found = _find_curve(ordered, options.curve, options.curve_bits, problems)
    if (count := math.prod(map(len, variants.values()))) > options.max_points:
        text = f"has {count} points, more than max_points={options.max_points}"
        problems.append(Problem(text=text, way_out="Shorten it, or raise max_points.").within("grid"))
    if problems:
        raise RecipeError(problems)
    points = make_points(variants, data, options.last)
    if found is not None:
        # a stage of the recipe may be unable to run alone on this model
        able = [variant for variant in found.variants if not check_places([variant.stage], data)]
        found = replace(found, variants=able) if able else None
    return Plan(variants, points, found)


def _check_last(last: Sequence[str], variants: Variants) -> list[Problem]:
    """The problems of the stages that stay last."""
    problems = []
    for name in last:
        if name not in variants:
            problems.append(Problem("last", name, "is not the name of a stage", suggest(name, variants).strip()))
    if twice := [name for i, name in enumerate(last) if name in last[:i]]:
        problems.append(Problem("last", list(last), f"names {twice[0]} twice", "Name every stage once."))
    return problems


def _find_curve(variants: Variants, named: str | None, bits: Sequence[int], problems: list[Problem]) -> Curve | None:
    """The curve that the user names, or the only possible one; problems are added to ``problems``."""
    if named is not None and named not in variants:
        problems.append(Problem("curve", named, "is not the name of a stage", suggest(named, variants).strip()))
        return None
    if named is not None and "grid" not in (stage := variants[named][0].stage).promises:
        text = f"is a {type(stage).__name__}, which does not quantize"
        problems.append(Problem("curve", named, text, "Name the stage that does."))
        return None
    if len(variants) != 2:
        if named is not None or bits:
            argument, value = ("curve", named) if named is not None else ("curve_bits", list(bits))
            text = f"needs two stages that change places, but the recipe has {len(variants)}"
            problems.append(Problem(argument, value, text, "Leave it out."))
        return None
    name = named or _quantizing(variants, problems)
    if name is None:
        if bits and not problems:
            text = f"needs a stage, but none has '{BITS}' in the grid"
            problems.append(Problem("curve_bits", list(bits), text, "Say which with --curve STAGE."))
        return None
    other = next(n for n in variants if n != name)
    own = variants[name]
    # every variant of a stage has the same arguments, those of the grid
    along = {BITS} if bits or BITS in own[0].arguments else set(own[0].arguments)
    return Curve(name, other, frozenset(along), [*own, *_further(own, bits, problems)])


def _quantizing(variants: Variants, problems: list[Problem]) -> str | None:
    """The stage whose bits are in the grid, or else the only one that promises a grid."""
    with_bits = [name for name, own in variants.items() if BITS in own[0].arguments]
    if len(with_bits) > 1:
        both = " and ".join(with_bits)
        way_out = f"Say which one the curve is of: --curve {with_bits[0]}."
        problems.append(Problem(text=f"{both} both have '{BITS}'", way_out=way_out).within("grid"))
        return None
    with_grid = [name for name, own in variants.items() if "grid" in own[0].stage.promises]
    return next(iter(with_bits or (with_grid if len(with_grid) == 1 else [])), None)


def _further(own: Sequence[Variant], bits: Sequence[int], problems: list[Problem]) -> list[Variant]:
    """The variants at bit widths that only the curve has."""
    if not bits:
        return []
    stage = own[0].stage
    values, found = read_values(stage, BITS, list(bits))
    problems += [_of_curve_bits(problem, type(stage).__name__) for problem in found]
    # compare all arguments: a variant without bits in the grid has the recipe's, which curve_bits may name again
    there, further = [variant.stage.arguments() for variant in own], dict[str, Variant]()
    for variant in own:
        for value in values:
            new = vary(variant.stage, {**variant.arguments, BITS: value})
            if new.stage.arguments() not in there:
                further[new.step] = new
    for variant in further.values():
        for problem in own_problems(variant):
            problems.append(_of_curve_bits(problem, problem.owner) if problem.argument == BITS else problem)
    return list(further.values())


def _of_curve_bits(problem: Problem, owner: str) -> Problem:
    """The problem of the stage's bits, moved to ``--curve_bits``, which set them."""
    return replace(problem, key="").within("curve_bits", owner)
