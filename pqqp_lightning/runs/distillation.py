"""Distillation from the dense model during finetuning (Hinton et al., arXiv 1503.02531).

loss = (1 - weight) * task + weight * T^2 * KL(teacher || student), both at temperature T. ``hidden_weight`` adds the
mean squared distance of the blocks' outputs, relative to the teacher's mean square (Romero et al., FitNets, arXiv
1412.6550).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.network.blocks import model_blocks
from pqqp_lightning.network.structure import copy_model
from pqqp_lightning.stages.distillation import Distillation, TeacherDtype


def make_teacher(dense: LightningModule, dtype: TeacherDtype) -> LightningModule:
    """Copy the dense model, frozen and in evaluation mode; one teacher serves all stages of a run."""
    teacher = copy_model(dense).eval().requires_grad_(False)
    if dtype == "same":
        return teacher
    return teacher.to(getattr(torch, dtype))


def distillation_loss(student: Tensor, teacher: Tensor, settings: Distillation) -> Tensor:
    """The distance of the student's outputs from the teacher's, a scalar.

    Args:
        student: logits [..., C], or outputs of any shape with ``loss="mse"``.
        teacher: as ``student``.
        settings: loss and temperature.
    """
    student = student.float()
    teacher = teacher.float()
    if settings.loss == "mse":
        return F.mse_loss(student, teacher)
    temperature = settings.temperature
    student_log = (student.flatten(0, -2) / temperature).log_softmax(-1)  # [N, C]
    teacher_log = (teacher.flatten(0, -2) / temperature).log_softmax(-1)  # [N, C]
    divergence = F.kl_div(student_log, teacher_log, log_target=True, reduction="batchmean")
    return divergence * temperature**2  # gradients shrink with 1 / T^2: this keeps the balance with the task's loss


def hidden_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """The mean over blocks of the squared distance, relative to the teacher's mean square; a scalar."""
    distances = []
    for student_output, teacher_output in zip(student, teacher, strict=True):
        scale = teacher_output.float().square().mean().clamp(min=1e-12)
        distances.append(F.mse_loss(student_output.float(), teacher_output.float()) / scale)
    return torch.stack(distances).mean()


class Distill(Callback):
    """Replaces the training step's loss by the distillation loss for one segment.

    Args:
        teacher: from :func:`make_teacher`.
        settings: the stage's ``distill`` argument.
    """

    def __init__(self, teacher: LightningModule, settings: Distillation) -> None:
        self._teacher, self._settings = teacher, settings

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._teacher.to(trainer.strategy.root_device)
        # Lightning's loop calls the module's own method and has no hook around its loss; a wrapping module would rename
        # every parameter.
        pl_module.__dict__["training_step"] = self._distilled(pl_module, pl_module.training_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.__dict__.pop("training_step", None)
        self._teacher.to("cpu")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def _distilled(self, student: LightningModule, step: Callable[..., Any]) -> Callable[..., Any]:
        def distilled(*args: Any, **kwargs: Any) -> Any:
            with _recording(student, self._settings) as seen:
                result = step(*args, **kwargs)
            if result is None:
                return None
            if not seen.calls:
                text = (
                    f"needs a training_step of {type(student).__name__} that calls self(...): there is no output to "
                    "compare"
                )
                way_out = "Call the model through self(...), or leave distill out."
                raise RecipeError(Problem("distill", text=text, way_out=way_out))
            task = result["loss"] if isinstance(result, dict) else result
            loss = self._loss(task, seen)
            return {**result, "loss": loss} if isinstance(result, dict) else loss

        return distilled

    def _loss(self, task: Tensor, seen: _Seen) -> Tensor:
        """The loss of one step; the teacher gets the inputs of the student's first forward pass."""
        settings = self._settings
        arguments, keywords, output = seen.calls[0]
        with torch.no_grad(), _recording(self._teacher, settings) as taught:
            target = _logits(self._teacher(*_cast(arguments, self._teacher), **_cast(keywords, self._teacher)))
        loss = (1 - settings.weight) * task + settings.weight * distillation_loss(_logits(output), target, settings)
        if settings.hidden_weight:
            loss = loss + settings.hidden_weight * hidden_loss(seen.hidden, taught.hidden)
        return loss


@dataclass
class _Seen:
    """The forward passes of one step.

    Attributes:
        calls: positional arguments, keyword arguments and output of each call of the model.
        hidden: outputs of the blocks, in order.
    """

    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]]
    hidden: list[Tensor]


@contextmanager
def _recording(model: LightningModule, settings: Distillation) -> Iterator[_Seen]:
    seen = _Seen([], [])

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.calls.append((args, kwargs, output))

    handles = [model.register_forward_hook(called, with_kwargs=True)]
    if settings.hidden_weight:
        for block in model_blocks(model).values():
            handles.append(block.register_forward_hook(lambda _, args, out: seen.hidden.append(_logits(out))))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _logits(output: Any) -> Tensor:
    """The tensor of a model's or block's output: itself, its ``logits``, or its first item."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    return output[0]


def _cast(value: Any, model: nn.Module) -> Any:
    """Convert floating-point inputs, at any depth of dicts and tuples, to the precision of ``model``."""
    if isinstance(value, dict):
        return {key: _cast(item, model) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_cast(item, model) for item in value)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(next(model.parameters()).dtype)
    return value
