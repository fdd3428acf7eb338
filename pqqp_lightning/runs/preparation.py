"""Completes the model of a run before it is checked, as Lightning would do at the start of a loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule

from pqqp_lightning.calibration.walk import calibrating
from pqqp_lightning.checkpoint.construction import skeleton_of
from pqqp_lightning.checkpoint.format import ORIGIN, Applied, Origin, origin_of
from pqqp_lightning.errors import Problem, RecipeError, shorten
from pqqp_lightning.network.single_step import call_step, without_logging
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.stages.arguments import argument_problems
from pqqp_lightning.surgery.parametrized import fold, parametrized_tensors
from pqqp_lightning.surgery.preparation import (
    Prepared,
    call_hook,
    describe_shapes,
    keep_layers,
    overridden_hooks,
    uninitialized_modules,
)

if TYPE_CHECKING:
    from pqqp_lightning.runs.trainer import Trainer  # which imports this module


def prepare(trainer: Trainer, data: RunData) -> None:
    """Give the model all of its layers, and fold its parametrized weights if the trainer says so.

    Raises:
        RecipeError: the layers cannot be made before the run, or a stage has a value of another type.
    """
    _refuse_wrong_types(trainer, data)
    module = data.module
    skeleton = skeleton_of(module)
    plan = build_layers(trainer, data)
    if trainer.fold_parametrizations and (folded := parametrized_tensors(module)):
        fold(module, folded)
        plan["folded"] = folded
    if plan:
        origin = origin_of(module) or Origin(skeleton, [])
        vars(module)[ORIGIN] = Origin(origin.skeleton, [*origin.applied, Applied(Prepared, plan)])


def _refuse_wrong_types(trainer: Trainer, data: RunData) -> None:
    """Refuse stages that Python code made with values of other types, which no check could compare.

    Raises:
        RecipeError: with every such value, and what is wrong with the data and the other stages' arguments.
    """
    wrong = {stage.name: argument_problems(stage) for stage in trainer.stages}
    if not any(wrong.values()):
        return
    problems = data.check()
    for stage in trainer.stages:
        for problem in wrong[stage.name] or stage.check_arguments():
            problems.append(problem.within(f"stages.{stage.name}", type(stage).__name__))
    raise RecipeError(problems)


def build_layers(trainer: Trainer, data: RunData) -> dict[str, Any]:
    """Make the layers that the model's hooks and its first batch make; returns the plan of :class:`Prepared`.

    Raises:
        RecipeError: a hook fails, or no batch reaches a lazy layer.
    """
    module = data.module
    hooks = overridden_hooks(module)
    if not hooks and not uninitialized_modules(module):
        return {}
    if problems := data.check():
        raise RecipeError(problems)
    attach(trainer, data)
    plan: dict[str, Any] = {}
    for hook in hooks:
        before = set(module.state_dict(keep_vars=True))
        replaced = _call_as_lightning(trainer, module, hook)
        made = [name for name in module.state_dict(keep_vars=True) if name not in before]
        if made or replaced:
            plan.setdefault("hooks", {})[hook] = made
    keep_layers(module)
    if lazy := uninitialized_modules(module):
        _run_first_batch(data)
        plan["lazy"] = {name: describe_shapes(part) for name, part in lazy.items()}
    return plan


def attach(trainer: Trainer, data: RunData) -> None:
    """Let the model find its trainer and its data, set up, as in a loop of Lightning's."""
    trainer.strategy.connect(data.module)
    data.module.trainer = trainer
    if data.datamodule is not None:
        vars(trainer)["datamodule"] = data.datamodule
    elif trainer.is_global_zero:
        data.module.prepare_data()
    data.read(trainer, every_rank=True)


def preparation_notes(module: LightningModule) -> list[str]:
    """What was done to the model before its first stage, in words."""
    origin = origin_of(module)
    applied = origin.applied if origin else []
    return [note for item in applied if item.stage is Prepared for note in Prepared.notes(item.plan)]


def _call_as_lightning(trainer: Trainer, module: LightningModule, hook: str) -> bool:
    """Call ``hook`` as Lightning does before a loop; returns whether it replaced layers.

    Raises:
        RecipeError: it fails, and the model has no layers without it.
    """
    try:
        if hook == "setup":
            return call_hook(module, hook)
        with trainer.strategy.tensor_init_context(), trainer.precision_plugin.module_init_context():
            replaced = call_hook(module, hook)
        module.cpu()  # Lightning makes these layers on the accelerator, and moves the model itself before a loop
        return replaced
    except RecipeError:
        raise
    except Exception as error:
        if any(True for _ in module.parameters()):
            return False  # it needs a running loop, and the layers exist: Lightning calls it then
        text = f"{type(module).__name__}.{hook}() makes the layers and fails before the run: {error}"
        way_out = "Make them in __init__, or in configure_model() without the trainer."
        raise RecipeError(Problem(text=text, way_out=way_out).within("model")) from error


def _run_first_batch(data: RunData) -> None:
    """Let one evaluation batch give lazy modules their shapes.

    Raises:
        RecipeError: the batch fails, or does not reach one of them.
    """
    module = data.module
    way_out = "Run one batch through the model before the run, or give their layers the number of inputs."
    try:
        with calibrating(module), without_logging(module):
            call_step(module.validation_step, data.first_evaluation_batch())
    except Exception as error:
        text = f"{shorten(uninitialized_modules(module))} have no shape before the first batch, which fails: {error}"
        raise RecipeError(Problem(text=text, way_out=way_out).within("model")) from error
    if left := uninitialized_modules(module):
        text = f"{shorten(left)} have no shape, and validation_step does not reach them"
        raise RecipeError(Problem(text=text, way_out=way_out).within("model"))
