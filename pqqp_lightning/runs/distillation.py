"""Distillation from the dense model as the objective of any finetuning (Hinton et al., arXiv 1503.02531).

loss = (1 - weight) * task + weight * T^2 * KL(teacher || student at temperature T), and, if asked, the distance of the
blocks' outputs, each relative to the teacher's mean square (Romero et al., FitNets, arXiv 1412.6550).
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
    """A frozen copy of the dense model in evaluation mode; one serves all stages of a run."""
    teacher = copy_model(dense).eval().requires_grad_(False)
    return teacher if dtype == "same" else teacher.to(getattr(torch, dtype))


def distillation_loss(student: Tensor, teacher: Tensor, settings: Distillation) -> Tensor:
    """The distance of the student's outputs from the teacher's, a scalar.

    Args:
        student: logits [..., C] (or outputs, with ``loss="mse"``).
        teacher: the same shape.
        settings: loss and temperature.
    """
    student, teacher = student.float(), teacher.float()
    if settings.loss == "mse":
        return F.mse_loss(student, teacher)
    t = settings.temperature
    student_log, teacher_log = (x.flatten(0, -2).div(t).log_softmax(-1) for x in (student, teacher))  # [N, C]
    return F.kl_div(student_log, teacher_log, log_target=True, reduction="batchmean") * t**2


def hidden_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over blocks of the squared distance, relative to the teacher's mean square."""
    pairs = zip(student, teacher, strict=True)
    distances = [F.mse_loss(s.float(), t.float()) / t.float().square().mean().clamp(min=1e-12) for s, t in pairs]
    return torch.stack(distances).mean()


class Distill(Callback):
    """Replaces the training step's loss for one segment.

    Args:
        teacher: from :func:`make_teacher`.
        settings: of the stage.
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
    """What one step's forward pass showed: calls of the model, and the blocks' outputs."""

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
    """The tensor in what a model or block gives out."""
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def _cast(value: Any, model: nn.Module) -> Any:
    """Floating-point inputs in the teacher's precision."""
    if isinstance(value, dict):
        return {key: _cast(v, model) for key, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_cast(v, model) for v in value)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(next(model.parameters()).dtype)
    return value
