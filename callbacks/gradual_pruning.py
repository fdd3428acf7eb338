"""Gradual magnitude pruning (Zhu & Gupta, 2017)."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from pqqp_lightning.algorithms.gradual import cubic_sparsity, grow_mask
from pqqp_lightning.algorithms.magnitude import prune_magnitude
from pqqp_lightning.algorithms.packing import pack_mask, unpack_mask
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.held_zeros import HoldZeros
from pqqp_lightning.network.layers import to_weight
from pqqp_lightning.network.name_patterns import values_of
from pqqp_lightning.stages import (
    Compressed,
    Context,
    Layer,
    Plan,
    Problem,
    PruningStage,
    constraints_of,
    parse_pattern,
    weight_matrix,
    write_back,
)

UPDATES = 100
"""How often the mask grows in a run without ``every``."""


class GradualPruning(PruningStage):
    """Removes the smallest weights gradually while the model trains; the sparsity follows a cubic schedule.

    s(t) = s_f + (s_i - s_f) (1 - t / T)^3 over the first ``ramp`` of the stage's steps; the model recovers in the other
    steps. Removed weights stay zero in training and validation. The schedule starts from an earlier mask if that
    removes more than ``initial_sparsity``. An N:M pattern is reached entry by entry on the same schedule.

    Example::

        stages:
          prune: {class_path: GradualPruning, init_args: {sparsity: 0.8, epochs: 4, learning_rate: 0.0005}}

    Args:
        sparsity: final fraction of removed weights, in (0, 1); or name pattern to fraction.
        pattern: "N:M" instead: N kept of every M consecutive inputs.
        initial_sparsity: fraction removed before training, below the final one.
        every: optimizer steps between updates of the mask; about 100 updates in all by default.
        ramp: fraction of the steps in which the mask grows, in (0, 1].
        epochs: epochs of training, at least 1.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Zhu & Gupta 2017, To Prune, or Not to Prune, arXiv 1710.01878"

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        pattern: str | int | dict[str, str | int] | None = None,
        initial_sparsity: float = 0.0,
        every: int | None = None,
        ramp: float = 0.75,
        epochs: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(sparsity, pattern, epochs=epochs, **kwargs)
        self.initial_sparsity, self.every, self.ramp = initial_sparsity, every, ramp
        self._masks: dict[str, Tensor] = {}  # the current keep-masks, packed
        self._layers: dict[str, Layer] = {}
        self._ends: dict[str, tuple[float, float]] = {}  # (s_i, s_f): the sparsities before and after training
        self._hold = HoldZeros()
        self._steps = self._interval = 1

    @property
    def changes_before_training(self) -> bool:  # type: ignore[override]
        """Whether some weights are removed before the training."""
        return self.initial_sparsity > 0

    def check_arguments(self) -> list[Problem]:
        problems = super().check_arguments()
        if self.epochs == 0:
            way_out = "Set epochs: 1 or more, or use Magnitude."
            problems.append(Problem("epochs", self.epochs, "leaves no training to prune in", way_out))
        if not 0 < self.ramp <= 1:
            way_out = "0.75 leaves a quarter of the steps for recovery."
            problems.append(Problem("ramp", self.ramp, "is not in (0, 1]", way_out))
        if self.every is not None and self.every < 1:
            way_out = f"Leave it out for about {UPDATES} updates."
            problems.append(Problem("every", self.every, "is not above 0", way_out))
        if problems:
            return problems
        patterns = [parse_pattern(value) for value in values_of(self.pattern)]
        final = min([*values_of(self.sparsity), *(1 - n / m for n, m in patterns)])
        if not 0 <= self.initial_sparsity < final:
            text = f"is not between 0 and the final sparsity {final:g}"
            way_out = "0 starts from the dense model."
            problems.append(Problem("initial_sparsity", self.initial_sparsity, text, way_out))
        return problems

    def compress(self, model: LightningModule, context: Context) -> Plan:
        """Remove ``initial_sparsity``; training removes the rest."""
        if self.initial_sparsity:
            for name, layer in context.each(self.find_layers(model)):
                matrix, earlier = weight_matrix(layer), constraints_of(layer).mask(layer.weight.device)
                mask = grow_mask(matrix, sparsity=self.initial_sparsity, pattern=self._pattern(name), mask=earlier)
                write_back(layer, Compressed(matrix, mask=mask))
        return {}

    def finish(self, model: LightningModule, context: Context, plan: Plan) -> Plan:
        """Prune to the exact final count, whatever the last update of the mask removed."""
        for name, layer in context.each(self.find_layers(model)):
            matrix, amount = weight_matrix(layer), self.amount(name)
            mask = prune_magnitude(matrix, mask=self._mask(name, layer), **amount)
            write_back(layer, Compressed(matrix, mask=mask, pattern=amount.get("pattern")))
        self._masks = {}
        return plan

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._masks = {}  # a resumed run loads its masks after setup

    def state_dict(self) -> dict[str, Any]:
        return {"masks": dict(self._masks)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._masks = dict(state_dict["masks"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._layers = self.find_layers(pl_module)
        for name, layer in self._layers.items():
            earlier, matrix = constraints_of(layer), weight_matrix(layer)
            final = prune_magnitude(matrix, mask=earlier.mask(matrix.device), **self.amount(name))
            self._ends[name] = 1 - earlier.kept() / matrix.numel(), 1 - int(final.sum()) / matrix.numel()
            self._hold_mask(name, layer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # known only now, because it depends on the length of the training data
        total = trainer.estimated_stepping_batches
        if total < 0 or not math.isfinite(total):
            text = "the training data has no length, so the steps over which the mask grows are unknown"
            problem = Problem(text=text, way_out="Set trainer.limit_train_batches to a number.")
            raise RecipeError(problem.within(f"stages.{self.name}", type(self).__name__))
        self._steps = max(1, round(self.ramp * total))
        self._interval = self.every or max(1, self._steps // UPDATES)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._hold.zero()  # the optimizer may have moved removed weights away from zero
        # A module that optimizes by hand may step several optimizers for a batch, or none.
        step = trainer.global_step if pl_module.automatic_optimization else trainer.fit_loop.total_batch_idx + 1
        if step == self._steps or (step < self._steps and step % self._interval == 0):
            for name, layer in self._layers.items():
                initial, final = self._ends[name]
                sparsity = cubic_sparsity(step, self._steps, initial=initial, final=final)
                mask, pattern = self._mask(name, layer), self._pattern(name)
                grown = grow_mask(weight_matrix(layer), sparsity=sparsity, pattern=pattern, mask=mask)
                self._masks[name] = pack_mask(grown).cpu()
                self._hold_mask(name, layer)
            self._hold.zero()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._hold.release()
        self._layers = {}

    def _hold_mask(self, name: str, layer: Layer) -> None:
        mask = self._mask(name, layer)
        if mask is not None:
            self._hold.hold(layer.weight, to_weight(layer, ~mask))

    def _mask(self, name: str, layer: Layer) -> Tensor | None:
        """The current keep-mask [O, I]: of this training, or of earlier stages."""
        constraints, device = constraints_of(layer), layer.weight.device
        if name not in self._masks:
            return constraints.mask(device)
        return unpack_mask(self._masks[name].to(device), constraints.shape)

    def _pattern(self, name: str) -> tuple[int, int] | None:
        return self.amount(name).get("pattern")
