"""Whether a sequence of stages can run, and how large the model will be after it: from structure and arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning.pytorch import LightningModule

from pqqp_lightning.checkpoint.expected import (
    ExpectedSize,
    ExpectedWeights,
    Structure,
    dense_weights,
)
from pqqp_lightning.errors import Problem
from pqqp_lightning.network.layers import named_layers
from pqqp_lightning.network.structure import weightless_copy
from pqqp_lightning.runs.checks import check_stage
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.stages.stage import Stage


@dataclass(frozen=True)
class Turn:
    """The model after some stages.

    Attributes:
        model: a weightless copy with the structure that they leave.
        structure: its tensors.
        weights: what will be stored of its layers.
        problems: why the last of the stages cannot run there; the other attributes are then those before it.
    """

    model: LightningModule
    structure: Structure
    weights: ExpectedWeights
    problems: tuple[Problem, ...] = ()

    @property
    def size(self) -> ExpectedSize:
        """The expected size."""
        return self.structure.size(self.weights)


class Forecast:
    """Checks sequences of stages, and counts the size of the model after them; a common prefix is looked at once.

    Args:
        data: the dense model and its data, which has been read if the stages' checks are to know how the model uses
            its layers.
        stages: all stages of the run, whose layers are the targeted ones.
    """

    def __init__(self, data: RunData, stages: Iterable[Stage]) -> None:
        self._data = data
        self._targeted: set[str] = set()
        for stage in stages:
            self._targeted.update(stage.find_layers(data.module))
        model = weightless_copy(data.module)
        self._turns: dict[tuple[int, ...], Turn] = {
            (): Turn(model, Structure(model, self._targeted), dense_weights(data.module))
        }

    def after(self, stages: Sequence[Stage]) -> Turn:
        """The model after ``stages``, or at the first one that cannot run."""
        key = tuple(map(id, stages))
        if key not in self._turns:
            before = self.after(stages[:-1])
            self._turns[key] = before if before.problems else self._next(before, stages)
        return self._turns[key]

    def _next(self, before: Turn, stages: Sequence[Stage]) -> Turn:
        *earlier, stage = stages
        model = before.model
        if problems := check_stage(stage, self._data, earlier, model):
            placed = [problem.within(f"stages.{stage.name}", type(stage).__name__) for problem in problems]
            return Turn(model, before.structure, before.weights, tuple(placed))
        weights = stage.expected_weights(model, before.weights)
        if stage.epochs:
            weights = weights.all_changed()
        if type(stage).expected_plan is Stage.expected_plan:
            return Turn(model, before.structure, weights)
        model = weightless_copy(model)
        layers = dict(named_layers(model))
        stage.restructure(model, stage.expected_plan(model))
        moved = weights.moved(layers, model).all_changed()
        return Turn(model, Structure(model, self._targeted), moved)
