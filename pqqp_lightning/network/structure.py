"""The structure of a model without its weights: to look ahead at what stages will make of it, and to go back to it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def copy_model(model: Model) -> Model:
    """A deep copy that belongs to no trainer."""
    with _detached(model):
        return copy.deepcopy(model)


def weightless_copy(model: Model) -> Model:
    """A deep copy whose parameters and saved buffers are on the meta device: its size does not matter.

    Buffers that are not saved (rotary frequencies) are copied, since nothing else could bring them back.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = nn.Parameter(_on_meta(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                memo.setdefault(id(buffer), _on_meta(buffer))
    with _detached(model):
        return copy.deepcopy(model, memo)


class Skeleton:
    """What the modules of ``model`` were when this was made, weights aside.

    Args:
        model: its children may be changed or replaced afterwards; the model itself stays the same object.
    """

    def __init__(self, model: nn.Module) -> None:
        self._copy = weightless_copy(model)

    def restore(self, model: nn.Module) -> None:
        """Give ``model`` its first modules again; what their weights hold does not matter."""
        fresh = weightless_copy(self._copy)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        for module in fresh.modules():
            stores: list[dict[str, Any]] = [module._parameters, module._buffers]
            for tensors in stores:
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_meta:
                        tensors[name] = _materialized(tensor, device)
        _tie_again(self._copy, fresh)
        model._modules.clear()
        model._modules.update(fresh._modules)


def _materialized(tensor: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _tie_again(original: nn.Module, fresh: nn.Module) -> None:
    """Parameters that are one in ``original`` become one in ``fresh``."""
    first: dict[int, Any] = {}
    for old, new in zip(original.modules(), fresh.modules(), strict=True):
        for name, parameter in old._parameters.items():
            if parameter is not None:
                new._parameters[name] = first.setdefault(id(parameter), new._parameters[name])


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


@contextmanager
def _detached(model: nn.Module) -> Iterator[None]:
    """Without the trainer that a LightningModule is attached to."""
    kept: dict[str, Any] = {name: vars(model)[name] for name in ("_trainer", "_fabric") if name in vars(model)}
    vars(model).update(dict.fromkeys(kept))
    try:
        yield
    finally:
        vars(model).update(kept)


def class_path(instance: object) -> str:
    """The dotted path of an object's class."""
    return dotted_name(type(instance))


def dotted_name(found: type) -> str:
    """The dotted path of a class."""
    return f"{found.__module__}.{found.__qualname__}"
