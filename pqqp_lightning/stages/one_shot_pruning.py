"""One-shot pruning by a score, with one sparsity for all layers or one for each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from pqqp_lightning.algorithms.allocation import SparsityOptions, allocate_sparsities
from pqqp_lightning.algorithms.selection import keep_by_score, keep_highest
from pqqp_lightning.checkpoint.expected import ExpectedWeights
from pqqp_lightning.errors import Problem
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.layers import Layer, groups_of, rows_of, weight_matrix
from pqqp_lightning.stages.layerwise import Compressed, LayerInputs
from pqqp_lightning.stages.pruning import PatternArgument, PruningStage
from pqqp_lightning.stages.sensitivity import measure_costs
from pqqp_lightning.stages.stage import Context, SearchSpace, Stage

STEP, STEPS, MOST = 0.05, 4, 0.95
"""Each layer's sparsity is at most STEPS steps from the target, and not above MOST."""


class OneShotPruning(PruningStage):
    """A pruning stage that removes the weights with the lowest scores. A method writes :meth:`scores`.

    A method that also updates the kept weights overrides ``compress_layer``; only ``allocation`` then uses its scores.

    Args:
        sparsity: fraction of the weights to remove, in (0, 1); or name pattern to fraction.
        pattern: "N:M" instead: N kept of every M consecutive inputs ("2:4"); or name pattern to "N:M".
        allocation: "uniform" removes the same fraction of every layer; "sensitivity" chooses each layer's fraction, at
            most 0.2 from ``sparsity``, by the estimated effect on the loss (one backward pass over the calibration data
            and one more walk), so that all layers together reach ``sparsity``.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    compared_within: ClassVar[Literal["row", "matrix"]] = "row"
    """Where scores compete: within each output row, or within the matrix (each group of a grouped convolution)."""

    search_space: ClassVar[SearchSpace] = {"sparsity": (0.3, 0.4, 0.5, 0.6, 0.7)}

    without_statistics = "pruned by magnitude, since no calibration token reached it"

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        pattern: PatternArgument | dict[str, PatternArgument] | None = None,
        allocation: Literal["uniform", "sensitivity"] = "uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(sparsity, pattern, **kwargs)
        self.allocation = allocation
        self._fractions: dict[str, float] = {}

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        """Whether the method needs a statistic, or allocation measures sensitivities."""
        return self.statistic is not None or self.allocation == "sensitivity"

    @property
    def whole_model_arguments(self) -> dict[str, Any]:
        """As in every stage, and ``allocation``, which takes a backward pass."""
        own = {"allocation": "uniform"} if self.allocation == "sensitivity" else {}
        return super().whole_model_arguments | own

    def scores(self, weight: Tensor, statistic: Any) -> Tensor:
        """The importance [O, I], >= 0, of each entry of ``weight``; the lowest are removed.

        Args:
            weight: [O, I], float32, of one layer or one group of it.
            statistic: as in :class:`~pqqp_lightning.stages.LayerInputs`.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no scores")

    def compress_layer(self, inputs: LayerInputs) -> Compressed:
        amount, scores = self.amount(inputs.name), self.scores(inputs.weight.float(), inputs.statistic)
        mask = keep_highest(scores, within=self.compared_within, mask=inputs.mask, **amount)
        return Compressed(inputs.weight, mask=mask, pattern=amount.get("pattern"))

    def compress_unreached(self, inputs: LayerInputs) -> Compressed:
        amount = self.amount(inputs.name)
        mask = keep_highest(inputs.weight.float().abs(), within=self.compared_within, mask=inputs.mask, **amount)
        return Compressed(inputs.weight, mask=mask, pattern=amount.get("pattern"))

    def amount(self, name: str) -> dict[str, Any]:
        return {"sparsity": self._fractions[name]} if name in self._fractions else super().amount(name)

    def check_arguments(self) -> list[Problem]:
        problems = super().check_arguments()
        if self.allocation == "sensitivity" and (self.pattern is not None or isinstance(self.sparsity, dict)):
            text = "needs one sparsity for all layers, from which it finds each layer's"
            way_out = "Set sparsity: 0.5 without a pattern, or allocation: uniform."
            problems.append(Problem("allocation", self.allocation, text, way_out))
        return problems

    def check(self, model: LightningModule, data: Any, earlier: Sequence[Stage]) -> list[Problem]:
        problems = super().check(model, data, earlier)
        if self.allocation == "sensitivity" and not is_overridden("training_step", model):
            text = f"needs a training_step in {type(model).__name__}, for its loss"
            way_out = "Add one, or set allocation: uniform."
            problems.append(Problem("allocation", self.allocation, text, way_out))
        return problems

    def compress_layers(self, model: LightningModule, layers: dict[str, Layer], context: Context) -> None:
        self._fractions = {}
        if self.allocation != "uniform":
            self._fractions = context.once(self, lambda: self._allocate(model, layers, context))
        super().compress_layers(model, layers, context)

    def _allocate(self, model: LightningModule, layers: dict[str, Layer], context: Context) -> dict[str, float]:
        """Choose each layer's sparsity by the estimated effect on the loss."""
        assert isinstance(self.sparsity, float | int)
        around = [self.sparsity + STEP * i for i in range(-STEPS, STEPS + 1)]
        # MOST does not apply to a target above it
        sparsities = [s for s in around if 1e-6 < s <= max(self.sparsity, MOST)]
        removed: dict[str, list[int]] = {name: [] for name in layers}

        def trials(name: str, layer: Layer, hessians: Tensor) -> Iterator[Tensor]:
            matrix, earlier = weight_matrix(layer).float(), constraints_of(layer).mask(layer.weight.device)
            shape = (self._parts(layer), -1)
            scores = self._trial_scores(matrix, hessians).reshape(shape)
            flat = None if earlier is None else earlier.reshape(shape)
            for sparsity in sparsities:
                mask = keep_by_score(scores, sparsity, flat).view_as(matrix)
                removed[name].append(int((~mask).sum()))
                yield matrix.masked_fill(~mask, 0.0)

        costs = measure_costs(context, self.find_blocks(model), layers, trials, "loss")
        options = []
        for name, layer in layers.items():
            options.append(SparsityOptions(layer.weight.numel(), self._parts(layer), removed[name], costs[name]))
        fractions = dict(zip(layers, allocate_sparsities(self.sparsity, sparsities, options), strict=True))
        counts = sorted(Counter(round(s / STEP) * STEP for s in fractions.values()).items())
        context.notes.append("sparsities: " + ", ".join(f"{s:.2f} in {n} layers" for s, n in counts))
        return fractions

    def _trial_scores(self, matrix: Tensor, hessians: Tensor) -> Tensor:
        """The scores [O, I] of ``matrix`` [O, I] on Hessians [groups, I, I]."""
        if self.statistic is None:
            return self.scores(matrix, None)
        # findings enter the record once, when the layer is compressed, and not for each trial
        prepared = self.prepare(self.statistic.of_hessian(hessians), lambda what: None)
        groups = zip(matrix.chunk(len(prepared)), prepared, strict=True)
        return torch.cat([self.scores(weight, statistic) for weight, statistic in groups])

    def expected_weights(self, model: LightningModule, weights: ExpectedWeights) -> ExpectedWeights:
        expected = super().expected_weights(model, weights)
        # the data spreads the zeros over the layers; all of them together are as many
        return expected.changed({}, exact=self.allocation == "uniform")

    def _parts(self, layer: Layer) -> int:
        if self.compared_within == "row":
            return rows_of(layer)
        return 1 if self.statistic is None else groups_of(layer)
