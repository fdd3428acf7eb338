"""One segment of training: a plain Lightning fit of a stage's epochs.

A segment has its own epochs, optimizers and schedules; the loggers' step goes on over segments. One Lightning fit a
segment, not one fit with surgery inside: then Lightning rebuilds optimizers, schedules and wrappers itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from pqqp_lightning.errors import Problem, RecipeError, shorten
from pqqp_lightning.runs.distillation import Distill
from pqqp_lightning.runs.run_data import DataSource
from pqqp_lightning.runs.training_callbacks import HoldMasks, ResumePoint, SeedSteps
from pqqp_lightning.seeding import run_seed, seed_from
from pqqp_lightning.stages.stage import Stage


def train_segment(
    trainer: Trainer,
    data: DataSource,
    stage: Stage,
    segment: int,
    resume_point: Path,
    teacher: LightningModule | None = None,
) -> None:
    """Train ``data.module`` for ``stage.epochs``; from ``resume_point`` if that file exists, else from the start.

    Of the stages, only ``stage`` sees the hooks of this segment.

    Raises:
        RecipeError: the training diverged.
    """
    seed_from(run_seed(), segment, -1)
    max_epochs = trainer.fit_loop.max_epochs
    _start_anew(trainer, stage)
    first: list[Callback] = [HoldMasks(), SeedSteps(run_seed(), segment)]
    if stage.distill is not None and teacher is not None:
        first.append(Distill(teacher, stage.distill))
    last = [] if trainer.fast_dev_run else [ResumePoint(resume_point)]
    before = list(trainer.callbacks)
    given = [c for c in before if c is stage or not isinstance(c, Stage)]
    trainer.callbacks = [*first, *given, *last]
    try:
        with _segment_learning_rate(data.module, stage.learning_rate):
            Trainer.fit(
                trainer,
                data.module,
                train_dataloaders=data.train,
                val_dataloaders=data.validation,
                datamodule=data.datamodule,
                ckpt_path=resume_point if resume_point.is_file() else None,
                weights_only=True,
            )
    finally:
        trainer.callbacks = before
        trainer.fit_loop.max_epochs = max_epochs  # the user's, for a later fit
    if trainer.is_global_zero:
        resume_point.unlink(missing_ok=True)
    trainer.strategy.barrier("segment")
    _refuse_divergence(data.module, stage)


def _refuse_divergence(module: LightningModule, stage: Stage) -> None:
    """A model that training has spoilt is no basis for what follows."""
    if spoilt := [name for name, p in module.named_parameters() if not bool(p.isfinite().all())]:
        rate = "the model's own" if stage.learning_rate is None else f"{stage.learning_rate:g} now"
        text = f"{shorten(spoilt)} are not finite after training: it diverged"
        problem = Problem(text=text, way_out=f"Lower learning_rate ({rate}), or set trainer.gradient_clip_val.")
        raise RecipeError(problem.within(f"stages.{stage.name}", type(stage).__name__))


def logged_steps(trainer: Trainer) -> int:
    """The loggers' step, which goes on over segments."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def continue_steps(trainer: Trainer, steps: int) -> None:
    """Let the loggers' step go on from ``steps``."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = steps


def _start_anew(trainer: Trainer, stage: Stage) -> None:
    """Fresh loops and fresh early stopping; the loggers' step goes on."""
    old = trainer.fit_loop
    loop = _FitLoop(trainer, min_epochs=old.min_epochs, max_epochs=1 if trainer.fast_dev_run else stage.epochs)
    loop.epoch_loop = _TrainingEpochLoop(
        trainer, min_steps=old.epoch_loop.min_steps, max_steps=old.epoch_loop.max_steps
    )
    steps, trainer.fit_loop = logged_steps(trainer), loop
    continue_steps(trainer, steps)
    trainer.should_stop = False
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping | ModelCheckpoint):
            _restore_first_state(callback, Path(trainer.default_root_dir) / "checkpoints" / stage.name)


def _restore_first_state(callback: EarlyStopping | ModelCheckpoint, folder: Path) -> None:
    """Back to how the user made it, so that a segment is not judged by the best score of the one before."""
    # On the callback itself, so that the copy lives exactly as long as the user's object, over several fits.
    first: dict[str, Any] = callback.__dict__.setdefault("_pqqp_first_state", copy.deepcopy(vars(callback)))
    vars(callback).update(copy.deepcopy({k: v for k, v in first.items() if k != "_pqqp_first_state"}))
    if isinstance(callback, ModelCheckpoint):  # one folder a segment, so that files do not collide
        callback.dirpath = str(folder if callback.dirpath is None else Path(callback.dirpath) / folder.name)


@contextmanager
def _segment_learning_rate(module: LightningModule, learning_rate: float | None) -> Iterator[None]:
    """Optimizers whose highest learning rate is ``learning_rate``; parameter groups and schedules keep their ratios."""
    if learning_rate is None:
        yield
        return
    configure = module.configure_optimizers

    def scaled() -> Any:
        configured = configure()
        optimizers, schedules = _parts_of(configured)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rates = [group[key] for group in groups for key in _GROUP_RATES if key in group]
        ratio = learning_rate / max(rates + [lr for s in schedules for lr in getattr(s, "max_lrs", [])])
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
    """Multiply the learning rates that a schedule, or one that it consists of, keeps for itself."""
    for name in _SCHEDULE_RATES:
        if hasattr(schedule, name):
            setattr(schedule, name, [lr * ratio for lr in getattr(schedule, name)])
    if hasattr(schedule, "eta_min"):
        schedule.eta_min *= ratio
    for part in getattr(schedule, "_schedulers", []):
        _scale(part, ratio)


def _parts_of(configured: Any) -> tuple[list[Any], list[Any]]:
    """The optimizers and schedulers in any of the forms that ``configure_optimizers`` may return."""
    from lightning.pytorch.core.optimizer import _configure_optimizers, _configure_schedulers_automatic_opt

    optimizers, configs, _ = _configure_optimizers(configured)
    return optimizers, [c.scheduler for c in _configure_schedulers_automatic_opt(configs, None)]
