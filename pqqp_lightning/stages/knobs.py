"""A stage's arguments, as its constructor declares them: names, types, defaults, meaning."""

from __future__ import annotations

import copy
import inspect
from argparse import ArgumentError
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import docstring_parser
from jsonargparse import ArgumentParser

from pqqp_lightning.errors import near_miss
from pqqp_lightning.stages.stage import Stage

WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null", Any: "a value"}


def knobs(cls: type[Stage]) -> dict[str, inspect.Parameter]:
    """A stage's knobs: the parameters of its constructor, those passed on to its bases included."""
    found: dict[str, inspect.Parameter] = {}
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for base in cls.__mro__:
        if "__init__" not in vars(base) or not issubclass(base, Stage):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in kinds:
                found.setdefault(parameter.name, parameter)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return found


def documentation(cls: type[Stage]) -> dict[str, str]:
    """The meaning of each knob, from the docstrings of the class and its bases."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        for text in (vars(base).get("__doc__"), getattr(vars(base).get("__init__"), "__doc__", None)):
            for parameter in docstring_parser.parse(text or "").params:
                found.setdefault(parameter.arg_name, (parameter.description or "").replace("\n", " "))
    return found


def knob_value(cls: type, knob: str, value: Any) -> Any:
    """``value`` as the constructor of ``cls`` takes it for ``knob``, converted as in a recipe.

    Raises:
        ValueError: it does not take it; the words say what it expects.
    """
    (action,) = (action for action in _parser_of(cls)._actions if action.dest == knob)
    kind = getattr(action, "_typehint", None)
    if value is None and not _takes_null(action):
        raise ValueError(f"{_in_words(kind)}.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        return parser.instantiate_classes(parser.parse_object({"value": copy.deepcopy(value)})).value
    except ArgumentError as error:
        raise ValueError(f"{_in_words(kind)}.{near_miss(str(value), map(str, _choices(kind)))}") from error


def _parser_of(cls: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, None, fail_untyped=False, sub_configs=True)
    return parser


def _takes_null(action: Any) -> bool:
    """Whether a knob may be null: its type or its default says so. The parser itself takes null for anything."""
    kind = getattr(action, "_typehint", None)
    optional = action.default is None and not getattr(action, "required", False)
    return optional or kind in (None, Any) or any(part in (None, NoneType) for part in _parts(kind))


def _required(cls: type) -> list[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]


def _in_words(kind: Any) -> str:
    """A type for people: ``"a number, {name: a number} or null"``."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        parts = list(dict.fromkeys(_in_words(part) for part in inner))
        return " or ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
    if origin is Literal:
        return ", ".join(map(repr, inner))
    if origin is dict:
        return f"{{name: {_in_words(inner[1])}}}"
    if origin is list:
        return f"[{_in_words(inner[0])}, ...]"
    return WORDS.get(kind) or str(getattr(kind, "__name__", kind))


def _parts(kind: Any) -> Iterator[Any]:
    """The types and values that a type is made of."""
    yield kind
    for inner in get_args(kind):
        yield from _parts(inner)


def _choices(kind: Any) -> list[Any]:
    return [value for part in _parts(kind) if get_origin(part) is Literal for value in get_args(part)]
