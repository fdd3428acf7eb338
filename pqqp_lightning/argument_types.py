"""The types of arguments: in words for people, and whether a value that Python code passes has one."""

from __future__ import annotations

import os
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np

from pqqp_lightning.errors import Problem, RecipeError

WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null", Any: "a value"}


def wrong_types(function: Callable[..., Any], given: Mapping[str, Any]) -> list[Problem]:
    """The problem of each argument whose value does not have the type that the signature says.

    Python itself does not enforce a signature: the text "false" would count as true. Which word of a ``Literal`` it
    is, where the type is nothing else, is left to other checks, and functions are not checked.

    Args:
        function: with annotations; a class's ``__init__``.
        given: values by argument; those that the function does not have are passed over.
    """
    try:
        kinds = typing.get_type_hints(function)
    except NameError:  # of a third party, imported for type checkers alone
        return []
    problems = []
    for name, value in given.items():
        if name in kinds and not _has_type(value, kinds[name]):
            way_out = "Leave the quotes out." if isinstance(value, str) and _is_plain(value) else ""
            expected = in_words(kinds[name])
            text = f"should be one of {expected}" if get_origin(kinds[name]) is Literal else f"should be {expected}"
            problems.append(Problem(name, value, text, way_out))
    return problems


def refuse_wrong_types(function: Callable[..., Any], given: Mapping[str, Any], section: str = "") -> None:
    """Raise the problems that :func:`wrong_types` finds; ``section`` of the recipe is where they belong.

    Raises:
        RecipeError: with every value of another type.
    """
    if problems := wrong_types(function, given):
        raise RecipeError([problem.within(section) for problem in problems] if section else problems)


def path_problems(**given: Any) -> list[Problem]:
    """The problem of each argument that is not a path, or empty: an empty path would name the current folder."""
    problems = []
    for name, value in given.items():
        if not isinstance(value, str | os.PathLike) or not str(value).strip():
            way_out = "Name a run folder, such as runs/quickstart." if name == "run" else f"Write --{name} PATH."
            problems.append(Problem(name, value, "is not a path", way_out))
    return problems


def in_words(kind: Any) -> str:
    """A type for people: ``"a number, {name: a number} or null"``."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        parts = list(dict.fromkeys(in_words(part) for part in inner))
        return " or ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    if origin is Literal:
        return ", ".join(map(repr, inner))
    if origin is dict:
        return f"{{name: {in_words(inner[1])}}}"
    if origin in (list, Sequence):
        return f"[{in_words(inner[0])}, ...]"
    return WORDS.get(kind) or str(getattr(kind, "__name__", kind))


def parts_of(kind: Any) -> Iterator[Any]:
    """The type, and the types and values inside it."""
    yield kind
    for inner in get_args(kind):
        yield from parts_of(inner)


def choices(kind: Any) -> list[Any]:
    """The values of the ``Literal`` types in a type."""
    return [value for part in parts_of(kind) if get_origin(part) is Literal for value in get_args(part)]


def _has_type(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(value in get_args(part) if get_origin(part) is Literal else _has_type(value, part) for part in inner)
    if origin is Literal:
        return any(_has_type(value, type(word)) for word in inner)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(_has_type(entry, inner[1]) for entry in value.values())
    if origin in (list, Sequence):
        several = isinstance(value, Sequence) and not isinstance(value, str)
        return several and all(_has_type(entry, inner[0]) for entry in value)
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind in (str, NoneType):
        return isinstance(value, kind)
    if isinstance(kind, type) and kind is not Any and not getattr(kind, "_is_protocol", False):
        return isinstance(value, os.PathLike if issubclass(kind, os.PathLike) else kind)
    return True


def _is_plain(text: str) -> bool:
    """Whether the text is a number, true, false or null in quotes."""
    if text.lower() in ("true", "false", "none", "null"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
