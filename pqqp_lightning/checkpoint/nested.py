"""Nested batches and outputs (tuples, lists, dictionaries, dataclasses) as tensors and plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

PLAIN = (bool, int, float, str, type(None))


class CannotStore(Exception):
    """A value that tensors and plain data cannot express; says which."""


def describe(value: Any, tensors: list[Tensor]) -> Any:
    """Describe ``value`` as JSON; its tensors are appended to ``tensors``.

    A dictionary of another class (a tokenizer's) is described as a plain one.

    Raises:
        CannotStore: it holds something else.
    """
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return {"tensor": len(tensors) - 1}
    if isinstance(value, PLAIN):
        return {"value": value}
    if isinstance(value, Mapping):
        return {"dict": [[describe(key, tensors), describe(item, tensors)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [describe(item, tensors) for item in value]}
    raise CannotStore(f"it holds a {type(value).__name__}")


def rebuild(described: Any, tensors: list[Tensor]) -> Any:
    """The value that :func:`describe` described."""
    ((kind, content),) = described.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "value":
        return content
    if kind == "dict":
        return {rebuild(key, tensors): rebuild(item, tensors) for key, item in content}
    items = [rebuild(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``function`` applied to each of its tensors."""
    tensors: list[Tensor] = []
    described = describe(value, tensors)
    return rebuild(described, [function(tensor) for tensor in tensors])


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in an output of any form, in order; whatever else it holds is passed over."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
