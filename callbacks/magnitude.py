"""Magnitude pruning (Han et al., NeurIPS 2015)."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule
from torch import Tensor

from pqqp_lightning.algorithms.magnitude import prune_magnitude_global
from pqqp_lightning.stages import (
    Compressed,
    Context,
    ExpectedWeights,
    Layer,
    OneShotPruning,
    Problem,
    constraints_of,
    weight_matrix,
    write_back,
)


class Magnitude(OneShotPruning):
    """Removes the smallest weights; needs data only for allocation: sensitivity.

    Example::

        stages:
          prune: {class_path: Magnitude, init_args: {sparsity: 0.5, scope: global}}

    Args:
        sparsity: fraction of the weights to remove, in (0, 1); or name pattern to fraction.
        pattern: "N:M" instead: N kept of every M consecutive inputs.
        scope: "layer" compares weights within a layer, "global" within all targeted layers.
        allocation: "uniform", or "sensitivity" for each layer's own sparsity, by its estimated effect on the loss.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Han et al. 2015, Learning both Weights and Connections, arXiv 1506.02626"
    compared_within = "matrix"

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        pattern: str | int | dict[str, str | int] | None = None,
        scope: Literal["layer", "global"] = "layer",
        **kwargs: Any,
    ) -> None:
        super().__init__(sparsity, pattern, **kwargs)
        self.scope = scope

    @property
    def whole_model_arguments(self) -> dict[str, Any]:
        """As in every pruning stage, and ``scope``, which compares all weights."""
        own = {"scope": "layer"} if self.scope == "global" else {}
        return super().whole_model_arguments | own

    def check_arguments(self) -> list[Problem]:
        problems = super().check_arguments()
        if self.scope == "global" and not isinstance(self.sparsity, float | int):
            way_out = "Set sparsity: 0.5, or scope: layer."
            problems.append(Problem("scope", self.scope, "needs one sparsity for all layers", way_out))
        if self.scope == "global" and self.allocation == "sensitivity":
            text = "contradicts allocation='sensitivity': both decide each layer's sparsity"
            problems.append(Problem("scope", self.scope, text, "Set one of scope and allocation."))
        return problems

    def expected_weights(self, model: LightningModule, weights: ExpectedWeights) -> ExpectedWeights:
        return super().expected_weights(model, weights).changed({}, exact=self.scope == "layer")

    def scores(self, weight: Tensor, statistic: None) -> Tensor:
        return weight.abs()

    def compress_layers(self, model: LightningModule, layers: dict[str, Layer], context: Context) -> None:
        if self.scope == "layer":
            super().compress_layers(model, layers, context)
            return
        assert isinstance(self.sparsity, float)
        # one threshold for all layers, so they must be looked at together
        matrices = [weight_matrix(layer) for layer in layers.values()]
        earlier = [constraints_of(layer).mask(layer.weight.device) for layer in layers.values()]
        masks = prune_magnitude_global(matrices, sparsity=self.sparsity, masks=earlier)
        for layer, matrix, mask in zip(layers.values(), matrices, masks, strict=True):
            write_back(layer, Compressed(matrix, mask=mask))
