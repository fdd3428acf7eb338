"""How to build a user's module again: its class and the arguments of its constructor, as far as it reveals them.

Lightning's ``save_hyperparameters`` records the arguments. A module that does not call it, or leaves some out, can only
be built with its defaults, and may then compute something else: the checkpoint's probe finds out.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.parsing import AttributeDict
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from pqqp_lightning.network.structure import class_path

Arguments = dict[str, inspect.Parameter]
CLI_KEYS = ("_instantiator", "_class_path")
"""What Lightning's command line adds to the hyperparameters of a module that it has built."""


def skeleton_of(module: LightningModule) -> dict[str, Any] | None:
    """Describe how to build a module of this structure, without weights.

    Returns:
        Class path and arguments as plain data, or None if the module does not reveal them
        (:func:`why_not_described`).
    """
    describe = getattr(module, "skeleton", None)
    if callable(describe):
        return describe()
    if why_not_described(module):
        return None
    return {"class_path": class_path(module), "init_args": _recorded_arguments(module)}


def why_not_described(module: LightningModule) -> str:
    """Why :func:`skeleton_of` gives None for a module without ``skeleton()``, as a sentence; else empty."""
    if callable(getattr(module, "skeleton", None)):
        return "It was made around a network whose arguments are unknown."
    name, recorded = type(module).__name__, _recorded_arguments(module)
    expected, _ = _arguments_of(type(module))
    required = [key for key, argument in expected.items() if argument.default is argument.empty]
    if missing := [key for key in required if key not in recorded]:
        return f"{name}'s constructor needs {_list(missing)}, and {_how_recorded(module.hparams)}."
    if odd := [key for key, value in recorded.items() if not _survives_json(value)]:
        return f"The arguments {_list(odd)} of {name} are not plain data, and a checkpoint holds nothing else."
    return ""


def unknown_arguments(module_class: type, init_args: dict[str, Any]) -> str:
    """Which arguments a build from ``init_args`` leaves at their defaults, and why, as a sentence; empty if none."""
    if callable(getattr(module_class, "skeleton", None)):
        return ""
    expected, variadic = _arguments_of(module_class)
    missing = [key for key in expected if key not in init_args]
    if variadic and not init_args:
        missing.append("further keyword arguments")
    if not missing:
        return ""
    return f"{module_class.__name__} was built with the defaults of {_list(missing)}: {_how_recorded(init_args)}"


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, modules are built with parameters on the meta device, which takes no memory. Buffers are as always.

    A constructor may compute buffers that no checkpoint holds (rotary frequencies). ``torch.device("meta")`` would
    leave them empty.
    """
    register = nn.Module.register_parameter
    # A parameter that two modules share must stay one. The keys are weak: the dense ones shall not be kept.
    on_meta: Any = WeakIdKeyDictionary()

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta and not is_lazy(parameter):
            if parameter not in on_meta:
                on_meta[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            parameter = on_meta[parameter]
        register(module, name, parameter)

    with patch.object(nn.Module, "register_parameter", register_on_meta):
        yield


def left_on_meta(module: nn.Module) -> list[str]:
    """The tensors of a built module that have no values, besides its parameters: it computed them from parameters."""
    names = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    for prefix, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and value.is_meta:
                names.append(f"{prefix}.{name}".lstrip("."))
    return names


def arguments_for(module_class: type, init_args: dict[str, Any]) -> dict[str, Any]:
    """The arguments to build a user's module with: a dictionary's entries can be read as attributes.

    A configuration that was a namespace is recorded as a dictionary.
    """
    if callable(getattr(module_class, "skeleton", None)):
        return init_args
    return {key: AttributeDict(value) if isinstance(value, dict) else value for key, value in init_args.items()}


def _recorded_arguments(module: LightningModule) -> dict[str, Any]:
    """The hyperparameters that are arguments of the constructor; as Lightning's ``load_from_checkpoint`` does."""
    expected, variadic = _arguments_of(type(module))
    recorded = {key: value for key, value in module.hparams.items() if key not in CLI_KEYS}
    # Of `save_hyperparameters(config)`, Lightning records the content and the argument's name.
    whole = getattr(module, "_hparams_name", None)
    if whole in expected and whole not in recorded:
        return {whole: recorded}
    return recorded if variadic else {key: value for key, value in recorded.items() if key in expected}


def _arguments_of(module_class: Any) -> tuple[Arguments, bool]:
    """The named arguments of a constructor, and whether it takes further keywords."""
    parameters = list(inspect.signature(module_class.__init__).parameters.values())[1:]  # without self
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {p.name: p for p in parameters if p.kind not in variadic}
    return named, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _how_recorded(recorded: Any) -> str:
    if not recorded:
        return "it does not call save_hyperparameters"
    return "save_hyperparameters leaves them out"


def _survives_json(value: Any) -> bool:
    """Whether JSON gives the value back; a tuple may come back as a list.

    Of an argument that is an object, Lightning's command line records the class path, which is another value.
    """
    if isinstance(value, dict) and "class_path" in value:
        return False
    try:
        text = json.dumps(value)
        return json.dumps(json.loads(text)) == text and _has_text_keys(value)
    except (TypeError, ValueError):
        return False


def _has_text_keys(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _has_text_keys(item) for key, item in value.items())
    return all(map(_has_text_keys, value)) if isinstance(value, list | tuple) else True


def _list(names: list[str]) -> str:
    return ", ".join(names)
