"""The base of stages that win back what earlier stages lost: they aim at the dense layer's outputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningModule
from torch import Tensor

from pqqp_lightning.algorithms.grid import Grid
from pqqp_lightning.algorithms.polish import Repaired, damped_hessian
from pqqp_lightning.calibration.statistics import Hessian
from pqqp_lightning.errors import Problem, shorten
from pqqp_lightning.network.constraints import constrained_layers, constraints_of
from pqqp_lightning.network.layers import Layer
from pqqp_lightning.stages.hessian import check_hessian_arguments
from pqqp_lightning.stages.layerwise import Compressed, Found, LayerInputs, LayerwiseStage
from pqqp_lightning.stages.stage import Context, Plan, Stage


class RepairStage(LayerwiseStage):
    """A stage that moves compressed layers towards the dense ones, within their masks and grids.

    A method writes :meth:`repair`.

    Args:
        damping: fraction of the Hessian's mean diagonal that is added to it.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    statistic = Hessian
    needs_dense = True
    nothing_to_repair: ClassVar[str] = "no earlier stage prunes or quantizes its layers"
    """Why :meth:`repairs` is False of every layer, for the refusal."""

    def __init__(self, damping: float = 0.01, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.damping = damping
        self._ratios: list[float] = []  # of the objective, after by before, for the record

    def repair(self, inputs: LayerInputs, dense: Tensor) -> Repaired:
        """The method itself: new weights within the mask and the grid of ``inputs``, whose statistic is damped."""
        raise NotImplementedError(f"{type(self).__name__} defines no repair")

    def repairs(self, kept: Collection[str]) -> bool:
        """Whether the method applies to a layer that must keep these: "mask", "grid", both or none."""
        return bool(kept)

    def check_arguments(self) -> list[Problem]:
        return super().check_arguments() + check_hessian_arguments(1, self.damping)

    def check(self, model: LightningModule, data: Any, earlier: Sequence[Stage]) -> list[Problem]:
        problems = super().check(model, data, earlier)
        layers = self.find_layers(model)
        loaded = sorted(name for name, _, _ in constrained_layers(model) if name in layers)
        if loaded:
            text = f"aims at the dense weights, and the model was compressed before this run: {shorten(loaded)}"
            problems.append(Problem(text=text, way_out="Run all stages in one recipe, from the dense model."))
        elif layers and not problems:
            problems += self._check_earlier(model, earlier, layers)
        for stage in earlier:
            if not stage.comparable_layers:
                text = f"aims at the dense weights, and stage '{stage.name}' changed what the layers compute"
                problems.append(Problem(text=text, way_out="Leave one of the two out."))
            elif stage.epochs and not self.allow_undo:
                text = f"aims at the dense weights and would undo the training of stage '{stage.name}'"
                problems.append(Problem(text=text, way_out="Put it before that training, or set allow_undo: true."))
        return problems

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

    def prepare(self, statistic: Tensor, found: Found) -> Sequence[Tensor]:
        return [damped_hessian(hessian, self.damping) for hessian in statistic]

    def compress_unreached(self, inputs: LayerInputs) -> Compressed:
        return self._compressed(inputs, inputs.weight, inputs.grid)

    def compress_layer(self, inputs: LayerInputs) -> Compressed:
        assert inputs.dense is not None
        repaired = self.repair(inputs, inputs.dense)
        if repaired.before > 0:
            self._ratios.append(repaired.after / repaired.before)
        return self._compressed(inputs, repaired.weight, repaired.grid)

    def _compressed(self, inputs: LayerInputs, weight: Tensor, grid: Grid | None) -> Compressed:
        # One scale of all groups stays as it is; joined from the groups it would become one scale for each row.
        return Compressed(weight, grid=None if inputs.shares_scale else grid)

    def compress(self, model: LightningModule, context: Context) -> Plan:
        self._ratios = []
        layers: dict[str, Layer] = {}
        for name, layer in self.find_layers(model).items():
            kept = [promise for promise in ("mask", "grid") if constraints_of(layer).has(promise)]
            if not self.repairs(kept):
                context.found(f"left as it is: {self.nothing_to_repair}", [name])
            elif context.dense(layer) is None:
                context.found("left as it is: the dense model has no such layer", [name])
            else:
                layers[name] = layer
        self.compress_layers(model, layers, context)
        if self._ratios:
            mean = sum(self._ratios) / len(self._ratios)
            context.notes.append(
                f"squared output error towards the dense weights: {mean:.3f} of what it was, averaged over the layers "
                f"({min(self._ratios):.3f} to {max(self._ratios):.3f})"
            )
        return {}
