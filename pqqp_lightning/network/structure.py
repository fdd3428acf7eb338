"""The structure of a model without its weights: to predict what stages will change, and to restore it afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
Found = TypeVar("Found")


class _Findings(dict[Hashable, Any]):
    """What was found out about a model's structures. A class of its own, since a plain dict has no weak references."""


_findings: WeakKeyDictionary[nn.Module, _Findings] = WeakKeyDictionary()
"""The findings of each model, which it shares with its weightless copies."""


def copy_model(model: Model) -> Model:
    """Return a deep copy that is not attached to a trainer."""
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in _computed_tensors(model)}
    with _detached(model):
        return copy.deepcopy(model, memo)


def weightless_copy(model: Model) -> Model:
    """Return a deep copy with parameters and saved buffers on the meta device, which takes no memory for them.

    Buffers that are not saved (rotary frequencies) are copied, since no checkpoint could restore them.
    """
    # deepcopy takes its results from here instead of copying
    memo: dict[int, Any] = {id(tensor): _on_meta(tensor.detach()) for tensor in _computed_tensors(model)}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = nn.Parameter(_on_meta(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                memo.setdefault(id(buffer), _on_meta(buffer))
    with _detached(model):
        copied = copy.deepcopy(model, memo)
    _findings[copied] = _findings_of(model)
    return copied


def find_once(model: nn.Module, question: Hashable, find: Callable[[], Found]) -> Found:
    """What ``find`` returns for the structure that ``model`` has now.

    It is called once for each structure of the model and of its weightless copies: the modules, and the shapes and the
    sharing of their parameters.

    Args:
        model: may get another structure afterwards.
        question: what is asked about the structure.
        find: must depend on the structure and the question alone, and return a value that nobody changes.
    """
    known, key = _findings_of(model), (question, _structure_of(model))
    if key not in known:
        known[key] = find()
    return known[key]


def _findings_of(model: nn.Module) -> _Findings:
    return _findings.setdefault(model, _Findings())


def _structure_of(model: nn.Module) -> Hashable:
    numbers: dict[int, int] = {}  # a parameter that two modules share has one number
    structure: list[Hashable] = []
    for name, module in model.named_modules():
        shapes = []
        for key, parameter in module._parameters.items():
            if parameter is not None:
                shapes.append((key, parameter.shape, numbers.setdefault(id(parameter), len(numbers))))
        structure.append((name, type(module), tuple(shapes)))
    return tuple(structure)


class Skeleton:
    """Remembers the modules of ``model`` without their weights, and restores them.

    Args:
        model: its children may be changed or replaced afterwards; the model itself stays the same object.
    """

    def __init__(self, model: nn.Module) -> None:
        self._copy = weightless_copy(model)

    def restore(self, model: nn.Module) -> None:
        """Give ``model`` its original modules again, with uninitialised weights."""
        fresh = weightless_copy(self._copy)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        for module in fresh.modules():
            stores: list[dict[str, Any]] = [module._parameters, module._buffers]
            for tensors in stores:
                for name, tensor in tensors.items():
                    if tensor is None or not tensor.is_meta:
                        continue
                    empty = torch.empty_like(tensor, device=device)
                    if isinstance(tensor, nn.Parameter):
                        # Not into the dict: an LSTM keeps its parameters in a list as well.
                        setattr(module, name, nn.Parameter(empty, requires_grad=tensor.requires_grad))
                    else:
                        tensors[name] = empty
        _tie_again(self._copy, fresh)
        model._modules.clear()
        model._modules.update(fresh._modules)


def _tie_again(original: nn.Module, fresh: nn.Module) -> None:
    """Share each parameter in ``fresh`` that is shared in ``original``."""
    shared: dict[int, Any] = {}
    for old, new in zip(original.modules(), fresh.modules(), strict=True):
        for name, parameter in old._parameters.items():
            if parameter is not None:
                setattr(new, name, shared.setdefault(id(parameter), new._parameters[name]))


def _computed_tensors(model: nn.Module) -> Iterator[Tensor]:
    """The attributes that torch's older hooks compute anew in every forward pass, and that deepcopy refuses."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                yield value


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


@contextmanager
def _detached(model: nn.Module) -> Iterator[None]:
    """Detach a LightningModule from its trainer inside the context: a copy must not drag the trainer along."""
    references: dict[str, Any] = {name: vars(model)[name] for name in ("_trainer", "_fabric") if name in vars(model)}
    vars(model).update(dict.fromkeys(references))
    try:
        yield
    finally:
        vars(model).update(references)


def class_path(instance: object) -> str:
    """Return the dotted path of an object's class."""
    return dotted_name(type(instance))


def dotted_name(cls: type) -> str:
    """Return the dotted path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"
