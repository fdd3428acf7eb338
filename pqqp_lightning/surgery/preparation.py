"""Completes a module before its first stage: layers that its hooks or its first batch make, and plain weights.

What was done is stored as the first entry of a checkpoint's stages, so that a freshly built module gets the same
structure before the stages' plans.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from pqqp_lightning.errors import Problem, RecipeError, shorten
from pqqp_lightning.surgery.parametrized import fold

LAYER_HOOKS = ("setup", "configure_model")
"""The hooks in which a LightningModule may make layers, in Lightning's order."""


class Prepared:
    """What completed a module, as a checkpoint stores it: in the place of a stage, before the stages.

    A plan has up to three entries: ``hooks`` (a hook that makes layers, to the tensors that were new), ``lazy`` (a
    module to its numbers and the shapes of its tensors) and ``folded`` (a tensor to its kind, of
    ``parametrized_tensors``).
    """

    @staticmethod
    def restructure(model: LightningModule, plan: dict[str, Any]) -> None:
        """Give a freshly built ``model`` the structure of the plan; what it has already is left alone.

        Raises:
            RecipeError: a hook of the model fails outside of a run.
        """
        for hook, made in plan.get("hooks", {}).items():
            if set(made) <= set(model.state_dict(keep_vars=True)):
                continue
            try:
                call_hook(model, hook)
            except Exception as error:
                text = f"{type(model).__name__}.{hook}() makes its layers and fails outside of a run ({error})"
                raise RecipeError(Problem(text=text, way_out="Pass a module that has them: module=....")) from error
        modules = dict(model.named_modules())
        for name, (numbers, shapes) in plan.get("lazy", {}).items():
            if name in modules and is_uninitialized(modules[name]):
                _materialize(modules[name], numbers, shapes)
        keep_layers(model)
        fold(model, plan.get("folded", {}))

    @staticmethod
    def notes(plan: dict[str, Any]) -> list[str]:
        """What was done, in words."""
        of_kind: dict[str, list[str]] = {}
        for tensor, kind in plan.get("folded", {}).items():
            of_kind.setdefault(kind, []).append(tensor.rpartition(".")[0])
        return [f"{shorten(layers)}: {kind} folded into plain weights" for kind, layers in of_kind.items()]


def overridden_hooks(module: LightningModule) -> list[str]:
    """The hooks of ``LAYER_HOOKS`` that the module's class defines."""
    return [hook for hook in LAYER_HOOKS if is_overridden(hook, module)]


def keep_layers(module: LightningModule) -> None:
    """Let the module's hooks make each layer once.

    Lightning calls ``setup`` and ``configure_model`` before every evaluation and training. A hook that makes its layers
    anew each time would throw away what was compressed.
    """
    for hook in overridden_hooks(module):
        module.__dict__[hook] = partial(call_hook, module, hook)


def call_hook(module: LightningModule, hook: str, stage: str = "fit") -> bool:
    """Call ``setup`` or ``configure_model`` as the module's class defines it, and put back what it replaces.

    Modules and parameters that are new stay.

    Returns:
        Whether it had replaced any.

    Raises:
        RecipeError: the hook writes into weights that exist already.
    """
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for part in module.modules():
        stores: list[dict[str, Any]] = [part._modules, part._parameters]
        # An attribute that is None waits for its layer.
        before += [(store, {name: held for name, held in store.items() if held is not None}) for store in stores]
    versions = {name: p._version for name, p in module.named_parameters() if not is_lazy(p) and not p.is_inference()}
    function = getattr(type(module), hook)
    if hook == "setup":
        function(module, stage=stage)
    else:
        function(module)
    replaced = False
    for store, held in before:
        replaced |= any(store.get(name) is not part for name, part in held.items())
        store.update(held)
    named = dict(module.named_parameters())
    if written := [name for name, version in versions.items() if named[name]._version != version]:
        text = (
            f"{type(module).__name__}.{hook}() changes {shorten(written)} each time that Lightning calls it, which is "
            "before every evaluation and training"
        )
        raise RecipeError(Problem(text=text, way_out="Initialize weights in __init__, or only once.").within("model"))
    return replaced


def is_uninitialized(module: nn.Module) -> bool:
    """Whether ``module`` itself (not its children) waits for its first batch to know its shapes."""
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()  # type: ignore[misc]


def uninitialized_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The lazy modules of ``model`` that have no shapes yet, by name."""
    return {name: module for name, module in model.named_modules() if is_uninitialized(module)}


def describe_shapes(module: nn.Module) -> list[Any]:
    """The numbers (``in_features``) and the shapes of the tensors of a module that was lazy, as plain data."""
    numbers = {name: value for name, value in vars(module).items() if type(value) is int}
    tensors: Iterable[tuple[str, Tensor | None]] = [*module._parameters.items(), *module._buffers.items()]
    return [numbers, {name: list(tensor.shape) for name, tensor in tensors if tensor is not None}]


def _materialize(module: Any, numbers: dict[str, int], shapes: dict[str, list[int]]) -> None:
    """Give a lazy module its shapes, without the batch that torch would take them from."""
    with torch.no_grad():
        for name, shape in shapes.items():
            tensor = getattr(module, name)
            if is_lazy(tensor):
                tensor.materialize(tuple(shape))
                tensor.zero_()
    vars(module).update(numbers)
    # As torch's LazyModuleMixin does after the first batch.
    module._initialize_hook.remove()
    module._load_hook.remove()
    del module._initialize_hook, module._load_hook
    if module.cls_to_become is not None:
        module.__class__ = module.cls_to_become
