"""What the pruning stages that choose all masks at once share: one sparsity everywhere, or one for each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from pqqp_lightning.algorithms.allocation import allocate, spend_rest
from pqqp_lightning.algorithms.selection import keep_by_score
from pqqp_lightning.errors import Problem
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.layers import Layer, weight_matrix
from pqqp_lightning.stages.pruning import PatternKnob, PruningStage
from pqqp_lightning.stages.sensitivity import measure_costs
from pqqp_lightning.stages.stage import Context, Stage

STEP, STEPS, MOST = 0.05, 4, 0.95
"""Each layer's sparsity is the target or up to STEPS steps away from it, and not above MOST."""


class OneShotPruning(PruningStage):
    """A pruning stage that can give each layer its own sparsity under one overall target.

    A method says by which scores its weights go (:meth:`trial_scores`) and how many parts of a matrix are pruned by
    themselves (:meth:`parts`), and calls :meth:`spread` before it prunes.

    Args:
        sparsity: fraction of the weights to remove, in (0, 1); or name pattern to fraction.
        pattern: "N:M" instead: N kept of every M consecutive inputs ("2:4"); or name pattern to "N:M".
        allocation: "uniform" removes the same fraction of every layer; "sensitivity" gives each layer its own fraction,
            at most 0.2 from ``sparsity``, by the estimated effect on the loss (one backward pass over the calibration
            data and one more walk), with ``sparsity`` over all layers together.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        pattern: PatternKnob | dict[str, PatternKnob] | None = None,
        allocation: Literal["uniform", "sensitivity"] = "uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(sparsity, pattern, **kwargs)
        self.allocation = allocation
        self._fractions: dict[str, float] = {}

    def trial_scores(self, matrix: Tensor, hessians: Tensor) -> Tensor:
        """Scores [O, I] of ``matrix`` [O, I] on Hessians [groups, I, I]; the lowest go. Its size by default."""
        return matrix.abs()

    def parts(self, layer: Layer) -> int:
        """Parts of the matrix (row groups of equal size) that are pruned to the sparsity each by itself."""
        return 1

    def amount(self, name: str) -> dict[str, Any]:
        return {"sparsity": self._fractions[name]} if name in self._fractions else super().amount(name)

    def check_knobs(self) -> list[Problem]:
        problems = super().check_knobs()
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

    def spread(self, model: LightningModule, layers: dict[str, Layer], context: Context) -> None:
        """Find each layer's sparsity if they are to differ; :meth:`amount` gives it from then on."""
        self._fractions = {}
        if self.allocation == "uniform":
            return
        assert isinstance(self.sparsity, float | int)
        options = _options(self.sparsity)
        removed: dict[str, list[int]] = {name: [] for name in layers}

        def trials(name: str, layer: Layer, hessians: Tensor) -> Iterator[Tensor]:
            matrix, earlier = weight_matrix(layer).float(), constraints_of(layer).mask(layer.weight.device)
            shape = (self.parts(layer), -1)
            scores = self.trial_scores(matrix, hessians).reshape(shape)
            flat = None if earlier is None else earlier.reshape(shape)
            for sparsity in options:
                mask = keep_by_score(scores, sparsity, flat).view_as(matrix)
                removed[name].append(int((~mask).sum()))
                yield matrix.masked_fill(~mask, 0.0)

        costs = measure_costs(context, self.find_blocks(model), layers, trials, "loss")
        self._fractions = self._fit(layers, options, costs, removed)
        counts = sorted(Counter(round(s / STEP) * STEP for s in self._fractions.values()).items())
        context.notes.append("sparsities: " + ", ".join(f"{s:.2f} in {n} layers" for s, n in counts))

    def _fit(
        self,
        layers: dict[str, Layer],
        options: list[float],
        costs: dict[str, list[float]],
        removed: dict[str, list[int]],
    ) -> dict[str, float]:
        """The sparsity of each layer: the cheapest options, and then as many removed in all as was asked for."""
        assert isinstance(self.sparsity, float | int)
        entries = [layer.weight.numel() for layer in layers.values()]
        parts = [self.parts(layer) for layer in layers.values()]
        prices, counts = [costs[name] for name in layers], [removed[name] for name in layers]
        kept = [[whole - count for count in row] for whole, row in zip(entries, counts, strict=True)]
        due = round(self.sparsity * sum(entries))
        picked = allocate(prices, kept, max(sum(entries) - due, sum(map(min, kept))))
        chosen = [row[k] for row, k in zip(counts, picked, strict=True)]
        below = [_option_below(row, k) for row, k in zip(counts, picked, strict=True)]
        lower = [row[k] for row, k in zip(counts, below, strict=True)]
        gains = [
            (price[k] - price[b]) / max(1, row[k] - row[b])
            for price, row, k, b in zip(prices, counts, picked, below, strict=True)
        ]
        rest = max(0, sum(chosen) - due)
        left = [c - after for c, after in zip(chosen, spend_rest(chosen, lower, gains, parts, rest), strict=True)]
        units = [whole // part for whole, part in zip(entries, parts, strict=True)]  # entries that go by one count
        rows = zip(layers, picked, left, parts, units, strict=True)
        return {name: (round(options[k] * unit) - less // part) / unit for name, k, less, part, unit in rows}


def _option_below(removed: list[int], chosen: int) -> int:
    """The option that removes the next fewer entries, or the one chosen where there is none."""
    fewer = [k for k, count in enumerate(removed) if count < removed[chosen]]
    return max(fewer, key=removed.__getitem__, default=chosen)


def _options(sparsity: float) -> list[float]:
    """The sparsities to choose from, the lowest first."""
    around = [sparsity + STEP * i for i in range(-STEPS, STEPS + 1)]
    return [s for s in around if 1e-6 < s <= max(sparsity, MOST)]
