"""Checks what the model and the trainer need to evaluate and to train, before Lightning finds it in the middle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import _configure_optimizers
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from pqqp_lightning.errors import Problem
from pqqp_lightning.seeding import keep_random_state
from pqqp_lightning.stages.stage import Stage

OTHER_PRECISION = "Use trainer.precision bf16-true or 16-mixed"


def check_training(trainer: Trainer, module: LightningModule, stages: Sequence[Stage]) -> list[Problem]:
    """The problems of the model's steps and optimizers with these stages."""
    name = type(module).__name__
    problems = []
    if not is_overridden("validation_step", module):
        text = f"{name} has no validation_step, which measures it before and after each stage"
        problems.append(Problem(text=text, way_out="Define one that logs a metric.").within("model"))
    for hook in ("training_epoch_end", "validation_epoch_end"):
        if callable(getattr(module, hook, None)):
            text = f"{name} defines {hook}, which Lightning does not call since version 2"
            problems.append(Problem(text=text, way_out=f"Define on_{hook.removesuffix('_end')}_end.").within("model"))
    training = [stage for stage in stages if stage.epochs > 0]
    if not training:
        return problems
    if trainer.limit_train_batches == 0:
        text = f"leaves no training for stage '{training[0].name}' (epochs={training[0].epochs})"
        way_out = "Leave it out, or set epochs: 0."
        problems.append(Problem("limit_train_batches", 0, text, way_out).within("trainer"))
    missing = _missing_optimizers(module)
    for stage in training if missing else ():
        problem = Problem("epochs", stage.epochs, missing, "Define one, or set epochs: 0.")
        problems.append(problem.within(f"stages.{stage.name}", type(stage).__name__))
    if not module.automatic_optimization:
        problems += _check_manual(trainer, module, training)
    return problems + _check_epsilon(trainer, module)


def vanishing_epsilon(optimizers: Sequence[Optimizer], dtype: torch.dtype | None = None) -> str:
    """Words about the first optimizer whose ``eps`` is 0 in the precision of its parameters; empty if there is none.

    It divides by the square root of a running mean plus ``eps``, which float16 rounds to 0: the weights become NaN.

    Args:
        optimizers: of torch. Fused ones compute in float32.
        dtype: of the parameters, if they will be converted.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            epsilon = group.get("eps")
            if not isinstance(epsilon, float) or group.get("fused"):
                continue
            dtypes = {dtype or parameter.dtype for parameter in group["params"] if parameter.is_floating_point()}
            for held in dtypes:
                if epsilon > 0 and torch.tensor(epsilon, dtype=held) == 0:
                    precision = str(held).removeprefix("torch.")
                    return f"{type(optimizer).__name__}'s eps={epsilon:g} is 0 in {precision}"
    return ""


def _missing_optimizers(module: LightningModule) -> str:
    """What the model lacks to be trained, in words; empty if it has optimizers."""
    name = type(module).__name__
    if not is_overridden("configure_optimizers", module):
        return f"needs a configure_optimizers in {name}"
    if module.automatic_optimization and _configured(module) is None:
        return f"needs optimizers, but configure_optimizers of {name} returns None"
    return ""


def _configured(module: LightningModule) -> Any:
    """What ``configure_optimizers`` returns: built and thrown away; () if it cannot be called before the run."""
    try:
        with keep_random_state():
            return module.configure_optimizers()
    except Exception:  # it may ask for the trainer, its data, or parameters that a stage adds
        return ()


def _check_manual(trainer: Trainer, module: LightningModule, training: Sequence[Stage]) -> list[Problem]:
    """What has no effect if the model steps its optimizers by hand."""
    by_hand = f"{type(module).__name__} optimizes by hand (automatic_optimization=False)"
    problems = []
    clipping = trainer.gradient_clip_val
    if clipping:
        text = f"has no effect: {by_hand}"
        way_out = "Leave it out, and call self.clip_gradients in training_step."
        problems.append(Problem("gradient_clip_val", clipping, text, way_out).within("trainer"))
    accumulated = trainer.accumulate_grad_batches
    if accumulated != 1:
        text, way_out = f"has no effect: {by_hand}", "Leave it out, and accumulate in training_step."
        problems.append(Problem("accumulate_grad_batches", accumulated, text, way_out).within("trainer"))
    for stage in training:
        own = []
        if stage.distill is not None:
            text = f"has no effect: {by_hand}, and does not use the loss that its training_step returns"
            own.append(Problem("distill", text=text, way_out="Leave it out, or let Lightning optimize."))
        if stage.learning_rate is not None and _configured(module) is None:
            text = f"has no effect: {by_hand}, and its configure_optimizers returns None"
            own.append(Problem("learning_rate", stage.learning_rate, text, "Leave it out, or return the optimizers."))
        problems += [problem.within(f"stages.{stage.name}", type(stage).__name__) for problem in own]
    return problems


def _check_epsilon(trainer: Trainer, module: LightningModule) -> list[Problem]:
    plugin = trainer.precision_plugin
    dtype = plugin._desired_input_dtype if isinstance(plugin, HalfPrecision) else None
    words = vanishing_epsilon(list(_torch_optimizers(_configured(module))), dtype)
    if not words:
        return []
    way_out = f"{OTHER_PRECISION}, or give the optimizer eps=1e-4."
    if dtype is None:
        text = f"training would make the weights NaN: {words}"
        return [Problem(text=text, way_out=way_out).within("model")]
    text = f"would make the weights NaN in training: {words}"
    return [Problem("precision", trainer.precision, text, way_out).within("trainer")]


def _torch_optimizers(configured: Any) -> Iterator[Optimizer]:
    """The optimizers of torch itself: others may hold their state in another precision."""
    if configured is None or configured == ():
        return
    optimizers, _, _ = _configure_optimizers(configured)
    for optimizer in optimizers:
        if type(optimizer).__module__.startswith("torch.optim"):
            yield optimizer
