"""Channel and head pruning (Li et al. 2017; Fang et al. 2023; Molchanov et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from pqqp_lightning.algorithms.channels import choose_units, group_norm, kept_count, sum_by_channel, sum_by_unit
from pqqp_lightning.calibration.channel_scores import mean_squared_inputs, taylor_by_channel
from pqqp_lightning.errors import Problem, RecipeError, shorten, suggest
from pqqp_lightning.network.activation_hooks import RotateInput, transformed_layers
from pqqp_lightning.network.blocks import is_selected, tied_weights
from pqqp_lightning.network.layers import columns_of, is_adapter, layout_of, named_layers
from pqqp_lightning.network.name_patterns import value_for
from pqqp_lightning.network.offload import offload_of
from pqqp_lightning.network.structure import find_once, weightless_copy
from pqqp_lightning.stages import Context, Layer, Plan, PruningStage, SearchSpace, Stage
from pqqp_lightning.surgery.coupling import CoupledGroup, Coupling, built_groups, has_attention
from pqqp_lightning.surgery.dependency import example_input, run_example, traced_groups
from pqqp_lightning.surgery.narrowing import conflicting_settings, narrow, plan_narrowing, rebuild_narrowed
from pqqp_lightning.surgery.slicing import SLICED_LAYERS

IMPORTANCES = ("norm", "activation", "taylor")


class ChannelPruning(Stage):
    """Removes whole channels and attention heads: the tensors become smaller, and the network faster on any hardware.

    Coupled channels are removed together. In a ResNet, torch-pruning's dependency graph finds the groups; a channel of
    the residual stream is removed from all layers that it connects. In a transformer (LLaMA and OPT families, timm's
    ViT and DeiT) ``ratio`` narrows each MLP, and ``head_ratio`` removes whole attention heads; a key and value head is
    removed with its query heads. The residual width of a transformer, and a network's inputs and outputs, keep their
    size.

    Each group of coupled channels loses the ``round(ratio * width)`` channels of least importance, summed over the
    group. The remaining channels keep an earlier stage's mask, and its grid if that has one scale for each output
    channel or for the tensor. Where all layers agree, the Hugging Face configuration has the new sizes.

    Example::

        stages:
          narrow: {class_path: ChannelPruning, init_args: {ratio: 0.5, epochs: 2}}

    Args:
        ratio: fraction of each group's channels to remove, in [0, 1); 0 removes heads only.
        importance: "norm" is the l2 norm of a channel's weights, without data; "activation" is the mean square of the
            channel, or of the head's output, on the calibration data; "taylor" is the first-order change of the
            training loss, which costs a backward pass over the calibration data.
        head_ratio: fraction of each attention's heads to remove, in (0, 1), counted in key and value heads; no head
            by default.
        targets: name patterns of the layers whose outputs may be pruned; all by default. A group is pruned only
            if all layers that produce its channels are chosen: the stem and the ends of its blocks for a ResNet's
            residual stream; q, k and v for heads; gate and up for a LLaMA's MLP.
        ignore: name patterns of layers whose outputs are not pruned.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Li et al. 2017, arXiv 1608.08710; Fang et al. 2023, DepGraph, arXiv 2301.12900"
    compresses = True
    comparable_layers = False
    search_space: ClassVar[SearchSpace] = {"ratio": (0.125, 0.25, 0.375, 0.5)}

    def __init__(
        self,
        ratio: float = 0.5,
        importance: Literal["norm", "activation", "taylor"] = "norm",
        head_ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.ratio, self.importance, self.head_ratio = ratio, importance, head_ratio

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        """Every importance except the norm reads calibration data."""
        return self.importance != "norm"

    @property
    def whole_model_arguments(self) -> dict[str, Any]:
        """As in every stage, and ``importance`` by the loss, which takes a backward pass."""
        own = {"importance": "activation"} if self.importance == "taylor" else {}
        return super().whole_model_arguments | own

    def find_layers(self, model: nn.Module) -> dict[str, Layer]:
        """The layers that become smaller: those that produce the removed channels, and those that read them."""
        try:
            groups = self._chosen(model, _find_groups(model))
        except RecipeError:  # check reports it
            return {}
        names = {member.name for group in groups for member in group.members}
        return {n: m for n, m in model.named_modules() if n in names and isinstance(m, SLICED_LAYERS)}

    def reason_by_use(self, layer: Layer) -> str:
        """None: channels go from every layer of a coupled group, used or not."""
        return ""

    def check_arguments(self) -> list[Problem]:
        problems = super().check_arguments()
        if not 0 <= self.ratio < 1:
            way_out = "0.5 removes half of each group's channels."
            problems.append(Problem("ratio", self.ratio, "is not in [0, 1)", way_out))
        if self.head_ratio is not None and not 0 < self.head_ratio < 1:
            way_out = "Leave it out to keep every head."
            problems.append(Problem("head_ratio", self.head_ratio, "is not in (0, 1)", way_out))
        if self.ratio == 0 and self.head_ratio is None:
            problems.append(Problem("ratio", self.ratio, "without head_ratio removes nothing", "Set one of them."))
        if self.importance not in IMPORTANCES:
            near = suggest(self.importance, IMPORTANCES).strip()
            problems.append(Problem("importance", self.importance, f"is not one of {', '.join(IMPORTANCES)}", near))
        return problems

    def check(self, model: LightningModule, data: Any, earlier: Sequence[Stage]) -> list[Problem]:
        problems = self.check_arguments()
        if self.importance == "taylor" and not is_overridden("training_step", model, LightningModule):
            text = f"needs a training_step in {type(model).__name__}, for its loss"
            problems.append(Problem("importance", self.importance, text, "Add one, or use norm."))
        if adapters := [name for name, module in model.named_modules() if is_adapter(module)]:
            text = f"{shorten(adapters)} are adapters kept apart"
            return [*problems, Problem(text=text, way_out="Merge them first, or put this stage first.")]
        # torch-pruning's graph of products with fused weights never ends, so it must not be asked.
        if fused := [name for name, layer in named_layers(model) if layout_of(layer).startswith("stacked")]:
            text = f"cannot trace the channels of fused experts: {shorten(fused)}"
            way_out = "Remove single weights (SparseGPT, Wanda) or whole blocks (SLEB) instead."
            return [*problems, Problem(text=text, way_out=way_out)]
        try:
            coupling = _find_groups(model)
        except RecipeError as error:
            return problems + error.problems
        if problems:
            return problems
        problems = self._check_targets(model)
        if not problems:
            coupled = [member.name for group in self._chosen(model, coupling) for member in group.members]
            problems = self.refuse_parametrized(model, coupled) or self._check_amounts(model, coupling)
        return problems or self._check_earlier(model, coupling, earlier) + self._check_runs(model, coupling)

    def expected_plan(self, model: LightningModule) -> Plan:
        coupling = _find_groups(model)
        groups = self._chosen(model, coupling)
        kept = {group.name: torch.arange(self._kept_count(group)) for group in groups}
        return plan_narrowing(model, groups, coupling.groups, kept)

    def compress(self, model: LightningModule, context: Context) -> Plan:
        coupling = _find_groups(model)
        groups = self._chosen(model, coupling)
        kept = {}
        for group, scores in zip(groups, self._scores(model, groups, context), strict=True):
            try:
                kept[group.name] = choose_units(scores.cpu(), self._share(group))
            except ArithmeticError as error:
                problem = Problem(text=f"{group.name}: {error}", way_out="Check the model's weights.")
                raise RecipeError(problem.within(f"stages.{context.title}")) from error
        plan = plan_narrowing(model, groups, coupling.groups, kept)
        self._note(context, coupling, groups, {name: len(units) for name, units in kept.items()})
        for what, layers in narrow(model, groups, kept, plan["numbers"]).items():
            context.undone = True
            context.found(f"undone: {what}", layers)
        return plan

    @staticmethod
    def restructure(model: LightningModule, plan: Plan) -> None:
        rebuild_narrowed(model, plan)

    def _share(self, group: CoupledGroup) -> float:
        """The fraction of its units that the group loses."""
        if group.kind == "heads":
            return self.head_ratio or 0.0
        return self.ratio

    def _kept_count(self, group: CoupledGroup) -> int:
        return kept_count(group.width, self._share(group))

    def _chosen(self, model: nn.Module, coupling: Coupling) -> list[CoupledGroup]:
        """The groups that lose units."""
        tied = tied_weights(model)
        makers = {
            name
            for name, module in model.named_modules()
            if isinstance(module, SLICED_LAYERS)
            and id(module.weight) not in tied
            and (self.targets is None or is_selected(name, module, self.targets))
            and not is_selected(name, module, self.ignore or [])
        }
        layers = {name for name, module in model.named_modules() if isinstance(module, SLICED_LAYERS)}
        return [
            group
            for group in coupling.groups
            if self._kept_count(group) < group.width and layers.intersection(group.outputs()) <= makers
        ]

    def _scores(self, model: LightningModule, groups: list[CoupledGroup], context: Context) -> list[Tensor]:
        """The importance of each unit of each group."""
        if self.importance == "norm":
            return [group_norm(_squares(model, group)) for group in groups]
        walk = context.walk(self.find_blocks(model))
        try:
            if self.importance == "activation":
                squares = mean_squared_inputs(walk, dict.fromkeys(name for g in groups for name in g.inputs()))
                return [self._by_activation(model, group, squares, context) for group in groups]
            members = [member for group in groups for member in group.members if _has_weight(model, member.name)]
            parts = {(member.name, int(member.side == "in")): None for member in members}
            terms = taylor_by_channel(walk, parts)
        except RecipeError as error:
            raise RecipeError([problem.within(f"stages.{context.title}") for problem in error.problems]) from error
        return [self._by_gradient(model, group, terms, context) for group in groups]

    def _by_activation(
        self, model: LightningModule, group: CoupledGroup, squares: dict[str, Tensor], context: Context
    ) -> Tensor:
        """The mean squared activation of each unit, or its norm if calibration does not reach the group."""
        if all(name in squares for name in group.inputs()):
            return _mean_by_unit(group, squares)
        context.found("ranked by norm, since no calibration token reached it", [group.name])
        return group_norm(_squares(model, group))

    def _by_gradient(
        self, model: LightningModule, group: CoupledGroup, terms: dict[tuple[str, int], Tensor], context: Context
    ) -> Tensor:
        """The first-order terms of each unit, or its norm if the loss does not depend on the group."""
        if any((member.name, int(member.side == "in")) in terms for member in group.members):
            return _sum_over(group, terms)
        context.found("ranked by norm, since the loss has no gradient for it", [group.name])
        return group_norm(_squares(model, group))

    def _no_layer(self, candidates: Iterable[str]) -> Problem:
        text = (
            f"and ignore={self.ignore} leave no layer whose channels can be removed with ratio={self.ratio} and "
            f"head_ratio={self.head_ratio}"
        )
        way_out = (
            "All layers that make a group of coupled channels must be chosen (q, k and v with head_ratio; gate and "
            "up; a residual stream's), and at least one channel must be removed."
        )
        return Problem("targets", self.targets, text, way_out)

    def _check_amounts(self, model: LightningModule, coupling: Coupling) -> list[Problem]:
        if self.head_ratio is None or any(group.kind == "heads" for group in self._chosen(model, coupling)):
            return []
        heads = [group for group in coupling.groups if group.kind == "heads"]
        if not heads:
            text = "has no effect: the model has no attention of a supported kind"
            return [Problem("head_ratio", self.head_ratio, text, "Leave it out.")]
        few = sorted({group.width for group in heads})
        text = (
            f"removes none of the {' or '.join(map(str, few))} (key and value) heads of "
            f"{shorten(group.name for group in heads)}"
        )
        way_out = "Raise it, change targets or ignore, or leave it out."
        return [Problem("head_ratio", self.head_ratio, text, way_out)]

    def _check_earlier(self, model: LightningModule, coupling: Coupling, earlier: Sequence[Stage]) -> list[Problem]:
        """Constraints that cannot be cut, and rotations of a fixed input width."""
        groups = self._chosen(model, coupling)
        modules = dict(model.named_modules())
        cut = {n: m for g in groups for n in g.inputs() if isinstance(m := modules[n], SLICED_LAYERS)}
        problems = []
        if rotated := [name for name in transformed_layers(model, RotateInput) if name in cut]:
            text = f"the inputs of {shorten(rotated)} are rotated while the model runs"
            problems.append(Problem(text=text, way_out="Put this stage first."))
        # Removing output channels keeps an N:M pattern and groups of columns; removing inputs shifts their columns.
        for stage in () if self.allow_undo else earlier:
            acted = stage.find_layers(model) if {"mask", "grid"} & set(stage.promises) else {}
            both = {name: layer for name, layer in cut.items() if name in acted}
            patterned: list[str] = []
            if isinstance(stage, PruningStage):
                patterned = [name for name in both if stage.amount(name).get("pattern") is not None]
            if patterned:
                text = f"would cut the N:M pattern of stage '{stage.name}' in the inputs of {shorten(patterned)}"
                way_out = "Put ChannelPruning first, or set allow_undo: true."
                problems.append(Problem(text=text, way_out=way_out))
            if grouped := [name for name, layer in both.items() if _has_column_groups(stage, name, layer)]:
                text = f"would cut the quantization groups of stage '{stage.name}' in the inputs of {shorten(grouped)}"
                way_out = "Put ChannelPruning first, set that stage's group_size: channel, or set allow_undo: true."
                problems.append(Problem(text=text, way_out=way_out))
        return problems

    def _check_runs(self, model: LightningModule, coupling: Coupling) -> list[Problem]:
        """Whether the narrower network runs."""
        if has_attention(model):  # its groups follow a known build; only traced ones may be wrong
            return []
        kept = tuple((group.name, self._kept_count(group)) for group in self._chosen(model, coupling))
        reason = find_once(model, ("runs with", kept), lambda: self._reason_not_to_run(model))
        if not reason:
            return []
        text = f"the network does not run with fewer channels ({reason})"
        return [Problem(text=text, way_out="Add the layers it concerns to ignore.")]

    def _reason_not_to_run(self, model: LightningModule) -> str:
        """The error of the narrower network; empty if it runs.

        A traced graph misses sizes that the model's own code has as numbers, as in a reshape.
        """
        copy = weightless_copy(model).eval()
        rebuild_narrowed(copy, self.expected_plan(model))
        try:
            with torch.no_grad():
                run_example(copy, example_input(copy))
        except Exception as error:
            return next(iter(str(error).splitlines()), type(error).__name__)
        return ""

    def _note(self, context: Context, coupling: Coupling, groups: list[CoupledGroup], units: dict[str, int]) -> None:
        for kind in ("channels", "heads"):
            some = [group for group in groups if group.kind == kind]
            if some:
                kept, whole = sum(units[g.name] for g in some), sum(g.width for g in some)
                context.notes.append(f"kept {kept} of {whole} {kind} in {len(some)} coupled groups")
        for reason, layers in coupling.unprunable.items():
            context.found(reason, layers)
        if settings := conflicting_settings(coupling.groups, units):
            names = ", ".join(sorted({setting.removeprefix("config.") for setting in settings}))
            context.notes.append(f"layers differ in {names}: the configuration keeps its old value")


def _find_groups(model: nn.Module) -> Coupling:
    """The coupled groups of ``model``: from its known build if it has attention, else from a trace."""
    return built_groups(model) if has_attention(model) else traced_groups(model)


def _has_weight(model: nn.Module, name: str) -> bool:
    return isinstance(getattr(model.get_submodule(name), "weight", None), Tensor)


def _squares(model: nn.Module, group: CoupledGroup) -> list[Tensor]:
    """The squared weights of each unit, [U] for each member with weights."""
    found = []
    for member in group.members:
        if _has_weight(model, member.name):
            with offload_of(model).turn(model.get_submodule(member.name), read_only=True):
                weight = model.get_parameter(f"{member.name}.weight").detach().float()
                found.append(sum_by_unit(sum_by_channel(weight.square(), int(member.side == "in")), member.index))
    return found


def _mean_by_unit(group: CoupledGroup, squares: dict[str, Tensor]) -> Tensor:
    """The mean squared activation of each unit, summed over the layers that read it: [U]."""
    inputs = [member for member in group.members if member.side == "in"]
    each = [sum_by_unit(squares[member.name], member.index) / member.index.shape[1] for member in inputs]
    return torch.stack(each).sum(dim=0)


def _sum_over(group: CoupledGroup, terms: dict[tuple[str, int], Tensor]) -> Tensor:
    """The first-order terms of each unit, summed over the group: [U]."""
    keys = [((member.name, int(member.side == "in")), member.index) for member in group.members]
    return torch.stack([sum_by_unit(terms[key], index) for key, index in keys if key in terms]).sum(dim=0)


def _has_column_groups(stage: Stage, name: str, layer: Layer) -> bool:
    """Whether ``stage`` puts several scales along the columns of ``layer``."""
    if "grid" not in stage.promises:
        return False
    size = value_for(name, vars(stage).get("group_size", "channel"))
    return size == "auto" or (isinstance(size, int) and size < columns_of(layer))
