"""Checks a run before any work, and reports all problems at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden

from pqqp_lightning.checkpoint.packed_layers import is_packed_model
from pqqp_lightning.errors import Problem, RecipeError, shorten
from pqqp_lightning.network.constraints import constrained_layers
from pqqp_lightning.network.offload import offload_of
from pqqp_lightning.network.structure import weightless_copy
from pqqp_lightning.runs.callback_state import check_callbacks
from pqqp_lightning.runs.layer_probe import probe_layers
from pqqp_lightning.runs.offload_checks import check_offload
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.training_checks import check_training
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.storage.run_folder import RunFolder, check_folder


def check_recipe(trainer: Trainer, data: RunData, stages: Sequence[Stage]) -> None:
    """Check the model, the data, every stage after its predecessors, and the trainer's epochs.

    Raises:
        RecipeError: with every problem found.
    """
    if problems := check_run(trainer, data, stages) + check_places(stages, data):
        raise RecipeError(problems)


def read_data(trainer: Trainer, data: RunData, stages: Sequence[Stage]) -> None:
    """Read the data, and check what shows only then.

    Raises:
        RecipeError: with every problem found.
    """
    data.read(trainer)
    calibrates = any(stage.needs_calibration for stage in stages)
    if problems := data.check_read(calibrates=calibrates, trains=any(stage.epochs > 0 for stage in stages)):
        raise RecipeError(problems)


def check_uses(trainer: Trainer, data: RunData, stages: Sequence[Stage]) -> None:
    """Observe how the model uses its layers, and check the stages again if it does not call some of them.

    The data must have been read.

    Raises:
        RecipeError: with every problem found.
    """
    if probe_layers(trainer, data, stages) and (problems := check_places(stages, data)):
        raise RecipeError(problems)


def check_run(trainer: Trainer, data: RunData, stages: Sequence[Stage]) -> list[Problem]:
    """The problems that do not depend on the stages' order: folder, data, model, names, epochs and strategy."""
    run_folder = RunFolder(Path(trainer.default_root_dir))
    folder = [] if trainer.fast_dev_run else check_folder(run_folder.path, run_folder.marks)
    # first, since it decides where the weights lie that the others read
    offload = check_offload(trainer, data.module, stages)
    problems = (
        folder
        + offload
        + data.check()
        + _check_model(data.module)
        + _check_names(stages)
        + _check_epochs(trainer, stages)
    )
    problems += _check_strategy(trainer) + _check_teacher(stages) + check_training(trainer, data.module, stages)
    return problems + check_callbacks(trainer.callbacks)


def check_places(stages: Sequence[Stage], data: RunData) -> list[Problem]:
    """The problems of the stages in this order; each names its stage."""
    problems = []
    for stage, own in zip(stages, check_stages(stages, data), strict=True):
        problems += [problem.within(f"stages.{stage.name}", type(stage).__name__) for problem in own]
    return problems


def check_stages(stages: Sequence[Stage], data: RunData) -> list[list[Problem]]:
    """The problems of each stage after its predecessors.

    If stages change the structure, later ones are checked against a weightless copy of the model with that structure.
    """
    model = data.module
    found = []
    if any(type(stage).expected_plan is not Stage.expected_plan for stage in stages):
        model = weightless_copy(model)
    for position, stage in enumerate(stages):
        problems = check_stage(stage, data, stages[:position], model)
        found.append(problems)
        if not problems and model is not data.module:
            stage.restructure(model, stage.expected_plan(model))
    return found


def check_stage(stage: Stage, data: RunData, earlier: Sequence[Stage], model: LightningModule) -> list[Problem]:
    """The problems of ``stage`` on ``model``, which has the structure that ``earlier`` leave."""
    try:
        problems = stage.check(model, data.datamodule, earlier)
    except RecipeError as error:
        return error.problems
    if any(not isinstance(problem, Problem) for problem in problems):
        kinds = sorted({type(problem).__name__ for problem in problems if not isinstance(problem, Problem)})
        text = f"check must return a list of Problem (pqqp_lightning.errors), but it holds {', '.join(kinds)}"
        way_out = 'Return [Problem("bits", self.bits, "is not ...", "Use ...")], or raise RecipeError("...").'
        problems = [problem for problem in problems if isinstance(problem, Problem)]
        problems.append(Problem(text=text, way_out=way_out))
    if stage.needs_calibration and not data.has_calibration_data():
        way_out = "Give training data, or a datamodule with calibration_dataloader()."
        problems.append(Problem(text="needs calibration data", way_out=way_out))
    if stage.epochs > 0:
        problems += _check_training(stage, data, earlier, model)
    return problems


def _check_training(stage: Stage, data: RunData, earlier: Sequence[Stage], model: LightningModule) -> list[Problem]:
    problems = []
    if not data.has_training_data():
        owner = type(data.owner).__name__
        way_out = f"Give {owner} some, or set epochs: 0."
        problems.append(Problem("epochs", stage.epochs, "needs training data", way_out))
    if not is_overridden("training_step", data.module):
        text = f"needs a training_step in {type(data.module).__name__}"
        problems.append(Problem("epochs", stage.epochs, text, "Define one, or set epochs: 0."))
    quantized = [s for s in (*earlier, stage) if "grid" in s.promises]
    on_grid: dict[str, None] = {}
    for quantizing in quantized:
        on_grid.update(dict.fromkeys(quantizing.find_layers(model)))
    moving = set(stage.moves(model))
    if moved := [f"{name}.weight" for name in on_grid if name in moving]:
        text = f"would move {shorten(moved)} off the grid of stage '{quantized[0].name}'"
        way_out = (
            "Finetune before quantizing, recover with LoRA, set epochs: 0, or freeze these weights "
            "(requires_grad=False) in the model."
        )
        problems.append(Problem("epochs", stage.epochs, text, way_out))
    before_run = [name for name, _, constraints in constrained_layers(model) if constraints.has("grid")]
    if moved := [f"{name}.weight" for name in before_run if name in moving and name not in on_grid]:
        text = f"would move {shorten(moved)} off the grid that they had before the run"
        way_out = "Recover with LoRA, set epochs: 0, or freeze these weights (requires_grad=False) in the model."
        problems.append(Problem("epochs", stage.epochs, text, way_out))
    hidden_weight = stage.distill.hidden_weight if stage.distill else 0
    if hidden_weight and list(stage.find_blocks(model)) != list(stage.find_blocks(data.module)):
        text = "compares block with block, but an earlier stage removes some"
        way_out = "Leave it out, or put this stage before the removal."
        problems.append(Problem("distill.hidden_weight", hidden_weight, text, way_out))
    return problems


def _check_teacher(stages: Sequence[Stage]) -> list[Problem]:
    """One teacher serves all stages of a run, so it has one precision."""
    asked = {stage.name: stage.distill.teacher_dtype for stage in stages if stage.distill is not None}
    if len(set(asked.values())) < 2:
        return []
    given = ", ".join(f"{name}: {dtype}" for name, dtype in asked.items())
    text = f"one teacher serves all, but distill.teacher_dtype differs ({given})"
    return [Problem(text=text, way_out="Give it the same value.").within("stages")]


def _check_model(module: LightningModule) -> list[Problem]:
    if is_packed_model(module):
        text = "has packed weights, which cannot be trained or compressed"
        return [Problem(text=text, way_out="Load it without packed=True.").within("model")]
    parameters = offload_of(module).visit(module.named_parameters())
    bad = [n for n, p in parameters if p.is_floating_point() and not bool(torch.isfinite(p).all())]
    if not bad:
        return []
    text = f"{shorten(bad)} hold NaN or infinite weights"
    return [Problem(text=text, way_out="Use another checkpoint of the model.").within("model")]


def _check_names(stages: Sequence[Stage]) -> list[Problem]:
    names = [stage.name for stage in stages]
    twice = sorted({name for name in names if names.count(name) > 1})
    odd = [name for name in names if name == "dense" or not re.fullmatch(r"[\w-]+", name)]
    problems = [Problem(text=f"two stages are named '{name}'", way_out="Give each its own name.") for name in twice]
    for name in odd:
        way_out = "Use letters, digits, - and _; 'dense' is the model itself."
        problems.append(Problem(text=f"'{name}' cannot be a stage's name", way_out=way_out))
    return [problem.within("stages") for problem in problems]


def _check_epochs(trainer: Trainer, stages: Sequence[Stage]) -> list[Problem]:
    given = trainer.fit_loop.max_epochs
    total = sum(max(0, stage.epochs) for stage in stages)
    if trainer.fast_dev_run or given in (None, total):
        return []
    parts = " + ".join(f"{s.name} {s.epochs}" for s in stages if s.epochs) or "no stage has any"
    text = f"contradicts the stages' epochs, {total} in all ({parts})"
    way_out = "Leave trainer.max_epochs out; it follows from the stages."
    return [Problem("max_epochs", given, text, way_out).within("trainer")]


def _check_strategy(trainer: Trainer) -> list[Problem]:
    if not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        return []
    text = "would start new processes for every evaluation: they do not live through the run"
    return [Problem("strategy", text=text, way_out="Use strategy: ddp.").within("trainer")]
