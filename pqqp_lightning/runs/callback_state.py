"""What Lightning's callbacks keep from one training segment to the next: nothing.

Each segment is a fit of its own. A best score, an average of weights, a step counter or a time budget of the segment
before would judge, or overwrite, another model. So the callbacks in ``ANEW`` start every segment as the user made them.
A callback of the user's own keeps its state; it may reset itself in ``on_fit_start``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from torch import Tensor

from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.network.offload import offload_of

AVERAGING = (WeightAveraging, StochasticWeightAveraging)
ANEW = (EarlyStopping, ModelCheckpoint, Timer, BaseFinetuning, LearningRateFinder, *AVERAGING)
"""Callbacks whose state belongs to one segment."""
_FIRST_STATE = "_pqqp_first_state"
_AVERAGE = "_average_model"


def check_callbacks(callbacks: Sequence[Callback]) -> list[Problem]:
    """The problems of callbacks that would undo what stages promise, or that no resumed run could repeat."""
    problems = []
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, BatchSizeFinder):
            text = f"{name} would choose another batch size in every evaluation and training segment"
            way_out = "Find one beforehand with Lightning's Tuner, and set it in the data."
        elif isinstance(callback, ModelPruning):
            text = f"{name} replaces weights by parametrizations, which stages cannot compress"
            way_out = "Use a stage: Magnitude, or GradualPruning to prune while the model trains."
        else:
            continue
        problems.append(Problem("callbacks", text=text, way_out=way_out, complete=True).within("trainer"))
    averaging = averaging_names(callbacks)
    if len(averaging) > 1:
        text = f"{' and '.join(averaging)} would each replace the weights at the end of training, and the last one wins"
        way_out = "Keep one of them."
        problems.append(Problem("callbacks", text=text, way_out=way_out, complete=True).within("trainer"))
    return problems


def start_anew(callbacks: Iterable[Callback], checkpoint_folder: Path) -> None:
    """Restore each callback of ``ANEW`` as the user made it.

    Args:
        callbacks: of the trainer.
        checkpoint_folder: where a ModelCheckpoint without a folder writes in this segment; its name is the stage's.
    """
    for callback in callbacks:
        if not isinstance(callback, ANEW):
            continue
        _restore_first_state(callback)
        if isinstance(callback, ModelCheckpoint):  # one folder per segment: file names repeat
            folder = checkpoint_folder
            callback.dirpath = str(folder if callback.dirpath is None else Path(callback.dirpath) / folder.name)


def _restore_first_state(callback: Callback) -> None:
    # On the callback itself, so that the copy lives exactly as long as the user's object, over several fits.
    state = vars(callback)
    if _FIRST_STATE not in state:
        # An evaluation may have copied the model already, which is no state of the user's.
        state[_FIRST_STATE] = copy.deepcopy({k: None if k == _AVERAGE else v for k, v in state.items()})
    first: dict[str, Any] = state[_FIRST_STATE]
    for name in set(state) - set(first) - {_FIRST_STATE}:
        del state[name]
    state.update(copy.deepcopy(first))


def drop_averages(callbacks: Iterable[Callback]) -> None:
    """Forget averaged weights: they are the model's by now, and an evaluation would put them in place of later ones."""
    for callback in callbacks:
        if isinstance(callback, AVERAGING):
            vars(callback)[_AVERAGE] = None


def trained_values(module: LightningModule) -> dict[str, Tensor]:
    """Copies of the weights that training may change."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def lost_training(callbacks: Iterable[Callback], module: LightningModule, start: dict[str, Tensor]) -> Problem | None:
    """The problem of a segment whose average is the model that it started from: its training is lost.

    Lightning's averages hold the first weights until their first update, which a short segment may not reach.

    Args:
        callbacks: of the trainer.
        module: after the segment.
        start: its weights before, from :func:`trained_values`; empty if nothing averages.
    """
    now = trained_values(module)
    if not start or any(not torch.equal(now[name], value) for name, value in start.items()):
        return None
    text = f"{' and '.join(averaging_names(callbacks))} averaged nothing in this training, so that its result is lost"
    way_out = "Train for more epochs, let the averaging start earlier, or leave it out."
    return Problem(text=text, way_out=way_out)


def averaging_names(callbacks: Iterable[Callback]) -> list[str]:
    """The classes of the callbacks that average weights."""
    return [type(callback).__name__ for callback in callbacks if isinstance(callback, AVERAGING)]


class KeepUnaveraged:
    """Restores, at the end of training, what averaging must not change.

    A frozen weight is its own average only up to rounding, which takes it off its grid; integers are cut off. Buffers
    that training leaves alone are restored as well, so that only running statistics are averaged.

    Attributes:
        before: the callback that remembers them; it stands before the user's.
        after: the callback that restores them; it stands after the user's.
    """

    def __init__(self) -> None:
        self.before, self.after = _Remember(), _Restore()
        self.after.remembered = self.before


class _Remember(Callback):
    def __init__(self) -> None:
        self._start: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start = state_dict["start"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _averages(trainer) and not self._start:  # a resumed segment has those of its start
            self._start = {name: buffer.detach().clone() for name, buffer in pl_module.named_buffers()}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _averages(trainer):
            return
        for name, parameter in pl_module.named_parameters():
            if not parameter.requires_grad:
                self.kept[name] = parameter.detach().clone()
        for name, buffer in pl_module.named_buffers():
            unchanged = name in self._start and torch.equal(buffer, self._start[name])
            if unchanged or not buffer.is_floating_point():
                self.kept[name] = buffer.detach().clone()


def _averages(trainer: Any) -> bool:
    return bool(averaging_names(trainer.callbacks))


class _Restore(Callback):
    remembered: _Remember

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        kept = self.remembered.kept
        for name, tensor in (*pl_module.named_parameters(), *pl_module.named_buffers()):
            if name in kept:
                tensor.data.copy_(kept[name])
        kept.clear()


class SameWeights:
    """Refuses an evaluation whose weights are not the model's own: what is measured is what is saved.

    It is at work only if a callback of the user's own takes part, which may exchange the weights for averaged ones.

    Args:
        callbacks: of the trainer.

    Attributes:
        callbacks: the same, between two that watch the weights.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        own = [c for c in callbacks if not type(c).__module__.startswith(("lightning.", "pqqp_lightning."))]
        self._names = [type(callback).__name__ for callback in own]
        self.callbacks = [_WeightSums(self), *callbacks, _WeightCheck(self)] if own else list(callbacks)
        self.sums: Tensor | None = None
        self.differ = False

    def require(self) -> None:
        """Raise if the weights were exchanged.

        Raises:
            RecipeError: the evaluation ran with other weights than the model has outside of it.
        """
        if not self.differ:
            return
        text = f"the evaluation measures other weights than the run saves: {' or '.join(self._names)} exchanges them"
        way_out = (
            "Copy them into the model in on_train_end, as Lightning's EMAWeightAveraging does, and exchange them only "
            "while trainer.state.fn is 'fit'."
        )
        raise RecipeError(Problem("callbacks", text=text, way_out=way_out, complete=True).within("trainer"))


class _WeightSums(Callback):
    """Notes the weights before the user's callbacks have a turn."""

    def __init__(self, watch: SameWeights) -> None:
        self._watch = watch

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watch.sums = _weight_sums(pl_module)


class _WeightCheck(Callback):
    """Compares the weights after the user's callbacks, at the first batch."""

    def __init__(self, watch: SameWeights) -> None:
        self._watch = watch

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and self._watch.sums is not None:
            self._watch.differ |= not torch.equal(self._watch.sums, _weight_sums(pl_module))


def _weight_sums(module: LightningModule) -> Tensor:
    parameters = offload_of(module).visit(module.named_parameters())
    sums = [parameter.detach().sum(dtype=torch.double).cpu() for _, parameter in parameters]
    return torch.stack(sums) if sums else torch.zeros(0)
