"""The base of stages that win back what earlier stages lost: they aim at the dense layer's outputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from lightning.pytorch import LightningModule
from torch import Tensor

from pqqp_lightning.algorithms.grid import Grid
from pqqp_lightning.algorithms.polish import Repaired, damped_hessian, dense_inputs_map
from pqqp_lightning.calibration.statistics import Hessian, PairedHessian
from pqqp_lightning.errors import Problem
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.layers import Layer
from pqqp_lightning.stages.dense_target import check_aims_at_dense, describe_gain
from pqqp_lightning.stages.hessian import check_hessian_arguments
from pqqp_lightning.stages.layerwise import Compressed, Found, LayerInputs, LayerwiseStage
from pqqp_lightning.stages.stage import Context, Plan, Stage

RepairInputs = Literal["dense", "compressed", "mixed"]


@dataclass(frozen=True)
class Prepared:
    """What the layers that share an input are repaired with.

    Attributes:
        hessian: damped [I, I].
        dense_inputs: the map [I, I] from dense weights to targets, see ``dense_inputs_map``; None if they are equal.
    """

    hessian: Tensor
    dense_inputs: Tensor | None = None


def check_inputs(inputs: str, words: Any) -> list[Problem]:
    """The problem of ``inputs`` that is none of the ``Literal`` type's words, which Python does not enforce."""
    if inputs in get_args(words):
        return []
    text = f"is not one of {', '.join(get_args(words))}"
    return [Problem("inputs", inputs, text, "Leave it out for the default.")]


class DenseAimedStage(Stage):
    """A stage that wins back what earlier stages lost: it aims at the dense model, within masks and grids.

    Args:
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    needs_dense = True
    nothing_to_repair: ClassVar[str] = "no earlier stage prunes or quantizes its layers"
    """Why :meth:`repairs` is False of every layer, for the refusal."""

    def repairs(self, kept: Collection[str]) -> bool:
        """Whether the method applies to a layer that must keep these: "mask", "grid", both or none."""
        return bool(kept)

    def check(self, model: LightningModule, data: Any, earlier: Sequence[Stage]) -> list[Problem]:
        problems = super().check(model, data, earlier)
        layers = self.find_layers(model)
        aims = check_aims_at_dense(self, model, earlier)
        if layers and not problems and not aims:
            problems += self._check_earlier(model, earlier, layers)
        return problems + aims

    def _check_earlier(
        self, model: LightningModule, earlier: Sequence[Stage], layers: dict[str, Layer]
    ) -> list[Problem]:
        """The problem of stages before this one that leave nothing for it to repair."""
        kept: dict[str, set[str]] = {name: set() for name in layers}
        for stage in earlier:
            for name in layers.keys() & set(stage.find_layers(model)):
                kept[name].update(stage.promises)
        if any(self.repairs(promises) for promises in kept.values()):
            return []
        return [Problem(text=f"has nothing to repair: {self.nothing_to_repair}", way_out="Put it after them.")]

    def repairable_layers(self, model: LightningModule, context: Context) -> dict[str, Layer]:
        """The stage's layers that the method applies to and that the dense model has; the record says what is left."""
        layers: dict[str, Layer] = {}
        for name, layer in self.find_layers(model).items():
            kept = [promise for promise in ("mask", "grid") if constraints_of(layer).has(promise)]
            if not self.repairs(kept):
                context.found(f"left as it is: {self.nothing_to_repair}", [name])
            elif context.dense(layer) is None:
                context.found("left as it is: the dense model has no such layer", [name])
            else:
                layers[name] = layer
        return layers


class RepairStage(DenseAimedStage, LayerwiseStage):
    """A stage that moves compressed layers towards the dense ones, within their masks and grids.

    A method writes :meth:`repair`.

    Args:
        inputs: where the outputs come from that a layer shall reproduce: those of its dense weights on the "compressed"
            model's inputs, the outputs in the "dense" model itself, which also makes up for earlier layers' errors, or
            the mean of both ("mixed").
        damping: fraction of the Hessian's mean diagonal that is added to it.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    def __init__(self, inputs: RepairInputs = "compressed", damping: float = 0.01, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inputs, self.damping = inputs, damping
        self._ratios: list[float] = []  # of the objective, after by before, for the record

    @property
    def statistic(self) -> type[Hessian]:  # type: ignore[override]
        """X^T X, with the dense model's inputs beside it where the target needs them."""
        return Hessian if self.inputs == "compressed" else PairedHessian

    def repair(self, inputs: LayerInputs, target: Tensor) -> Repaired:
        """The method itself: new weights within the mask and the grid of ``inputs``, as near to ``target`` as possible.

        Args:
            inputs: of the layer; the statistic is the damped Hessian [I, I].
            target: the weights [O, I], without mask and grid, whose outputs the layer shall have.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no repair")

    def check_arguments(self) -> list[Problem]:
        problems = super().check_arguments() + check_hessian_arguments(1, self.damping)
        wrong = check_inputs(self.inputs, RepairInputs)
        if not wrong and self.inputs != "compressed" and self.damping == 0:
            text = f"leaves the target of inputs={self.inputs} undetermined"
            problems.append(Problem("damping", self.damping, text, "Use 0.01, or inputs: compressed."))
        return problems + wrong

    def prepare(self, statistic: Tensor, found: Found) -> Sequence[Prepared]:
        if self.inputs == "compressed":
            return [Prepared(damped_hessian(hessian, self.damping)) for hessian in statistic]
        prepared = []
        for hessian, cross in statistic:
            damped = damped_hessian(hessian, self.damping)
            if not bool(cross.any()):
                found("the dense model computes other rows here: repaired as with inputs: compressed")
                prepared.append(Prepared(damped))
                continue
            target = cross if self.inputs == "dense" else (hessian + cross) / 2
            prepared.append(Prepared(damped, dense_inputs_map(hessian, damped, target)))
        return prepared

    def compress_unreached(self, inputs: LayerInputs) -> Compressed:
        return self._compressed(inputs, inputs.weight, inputs.grid)

    def compress_layer(self, inputs: LayerInputs) -> Compressed:
        assert inputs.dense is not None
        prepared: Prepared = inputs.statistic
        target = inputs.dense
        if prepared.dense_inputs is not None:
            target = target.float() @ prepared.dense_inputs.T
        repaired = self.repair(replace(inputs, statistic=prepared.hessian), target)
        if repaired.before > 0:
            self._ratios.append(repaired.after / repaired.before)
        return self._compressed(inputs, repaired.weight, repaired.grid)

    def _compressed(self, inputs: LayerInputs, weight: Tensor, grid: Grid | None) -> Compressed:
        # One scale of all groups stays as it is; joined from the groups it would become one scale for each row.
        return Compressed(weight, grid=None if inputs.shares_scale else grid)

    def compress(self, model: LightningModule, context: Context) -> Plan:
        self._ratios = []
        self.compress_layers(model, self.repairable_layers(model, context), context)
        context.notes += describe_gain(self._ratios, "masks and grids")
        return {}
