"""Finetunes after a stage: one segment of training is one Lightning fit of the stage's epochs.

Each segment has its own epochs, optimizers and schedules; the loggers' step is continuous across segments. A segment is
a whole fit because Lightning then rebuilds optimizers, schedules and wrappers for the changed model. Surgery inside a
running fit would train stale parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import (
    _configure_optimizers,
    _configure_schedulers_automatic_opt,
    _configure_schedulers_manual_opt,
)
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from pqqp_lightning.errors import Problem, RecipeError, shorten
from pqqp_lightning.runs.callback_state import (
    KeepUnaveraged,
    averaging_names,
    drop_averages,
    lost_training,
    start_anew,
    trained_values,
)
from pqqp_lightning.runs.distillation import Distill
from pqqp_lightning.runs.run_data import RunData, no_training_batch
from pqqp_lightning.runs.training_callbacks import HoldMasks, ResumePoint, SeedSteps
from pqqp_lightning.runs.training_checks import OTHER_PRECISION, vanishing_epsilon
from pqqp_lightning.seeding import run_seed, seed_from
from pqqp_lightning.stages.stage import Stage


def train_segment(
    trainer: Trainer,
    data: RunData,
    stage: Stage,
    segment: int,
    resume_point: Path,
    teacher: LightningModule | None = None,
) -> None:
    """Train ``data.module`` for ``stage.epochs``.

    Args:
        trainer: runs the fit; its callbacks take part, except other stages, and start anew (:mod:`callback_state`).
        data: the model, training and evaluation data.
        stage: the stage that was just applied.
        segment: number of stages applied so far; part of the seed.
        resume_point: file with the training state; training resumes from it if it exists.
        teacher: the dense model, for ``stage.distill``.

    Raises:
        RecipeError: the training diverged.
    """
    seed_from(run_seed(), segment, -1)
    max_epochs = trainer.fit_loop.max_epochs
    accumulated = trainer.accumulate_grad_batches
    _reset_loops(trainer, stage)
    # HoldMasks comes first: callbacks of the user must see pruned weights at zero.
    first: list[Callback] = [HoldMasks(), SeedSteps(run_seed(), segment)]
    if stage.distill is not None and teacher is not None:
        first.append(Distill(teacher, stage.distill))
    # ResumePoint comes last: it saves what the other callbacks have decided at the epoch's end.
    last: list[Callback] = [] if trainer.fast_dev_run else [ResumePoint(resume_point)]
    keep = KeepUnaveraged()
    first, last = [*first, keep.before], [keep.after, *last]
    callbacks = list(trainer.callbacks)
    taking_part = [c for c in callbacks if c is stage or not isinstance(c, Stage)]
    trainer.callbacks = [*first, *taking_part, *last]
    compares = averaging_names(taking_part) and not resume_point.is_file() and not trainer.fast_dev_run
    start = trained_values(data.module) if compares else {}
    try:
        with _segment_learning_rate(data.module, stage.learning_rate):
            Trainer.fit(  # Lightning's: our own fit would start a run
                trainer,
                data.module,
                train_dataloaders=data.train,
                val_dataloaders=data.validation,
                datamodule=data.datamodule,
                ckpt_path=resume_point if resume_point.is_file() else None,
                weights_only=True,
            )
    finally:
        trainer.callbacks = callbacks
        trainer.fit_loop.max_epochs = max_epochs  # the user may fit again with this trainer
        trainer.accumulate_grad_batches = accumulated  # GradientAccumulationScheduler leaves its last one
        drop_averages(callbacks)
    if trainer.is_global_zero:
        resume_point.unlink(missing_ok=True)
    trainer.strategy.barrier("segment")
    if not trainer.num_training_batches:
        raise RecipeError(no_training_batch())
    _refuse_divergence(trainer, data.module, stage)
    if problem := lost_training(taking_part, data.module, start):
        raise RecipeError(problem.within(f"stages.{stage.name}", type(stage).__name__))


def _refuse_divergence(trainer: Trainer, module: LightningModule, stage: Stage) -> None:
    """Refuse NaN or infinite weights: later stages would compress garbage."""
    diverged = [name for name, parameter in module.named_parameters() if not bool(parameter.isfinite().all())]
    if diverged:
        rate = "the model's own" if stage.learning_rate is None else f"{stage.learning_rate:g} now"
        text = f"{shorten(diverged)} are not finite after training: it diverged"
        way_out = f"Lower learning_rate ({rate}), or set trainer.gradient_clip_val."
        if words := vanishing_epsilon(trainer.optimizers):
            text = f"{text}. {words}"
            way_out = f"{OTHER_PRECISION}, or give the optimizer eps=1e-4."
        elif trainer.precision == "16-true":
            way_out = f"{way_out} {OTHER_PRECISION}: float16 alone has no loss scaling, and ends at 65504."
        problem = Problem(text=text, way_out=way_out)
        raise RecipeError(problem.within(f"stages.{stage.name}", type(stage).__name__))


def logged_steps(trainer: Trainer) -> int:
    """Logger step, continuous across segments."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def continue_steps(trainer: Trainer, steps: int) -> None:
    """Set the logger step, which the next segment continues."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = steps


def _reset_loops(trainer: Trainer, stage: Stage) -> None:
    """Give the trainer new loops for the stage's epochs, and reset callbacks; the logger step continues."""
    old = trainer.fit_loop
    epochs = 1 if trainer.fast_dev_run else stage.epochs
    loop = _FitLoop(trainer, min_epochs=old.min_epochs, max_epochs=epochs)
    loop.epoch_loop = _TrainingEpochLoop(
        trainer, min_steps=old.epoch_loop.min_steps, max_steps=old.epoch_loop.max_steps
    )
    steps = logged_steps(trainer)
    trainer.fit_loop = loop
    continue_steps(trainer, steps)
    trainer.should_stop = False
    start_anew(trainer.callbacks, Path(trainer.default_root_dir) / "checkpoints" / stage.name)


@contextmanager
def _segment_learning_rate(module: LightningModule, learning_rate: float | None) -> Iterator[None]:
    """Scale the optimizers configured inside so that their highest learning rate is ``learning_rate``.

    Parameter groups and schedules keep their ratios.
    """
    if learning_rate is None:
        yield
        return
    configure = module.configure_optimizers

    def scaled() -> Any:
        configured = configure()
        if configured is None:
            text = "has no effect: configure_optimizers returns None"
            raise RecipeError(Problem("learning_rate", learning_rate, text, "Return the optimizers."))
        optimizers, schedules = _parts_of(configured, automatic=module.automatic_optimization)
        groups: list[dict[str, Any]] = []
        for optimizer in optimizers:
            groups += optimizer.param_groups
        rates: list[float] = []
        for group in groups:
            rates += [group[key] for key in _GROUP_RATES if key in group]
        for schedule in schedules:  # a schedule may rise above the optimizer's rate
            rates += getattr(schedule, "max_lrs", [])
        ratio = learning_rate / max(rates)
        for group in groups:
            group.update({key: group[key] * ratio for key in _GROUP_RATES if key in group})
        for schedule in schedules:
            _scale(schedule, ratio)
        return configured

    # Lightning builds the optimizers itself, in `fit`: only here can all of them be scaled before their first step.
    module.__dict__["configure_optimizers"] = scaled
    try:
        yield
    finally:
        del module.__dict__["configure_optimizers"]


_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
_SCHEDULE_RATES = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")


def _scale(schedule: Any, ratio: float) -> None:
    """Multiply the learning rates that a schedule stores, and those of the schedules that it combines."""
    for name in _SCHEDULE_RATES:
        if hasattr(schedule, name):
            setattr(schedule, name, [lr * ratio for lr in getattr(schedule, name)])
    if hasattr(schedule, "eta_min"):
        schedule.eta_min *= ratio
    for part in getattr(schedule, "_schedulers", []):
        _scale(part, ratio)


def _parts_of(configured: Any, *, automatic: bool) -> tuple[list[Any], list[Any]]:
    """Optimizers and schedulers from any form that ``configure_optimizers`` may return."""
    optimizers, configs, _ = _configure_optimizers(configured)
    if automatic:
        schedulers = _configure_schedulers_automatic_opt(configs, None)
    else:
        schedulers = _configure_schedulers_manual_opt(configs)
    return optimizers, [config.scheduler for config in schedulers]
