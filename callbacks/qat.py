"""Quantization-aware finetuning: straight-through gradients, scales learned or fixed."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from pqqp_lightning.algorithms.grid import fit_grid, round_to_grid
from pqqp_lightning.errors import RecipeError, shorten
from pqqp_lightning.network.held_zeros import trained_weight
from pqqp_lightning.network.layers import named_layers
from pqqp_lightning.network.parameter_layers import ParameterLayer
from pqqp_lightning.stages import (
    Compressed,
    Context,
    GroupSize,
    Layer,
    Plan,
    Problem,
    QuantizationStage,
    weight_matrix,
    write_back,
)
from pqqp_lightning.surgery.fake_quantize import attach, detach, quantizer_of


class QAT(QuantizationStage):
    """Finetunes with weights rounded to their grid in every forward pass, and ends with the rounded weights.

    The unrounded weights get the gradients of the rounded ones (straight-through). Scales start as RTN fits them and
    are trained (LSQ) unless ``learn_scales`` is false. Pruned weights stay zero. The model's optimizer must include all
    parameters, also the scales. Any optimizer moves a scale by about the same fraction as the weights.

    Example::

        stages:
          quantize: {class_path: QAT, init_args: {bits: 4, epochs: 2, learning_rate: 0.0001}}

    Args:
        bits: 2 to 8; or name pattern to bits.
        group_size: input columns that share a scale; "channel" for one scale an output channel, "tensor" for one in
            all; or name pattern to size.
        symmetric: without zero points; False for asymmetric grids, whose zero points are not trained.
        learn_scales: train the scales, as the paper does over tens of epochs; False keeps the initial scales, which
            was better in runs of a few epochs at 2 bits.
        epochs: epochs of training, at least 1.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Jacob et al. 2018, arXiv 1712.05877; Esser et al. 2020, Learned Step Size Quantization, arXiv 1902.08153"

    def __init__(
        self,
        bits: int | dict[str, int] = 4,
        group_size: GroupSize | dict[str, GroupSize] = "channel",
        symmetric: bool = True,
        learn_scales: bool = True,
        epochs: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(bits, group_size, symmetric, epochs=epochs, **kwargs)
        self.learn_scales = learn_scales

    def check_arguments(self) -> list[Problem]:
        problems = super().check_arguments()
        if self.epochs == 0:
            way_out = "Set epochs: 1 or more, or use RTN or GPTQ."
            problems.append(Problem("epochs", self.epochs, "leaves no training", way_out))
        return problems

    def reason_to_leave(self, layer: Layer) -> str:
        # An RNN keeps its parameters in a list as well, and would not compute with the rounded ones.
        recurrent = isinstance(layer, ParameterLayer) and layer.family == "recurrent"
        return "cannot round them in every forward pass" if recurrent else super().reason_to_leave(layer)

    def moves(self, model: LightningModule) -> list[str]:
        """All trained layers except the stage's own, which end on their grid."""
        own = self.find_layers(model)
        return [name for name in super().moves(model) if name not in own]

    def compress(self, model: LightningModule, context: Context) -> Plan:
        layers = self.find_layers(model)
        grids = {n: fit_grid(weight_matrix(layer), **self.grid_options(n)) for n, layer in context.each(layers)}
        plan: Plan = {"learn_scales": self.learn_scales, "layers": {}}
        for name, grid in grids.items():
            plan["layers"][name] = [grid.bits, list(grid.scale.shape), grid.zero is None]
        self.restructure(model, plan)
        # restructure fixes shapes only: the values of the scales come from the weights
        for name, layer in layers.items():
            quantizer_of(layer).start_from(grids[name], trained_weight(layer))
        return plan

    @staticmethod
    def restructure(model: LightningModule, plan: Plan) -> None:
        layers = dict(named_layers(model))
        for name, (bits, scales, symmetric) in plan.get("layers", {}).items():
            attach(layers[name], bits, scales, symmetric=symmetric, learn_scale=plan["learn_scales"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse an optimizer without the scales: they would silently stay untrained."""
        taken = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        scales = {name: quantizer_of(layer).scale for name, layer in self.find_layers(pl_module).items()}
        left = [name for name, scale in scales.items() if scale.requires_grad and id(scale) not in taken]
        if left:
            text = f"configure_optimizers of {type(pl_module).__name__} leaves out the scales of {shorten(left)}"
            way_out = "Give the optimizer all of self.parameters(), or set learn_scales: false."
            raise RecipeError(Problem(text=text, way_out=way_out).within(f"stages.{self.name}", type(self).__name__))

    def finish(self, model: LightningModule, context: Context, plan: Plan) -> Plan:
        """Round the weights to the trained grid and restore ordinary layers."""
        for _, layer in context.each(self.find_layers(model)):
            grid = detach(layer)
            write_back(layer, Compressed(round_to_grid(weight_matrix(layer), grid), grid=grid))
        return {}
