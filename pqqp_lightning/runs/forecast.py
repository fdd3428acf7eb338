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
from pqqp_lightning.network.layers import Layer, named_layers
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


@dataclass(frozen=True)
class Restructured:
    """A model that a stage has restructured.

    Attributes:
        model: a weightless copy.
        structure: its tensors.
        before: the copy's layers by name before that; those that are still there are the same objects.
    """

    model: LightningModule
    structure: Structure
    before: dict[str, Layer]


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
        self._restructured: dict[tuple[int, int], Restructured] = {}

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
        after = self._restructure(model, stage)
        moved = weights.moved(after.before, after.model).all_changed()
        return Turn(after.model, after.structure, moved)

    def _restructure(self, model: LightningModule, stage: Stage) -> Restructured:
        """A copy of ``model`` that ``stage`` has restructured; many prefixes leave the same model."""
        key = (id(model), id(stage))
        if key not in self._restructured:
            copy = weightless_copy(model)
            before = dict(named_layers(copy))
            stage.restructure(copy, stage.expected_plan(model))
            self._restructured[key] = Restructured(copy, Structure(copy, self._targeted), before)
        return self._restructured[key]
