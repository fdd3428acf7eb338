"""Basis Sharing (Wang et al., arXiv 2410.03765)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from pqqp_lightning.algorithms.basis_sharing import rank_for, share_basis
from pqqp_lightning.errors import shorten
from pqqp_lightning.network.blocks import Blocks
from pqqp_lightning.network.layers import is_adapter
from pqqp_lightning.network.name_patterns import matches
from pqqp_lightning.stages import Context, Hessian, Layer, Plan, Problem, Reading, SearchSpace, Stage, constraints_of
from pqqp_lightning.surgery.factored import factor_layers, factors_of, group_layers

SHARING = [
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "fc1"),  # LLaMA, OPT, Phi
    *("qkv", "query", "key", "value", "query_key_value", "dense_h_to_4h", "fc_in"),  # timm, BERT, NeoX, GPT-J
]
"""Projections that share a basis by default: those that read the residual stream. Sharing W_O and W_Down, which write
to it, costs more than it saves (section 3.3 of the paper)."""


class BasisSharing(Stage):
    """Factorises the weights of consecutive layers into one shared basis and coefficients for each layer.

    The q projections of two neighbouring blocks share a basis, their k projections share another, and so on. Each
    attention output and down projection has its own basis. Bases and coefficients minimize the change of the outputs
    on the calibration data. Only Linear layers are factorised. Later stages act on both factors, and once on each
    shared basis.

    Calibration proceeds block by block. A group is factorised when the inputs of its last block are known. Until then
    its earlier blocks compute with their dense layers.

    Example::

        stages:
          share: {class_path: BasisSharing, init_args: {ratio: 0.2, group: 2}}

    Args:
        ratio: fraction of the layers' parameters to save, in (0, 1); the ranks follow from it.
        group: consecutive layers that share a basis; 1 factorises every layer alone. A larger group has more basis
            vectors, but all its layers must use them.
        share: name patterns of the layers that share; by default the projections that read the residual stream (q, k,
            v, gate, up, fc1, qkv). The other targets are factorised layer by layer.
        damping: weight added to every input direction, as a fraction of the inputs' mean square; a larger value relies
            less on the calibration data.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Wang et al. 2024, Basis Sharing, arXiv 2410.03765"
    compresses = True
    needs_forward = True
    needs_calibration = True
    search_space: ClassVar[SearchSpace] = {"ratio": (0.1, 0.2, 0.3)}

    def __init__(
        self,
        ratio: float = 0.2,
        group: int = 2,
        share: list[str] | None = None,
        damping: float = 1e-4,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.ratio, self.group, self.share, self.damping = ratio, group, share, damping

    def find_layers(self, model: nn.Module) -> dict[str, Layer]:
        """The Linear layers among the targets."""
        return {name: layer for name, layer in super().find_layers(model).items() if isinstance(layer, nn.Linear)}

    def reason_to_leave(self, layer: Layer) -> str:
        return "factorises Linear layers" if super().reason_to_leave(layer) else ""  # Conv2d has a note of its own

    def check_arguments(self) -> list[Problem]:
        problems = super().check_arguments()
        if not 0 < self.ratio < 1:
            way_out = "0.2 saves a fifth of the layers' parameters."
            problems.append(Problem("ratio", self.ratio, "is not in (0, 1)", way_out))
        if self.group < 1:
            way_out = "2 lets two layers share a basis, 1 none."
            problems.append(Problem("group", self.group, "is not above 0", way_out))
        if not 0 <= self.damping <= 1:
            problems.append(Problem("damping", self.damping, "is not in [0, 1]", "Leave it out for 0.0001."))
        return problems

    def check(self, model: LightningModule, data: Any, earlier: Sequence[Stage]) -> list[Problem]:
        problems = super().check(model, data, earlier)
        problems += self.refuse_after(
            model,
            earlier,
            ("mask", "grid"),
            "products of factors keep neither zeros nor a grid",
            "Put BasisSharing first, or set allow_undo: true to lose what they carry.",
        )
        layers = self.find_layers(model)
        problems += self._check_structure(model, layers)
        for pattern in self.share or []:
            if not any(matches(name, pattern) for name in layers):
                problems.append(self.unmatched("share", pattern))
        return problems + ([] if self.check_arguments() else self._check_ranks(model))

    def expected_plan(self, model: LightningModule) -> Plan:
        layers = self.find_layers(model)
        groups, _ = self._groups(layers, self.find_blocks(model))
        return {"groups": [{"layers": names, "rank": rank_for(self.ratio, *_shape(layers, names))} for names in groups]}

    @staticmethod
    def restructure(model: LightningModule, plan: Plan) -> None:
        for group in plan["groups"]:
            factor_layers(model, group["layers"], group["rank"])

    def compress(self, model: LightningModule, context: Context) -> Plan:
        layers, plan = self.find_layers(model), self.expected_plan(model)
        self._note_undone(layers, context)
        self._note_structure(model, plan, context)
        group_of = {name: group for group in plan["groups"] for name in group["layers"]}
        grams: dict[str, Tensor | None] = {}  # of layers whose group is not complete yet; None without a token

        def factorise(reading: Reading) -> None:
            gram = reading.statistic.value()[0]
            for name in reading.layers:
                group, grams[name] = group_of[name], gram
                if all(member in grams for member in group["layers"]):  # this was the last layer of the group
                    self._factorise(model, group, [grams.pop(member) for member in group["layers"]], context)

        def unreached(missed: dict[str, Layer]) -> None:
            context.found("factorised as if all inputs were alike, since no calibration token reached it", missed)
            for name in missed:
                group, grams[name] = group_of[name], None
                if all(member in grams for member in group["layers"]):
                    self._factorise(model, group, [grams.pop(member) for member in group["layers"]], context)

        context.calibrate(self.find_blocks(model), layers, Hessian, factorise, unreached)
        return plan

    def _factorise(
        self, model: LightningModule, group: dict[str, Any], grams: list[Tensor | None], context: Context
    ) -> None:
        # the group's layers have different inputs, and the error counts on all of them
        names, known = group["layers"], [gram for gram in grams if gram is not None]
        with ExitStack() as turns:
            for parent in dict.fromkeys(name.rpartition(".")[0] for name in names):  # it will hold the new modules
                turns.enter_context(context.offload.turn(model.get_submodule(parent)))
            self._replace(model, names, known, group["rank"], context)

    def _replace(
        self, model: LightningModule, names: list[str], known: list[Tensor], rank: int, context: Context
    ) -> None:
        """Replace the layers ``names`` by factors that share a basis, found from the ``known`` Gram matrices."""
        weights = [model.get_parameter(f"{name}.weight").detach() for name in names]
        gram = torch.stack(known).sum(0) if known else torch.eye(weights[0].shape[1], device=weights[0].device)
        shared = share_basis(weights, gram, rank, damping=self.damping)
        modules = factor_layers(model, names, rank)
        with torch.no_grad():
            modules[0].basis.weight.copy_(shared.basis)
            for module, coefficients in zip(modules, shared.coefficients, strict=True):
                module.coefficients.weight.copy_(coefficients)
        if bool(shared.dead.any()):
            context.found("some inputs are always zero; only damping weighs their weights", names)
        if shared.damping > self.damping:
            context.found(f"damping raised to {shared.damping:g}, the inputs are ill-conditioned", names)

    def _groups(self, layers: dict[str, Layer], blocks: Blocks) -> tuple[list[list[str]], list[str]]:
        return group_layers(layers, blocks, SHARING if self.share is None else self.share, self.group)

    def _check_targets(self, model: LightningModule) -> list[Problem]:
        chosen = super().find_layers(model)
        if chosen and not self.find_layers(model):
            text = f"factorises Linear layers, but {shorten(chosen)} that it would act on are Conv2d"
            return [Problem(text=text, way_out="Name Linear layers in targets, or take the stage out.")]
        return super()._check_targets(model)

    def _check_structure(self, model: nn.Module, layers: dict[str, Layer]) -> list[Problem]:
        """Layers that are already factors, or the base of an adapter."""
        problems = []
        if factors := [name for name in factors_of(model) if name in layers]:
            text = f"{shorten(factors)} are factors that an earlier BasisSharing made"
            way_out = "Use one with the larger ratio, or give the stages disjoint targets."
            problems.append(Problem(text=text, way_out=way_out))
        if adapted := [name for name in layers if _has_adapter(model, name)]:
            text = f"{shorten(adapted)} carry adapters that were kept apart, which fit no factors"
            problems.append(Problem(text=text, way_out="Merge them (merge: true), or put BasisSharing first."))
        return problems

    def _check_ranks(self, model: LightningModule) -> list[Problem]:
        layers = self.find_layers(model)
        small = [n for g in self.expected_plan(model)["groups"] if g["rank"] < 1 for n in g["layers"]]
        if not small:
            return []
        most = min(1 - sum(layers[name].weight.shape) / layers[name].weight.numel() for name in small)
        way_out = f"Use ratio={most:.3g} at most, or add" if most >= 0.01 else "Add"
        text = f"leaves no basis vector to {shorten(small)}"
        return [Problem("ratio", self.ratio, text, f"{way_out} them to ignore.")]

    def _note_undone(self, layers: dict[str, Layer], context: Context) -> None:
        carried = [constraints_of(layer) for layer in layers.values()]
        for what, count in {
            "mask": sum(c.mask_bits is not None for c in carried),
            "grid": sum(c.grid is not None for c in carried),
        }.items():
            if count:
                context.undone = True
                context.notes.append(f"undone: the {what} of {count} layers, which became products of dense factors")

    def _note_structure(self, model: LightningModule, plan: Plan, context: Context) -> None:
        layers, ranks, factors = self.find_layers(model), defaultdict(set), 0
        for group in plan["groups"]:
            factors += group["rank"] * sum(_shape(layers, group["layers"]))
            for name in group["layers"]:
                ranks[name.rpartition(".")[2]].add(group["rank"])
        share = factors / sum(layer.weight.numel() for layer in layers.values())
        listed = ", ".join(f"{kind} {' or '.join(map(str, sorted(found)))}" for kind, found in ranks.items())
        shared = sum(len(group["layers"]) > 1 for group in plan["groups"])
        context.notes.append(
            f"{len(layers)} layers on {len(plan['groups'])} bases, {shared} of them shared: {share:.1%} of the layers' "
            f"parameters; ranks: {listed}"
        )
        if left := [name for name in super().find_layers(model) if name not in layers]:
            context.found("unchanged, since only Linear layers are factorised", left)
        if odd := self._groups(layers, self.find_blocks(model))[1]:
            context.found("factorised alone, since their neighbours' inputs have another width", odd)


def _shape(layers: dict[str, Layer], names: list[str]) -> tuple[int, int]:
    """(I, N): the inputs of the layers ``names``, and the outputs of all of them."""
    return layers[names[0]].weight.shape[1], sum(layers[name].weight.shape[0] for name in names)


def _has_adapter(model: nn.Module, name: str) -> bool:
    """Whether a layer is wrapped together with adapters."""
    parent, _, child = name.rpartition(".")
    return child == "base_layer" and any(map(is_adapter, model.get_submodule(parent).modules()))
