"""SLEB (Song et al., arXiv 2402.09025)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from pqqp_lightning.algorithms.sleb import Removal, count_evaluations, remove_greedily
from pqqp_lightning.calibration.removal_losses import Output, Part, RemovalLosses, observe_outputs, pass_through
from pqqp_lightning.calibration.walk import Walk, calibrating
from pqqp_lightning.errors import Problem, RecipeError, near_miss
from pqqp_lightning.network.blocks import keep_blocks, model_blocks
from pqqp_lightning.network.name_patterns import matches, matches_any
from pqqp_lightning.stages import Context, ExpectedWeights, Layer, Plan, SearchSpace, Stage
from pqqp_lightning.surgery.removal import (
    Sublayer,
    outside_of_a_list,
    remove_blocks,
    remove_sublayer,
    sublayers_of,
    substitutes,
)


@dataclass(frozen=True)
class _Unit:
    """A candidate for removal: a block, or one of its sublayers."""

    name: str
    block: str
    sublayer: Sublayer | None = None

    @property
    def names(self) -> list[str]:
        """The names that ``targets`` and ``ignore`` are matched against."""
        return [self.name] + [f"{self.block}.{child}" for child in (self.sublayer.rest if self.sublayer else ())]


class SLEB(Stage):
    """Removes blocks, or attention and MLP sublayers, one at a time, each time the one that raises the loss least.

    The loss is the module's own training loss, averaged over the calibration batches. Candidates share the activations
    of the blocks before them: with L blocks, a round evaluates L(L-1)/2 + L-1 blocks for each batch, about half of the
    L(L-1) of whole forward passes, and holds one hidden state at a time. With N = 2L sublayers it evaluates about
    N**2/2 + N sublayers instead of N(N-1). Where the blocks do not feed one another directly, each candidate takes a
    whole forward pass. The record has the counts.

    After removing blocks, a Hugging Face model is a stock model with fewer layers. A removed sublayer takes its weights
    and norm with it; generation with a cache of keys and values is then not guaranteed to work. The other layers keep
    their masks and grids, so that the stage can be anywhere in the list. In a ResNet only blocks with equal input and
    output shapes can be removed, and there are no such sublayers.

    Example::

        stages:
          shorten: {class_path: SLEB, init_args: {amount: 0.25, ignore: [layers.0]}}

    Args:
        amount: how many to remove, or which fraction of all blocks (sublayers), in (0, 1), rounded to a whole number.
        granularity: "block", or "sublayer" to remove the attention or the MLP of a block alone.
        targets: name patterns of the blocks (sublayers) that may be removed ("layers.1[0-9]", "self_attn"); all by
            default.
        ignore: name patterns of blocks (sublayers) that must stay.
        blocks: module names of the blocks, elements of a ModuleList or Sequential; found by structure by default.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Song et al. 2024, SLEB: Streamlining LLMs through Redundancy Verification, arXiv 2402.09025"
    compresses = True
    needs_calibration = True
    search_space: ClassVar[SearchSpace] = {"amount": (0.1, 0.2, 0.3)}

    def __init__(self, amount: int | float, granularity: Literal["block", "sublayer"] = "block", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.amount, self.granularity = amount, granularity

    def reason_to_leave(self, layer: Layer) -> str:
        return ""  # a block is removed with everything in it

    def check_arguments(self) -> list[Problem]:
        problems = super().check_arguments()
        if self.granularity not in ("block", "sublayer"):
            problems.append(Problem("granularity", self.granularity, "is unknown", "Use block or sublayer."))
        whole = isinstance(self.amount, int)
        if not (self.amount >= 1 if whole else 0 < self.amount < 1):
            wrong = "removes nothing" if self.amount == 0 else "is neither a whole number above 0 nor a fraction"
            problems.append(Problem("amount", self.amount, wrong, "Use 3 for three of them, or 0.1 for a tenth."))
        return problems

    def reason_by_use(self, layer: Layer) -> str:
        """None: a block goes with all its layers, used or not."""
        return ""

    def check(self, model: LightningModule, data: Any, earlier: Sequence[Stage]) -> list[Problem]:
        problems = super().check(model, data, earlier)
        if not is_overridden("training_step", model):
            text = f"needs a training_step in {type(model).__name__}: its loss decides what is removed"
            problems.append(Problem(text=text, way_out="Define one."))
        elif not model.automatic_optimization:
            text = (
                f"{type(model).__name__} optimizes by hand in its training_step, which cannot be run for its loss alone"
            )
            problems.append(Problem(text=text, way_out="Set automatic_optimization, or leave the stage out."))
        if not problems:  # the checks of names and amount need blocks of a known build
            problems += self._check_blocks(model) or self._check_patterns(model) or self._check_amount(model)
        return problems

    def expected_plan(self, model: LightningModule) -> Plan:
        """The last of the smallest units, so that the expected size is the exact one or an upper bound."""
        units = sorted(self._units(model), key=lambda unit: -_parameters_of(model, unit))
        return self._plan(model, units[-self._count(model) :], {})

    def expected_weights(self, model: LightningModule, weights: ExpectedWeights) -> ExpectedWeights:
        kinds = set()
        for unit in self._units(model):
            inside = [name for name in weights.weights if name.startswith(f"{unit.name}.")]
            stored = [weights.weights[name].size_bytes() for name in inside]
            kinds.add((_parameters_of(model, unit), tuple(stored)))
        return weights.changed({}, exact=len(kinds) == 1)

    def compress(self, model: LightningModule, context: Context) -> Plan:
        walk = context.walk(self.find_blocks(model))
        try:
            with calibrating(walk.model), walk.forward_context():
                units, outputs = self._observe(model, walk, context)
                losses = _make_losses(walk, model, units, outputs, context)
                removals = remove_greedily(self._count(model), len(units), losses)
        except ArithmeticError as error:
            problem = Problem(text=str(error), way_out="Check the model and the calibration data.")
            raise RecipeError(problem.within(f"stages.{context.title}")) from error
        self._note(model, context, units, removals, shared=losses.shared)
        plan = self._plan(model, [units[removal.unit] for removal in removals], outputs)
        self.restructure(model, plan)
        return plan

    @staticmethod
    def restructure(model: LightningModule, plan: Plan) -> None:
        # a stage with other blocks than the model's must not change what later stages take for the model's blocks
        default = list(model_blocks(model)) == plan["blocks"]
        left = {name: model.get_submodule(name) for name in plan["blocks"]}
        if plan["granularity"] == "block":
            left = remove_blocks(model, plan["blocks"], plan["removed"])
        for block, branch, rest, outputs in plan.get("sublayers", []):
            remove_sublayer(model, block, Sublayer(branch, tuple(rest)), outputs)
        if default:
            keep_blocks(left)

    def _plan(self, model: nn.Module, removed: Sequence[_Unit], outputs: dict[str, Output]) -> Plan:
        plan: Plan = {"granularity": self.granularity, "blocks": list(self.find_blocks(model))}
        plan["removed"] = [unit.name for unit in removed]
        if self.granularity == "sublayer":
            plan["sublayers"] = [
                [u.block, u.sublayer.branch, list(u.sublayer.rest), outputs[u.name].outputs if outputs else 0]
                for u in removed
                if u.sublayer is not None
            ]
        return plan

    def _all_units(self, model: nn.Module) -> list[_Unit]:
        """All blocks, or all sublayers that were not removed before."""
        blocks = self.find_blocks(model)
        if self.granularity == "block":
            return [_Unit(name, name) for name in blocks]
        return [
            _Unit(f"{name}.{sublayer.branch}", name, sublayer)
            for name, block in blocks.items()
            for sublayer in sublayers_of(block) or ()
        ]

    def _units(self, model: nn.Module) -> list[_Unit]:
        """The units that may be removed, judged by structure: a block with a ``downsample`` changes the shape."""
        return [
            unit
            for unit in self._all_units(model)
            if (self.targets is None or any(matches_any(name, self.targets) for name in unit.names))
            and not any(matches_any(name, self.ignore or []) for name in unit.names)
            and getattr(model.get_submodule(unit.block), "downsample", None) is None
        ]

    def _count(self, model: nn.Module) -> int:
        if isinstance(self.amount, int):
            return self.amount
        return math.floor(self.amount * len(self._all_units(model)) + 0.5)

    def _check_blocks(self, model: LightningModule) -> list[Problem]:
        blocks = self.find_blocks(model)
        if list(blocks) == [""]:
            way_out = "Name them in blocks, as elements of a ModuleList or Sequential."
            return [Problem(text="the model has no row of blocks", way_out=way_out)]
        if self.granularity == "block":
            text = "is not an element of a ModuleList or Sequential and cannot be removed"
            return [Problem("blocks", name, text, "Change blocks.") for name in outside_of_a_list(model, blocks)]
        other = {type(block).__name__: None for block in blocks.values() if sublayers_of(block) is None}
        if not other:
            return []
        text = (
            f"needs blocks of one attention and one MLP sublayer, each with its own norm; those of class "
            f"{', '.join(other)} are built otherwise"
        )
        return [Problem("granularity", self.granularity, text, "Use granularity: block.")]

    def _check_patterns(self, model: LightningModule) -> list[Problem]:
        names = [name for unit in self._all_units(model) for name in unit.names]
        problems = []
        for argument, patterns in (("targets", self.targets or []), ("ignore", self.ignore or [])):
            for pattern in patterns:
                if not any(matches(name, pattern) for name in names):
                    hint = near_miss(pattern, {name.rsplit(".", 1)[-1] for name in names} | set(names))
                    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                    text = f"matches no {self.granularity} ({shown})"
                    problems.append(Problem(argument, pattern, text, hint.strip()))
        return problems

    def _check_amount(self, model: LightningModule) -> list[Problem]:
        every, units, count = self._all_units(model), self._units(model), self._count(model)
        kind, most = self.granularity, min(len(units), len(every) - 1)
        if count < 1:
            text = f"of {len(every)} {kind}s rounds to none"
            return [Problem("amount", self.amount, text, "Use a whole number, or a larger fraction.")]
        if count <= most:
            return []
        if count >= len(every):
            text = f"would remove {count} of {len(every)} {kind}s and leave none"
        else:
            text = (
                f"would remove {count} {kind}s, but only {len(units)} of {len(every)} can be removed: the others match "
                "ignore, do not match targets, or change the shape"
            )
        return [Problem("amount", self.amount, text, f"Use at most {most}.")]

    def _observe(self, model: LightningModule, walk: Walk, context: Context) -> tuple[list[_Unit], dict[str, Output]]:
        """The removable units, and the outputs of each block and branch, observed on one batch.

        Raises:
            RecipeError: too few units keep the shape of their input.
        """
        units = self._units(model)
        watched = dict(walk.blocks) | {unit.name: model.get_submodule(unit.name) for unit in units}
        outputs = observe_outputs(watched, walk)
        fits = []
        for unit in units:
            if unit.name not in outputs:  # it was not called
                continue
            block = outputs[unit.block]
            # a branch is added to the hidden state and so has its shape; a whole block may change it
            if block.bare and (block.keeps_shape or unit.sublayer is not None):
                fits.append(unit)
        if odd := [unit.name for unit in units if unit not in fits]:
            what = "not called, or does not return one hidden state of its input's shape: not removed"
            context.found(what, odd)
        if len(fits) < self._count(model):
            text = (
                f"would remove {self._count(model)} {self.granularity}s, but only {len(fits)} return one hidden state "
                "of the shape of their input"
            )
            problem = Problem("amount", self.amount, text, "Use a smaller amount.")
            raise RecipeError(problem.within(f"stages.{context.title}", type(self).__name__))
        return fits, outputs

    def _note(
        self, model: nn.Module, context: Context, units: list[_Unit], removals: list[Removal], *, shared: bool
    ) -> None:
        """Note the removals with their losses, and the evaluations of each round."""
        steps = ", ".join(f"{units[r.unit].name} ({r.loss:.4f})" for r in removals)
        context.notes.append(f"removed, in this order (calibration loss after it): {steps}")
        for refused in {unit: None for r in removals for unit in r.refused}:
            context.found("without it the calibration loss is NaN or infinite: not removed", [units[refused].name])
        blocks = list(self.find_blocks(model))
        left = [sum(unit.block == block for unit in self._all_units(model)) for block in blocks]
        places = {i: blocks.index(unit.block) for i, unit in enumerate(units)}
        ours, naive = [], []
        for removal in removals:
            ours.append(count_evaluations(left, list(places.values()), shared=shared))
            naive.append(count_evaluations(left, list(places.values()), shared=False))
            left[places.pop(removal.unit)] -= 1
        if not shared:
            context.notes.append("the blocks do not feed one another directly: whole forward passes for each candidate")
        context.notes.append(
            f"{self.granularity} evaluations a batch in each round: {', '.join(map(str, ours))}; whole forward passes "
            f"would take {', '.join(map(str, naive))}"
        )


def _parameters_of(model: nn.Module, unit: _Unit) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(unit.name).parameters())


def _make_losses(
    walk: Walk, model: nn.Module, units: Sequence[_Unit], outputs: dict[str, Output], context: Context
) -> RemovalLosses:
    places = {name: place for place, name in enumerate(walk.blocks)}
    sizes = [outputs[name].outputs if name in outputs else 0 for name in walk.blocks]
    parts = []
    for unit in units:
        block = model.get_submodule(unit.block)
        if unit.sublayer is None:
            forwards = {block: pass_through(sizes[places[unit.block]])}
        else:
            found = substitutes(block, unit.sublayer, outputs[unit.name].outputs)
            forwards = {getattr(block, child): module.forward for child, module in found.items()}
        parts.append(Part(places[unit.block], forwards))
    return RemovalLosses(walk, parts, sizes, context.title, context.progress)
