"""Everything about a run that must be put right before any work, found at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden

from pqqp_lightning.errors import RecipeError, shorten
from pqqp_lightning.network.structure import weightless_copy
from pqqp_lightning.runs.run_data import DataSource
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.storage.run_folder import RunFolder, check_folder


def check_recipe(trainer: Trainer, data: DataSource, stages: Sequence[Stage]) -> None:
    """Check the model, the data, every stage in its place, and the trainer's epochs.

    Raises:
        RecipeError: with every problem found.
    """
    if problems := check_run(trainer, data, stages) + check_places(stages, data):
        raise RecipeError(problems)


def check_run(trainer: Trainer, data: DataSource, stages: Sequence[Stage]) -> list[str]:
    """The problems of all but the stages' places: the folder, the data, the model, names and epochs."""
    run_folder = RunFolder(Path(trainer.default_root_dir))
    folder = [] if trainer.fast_dev_run else check_folder(run_folder.path, run_folder.marks)
    problems = folder + data.check() + _check_model(data.module) + _check_names(stages) + _check_epochs(trainer, stages)
    return problems + _check_strategy(trainer) + _check_teacher(stages)


def check_places(stages: Sequence[Stage], data: DataSource) -> list[str]:
    """The problems of the stages in this order, each with its stage in front."""
    pairs = zip(stages, check_stages(stages, data), strict=True)
    return [f"{_where(stage)}: {problem}" for stage, found in pairs for problem in found]


def check_stages(stages: Sequence[Stage], data: DataSource) -> list[list[str]]:
    """The problems of each stage in its place.

    Where stages change the structure, those after them are checked against a copy that has it, weights aside.
    """
    model, found = data.module, []
    if any(type(stage).expected_plan is not Stage.expected_plan for stage in stages):
        model = weightless_copy(model)
    for position, stage in enumerate(stages):
        problems = _check_stage(stage, data, stages[:position], model)
        found.append(problems)
        if not problems and model is not data.module:
            stage.restructure(model, stage.expected_plan(model))
    return found


def _check_stage(stage: Stage, data: DataSource, earlier: Sequence[Stage], model: LightningModule) -> list[str]:
    try:
        problems = stage.check(model, data.datamodule, earlier)
    except RecipeError as error:
        return error.problems
    if stage.needs_calibration and not data.has_calibration_data():
        problems.append("needs calibration data. Give training data, or a datamodule with calibration_dataloader().")
    if stage.epochs > 0:
        problems += _check_training(stage, data, earlier, model)
    return problems


def _check_training(stage: Stage, data: DataSource, earlier: Sequence[Stage], model: LightningModule) -> list[str]:
    problems = []
    if not data.has_training_data():
        owner = type(data.owner).__name__
        problems.append(f"epochs={stage.epochs} needs training data. Give {owner} some, or set epochs: 0.")
    if not is_overridden("training_step", data.module):
        problems.append(f"epochs={stage.epochs} needs a training_step in {type(data.module).__name__}.")
    quantized = [s for s in (*earlier, stage) if "grid" in s.promises]
    on_grid = dict.fromkeys(name for s in quantized for name in s.find_layers(model))
    moving = set(stage.moves(model))
    if moved := [f"{name}.weight" for name in on_grid if name in moving]:
        problems.append(
            f"epochs={stage.epochs} would move {shorten(moved)} off the grid of stage '{quantized[0].name}'. Finetune "
            "before quantizing, recover with LoRA, set epochs: 0, or freeze these weights (requires_grad=False) in the "
            "model."
        )
    if stage.distill and stage.distill.hidden_weight and _blocks_of(stage, model) != _blocks_of(stage, data.module):
        problems.append(
            "distill.hidden_weight compares block with block, but an earlier stage removes some. Leave it out, or put "
            "this stage before the removal."
        )
    return problems


def _blocks_of(stage: Stage, model: LightningModule) -> list[str]:
    return list(stage.find_blocks(model))


def _check_teacher(stages: Sequence[Stage]) -> list[str]:
    """One teacher serves the run, so that its precision must be one."""
    asked = {stage.name: stage.distill.teacher_dtype for stage in stages if stage.distill is not None}
    if len(set(asked.values())) < 2:
        return []
    given = ", ".join(f"{name}: {dtype}" for name, dtype in asked.items())
    return [f"stages: one teacher serves all, but distill.teacher_dtype differs ({given}). Give it the same value."]


def _check_model(module: LightningModule) -> list[str]:
    bad = [n for n, p in module.named_parameters() if p.is_floating_point() and not bool(torch.isfinite(p).all())]
    if not bad:
        return []
    return [f"model: {shorten(bad)} hold NaN or infinite weights. Use another checkpoint of the model."]


def _check_names(stages: Sequence[Stage]) -> list[str]:
    names = [stage.name for stage in stages]
    twice = sorted({name for name in names if names.count(name) > 1})
    odd = [name for name in names if name == "dense" or not re.fullmatch(r"[\w-]+", name)]
    return [f"stages: two stages are named '{name}'. Give each its own name." for name in twice] + [
        f"stages: '{name}' cannot be a stage's name. Use letters, digits, - and _; 'dense' is the model itself."
        for name in odd
    ]


def _check_epochs(trainer: Trainer, stages: Sequence[Stage]) -> list[str]:
    given, total = trainer.fit_loop.max_epochs, sum(max(0, stage.epochs) for stage in stages)
    if trainer.fast_dev_run or given in (None, total):
        return []
    parts = " + ".join(f"{s.name} {s.epochs}" for s in stages if s.epochs) or "no stage has any"
    return [
        f"trainer.max_epochs={given} contradicts the stages' epochs, {total} in all ({parts}). "
        "Leave trainer.max_epochs out; it follows from the stages."
    ]


def _check_strategy(trainer: Trainer) -> list[str]:
    if not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        return []
    return [
        "trainer.strategy: its processes would start and end with every evaluation, and not live through the run. "
        "Use strategy: ddp."
    ]


def _where(stage: Stage) -> str:
    return f"stages.{stage.name} ({type(stage).__name__})"
