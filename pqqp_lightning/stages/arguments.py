"""A stage's arguments, as its constructor declares them: names, types, defaults, meaning."""

from __future__ import annotations

import copy
import inspect
from argparse import ArgumentError
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from types import NoneType
from typing import Any

import docstring_parser
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from pqqp_lightning.argument_types import choices, in_words, parts_of, wrong_types
from pqqp_lightning.errors import Problem, near_miss

STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def arguments_of(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of a stage class: those of its constructor, and those that ``**kwargs`` passes to its bases."""
    found: dict[str, inspect.Parameter] = {}
    for parameters in _constructors(cls):
        for parameter in parameters:
            if parameter.kind not in STARRED:
                found.setdefault(parameter.name, parameter)
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def argument_values(stage: object) -> dict[str, Any]:
    """The arguments of a stage as plain data, for records: those that are attributes of the same name.

    They include arguments of its bases that its own constructor does not have (``targets`` of ``Finetune``).
    """
    values: dict[str, Any] = {}
    for parameters in _constructors(type(stage)):
        for parameter in parameters:
            if parameter.kind not in STARRED and parameter.name in vars(stage):
                value = vars(stage)[parameter.name]
                plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
                values.setdefault(parameter.name, plain)
    return values


def documentation(cls: type) -> dict[str, str]:
    """The meaning of each argument, from the docstrings of the class and its bases."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        for text in (vars(base).get("__doc__"), getattr(vars(base).get("__init__"), "__doc__", None)):
            for parameter in docstring_parser.parse(text or "").params:
                found.setdefault(parameter.arg_name, (parameter.description or "").replace("\n", " "))
    return found


def argument_value(cls: type, name: str, value: Any) -> Any:
    """``value`` converted for the argument ``name`` of the constructor of ``cls``, as in a recipe.

    Raises:
        ValueError: the value has another type; the message says what is expected.
    """
    (action,) = (action for action in parser_of(cls)._actions if action.dest == name)
    kind = getattr(action, "_typehint", None)
    if value is None and not takes_null(action):
        raise ValueError(f"{in_words(kind)}.")
    # a parser of this argument alone, because the others may be required
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        return parser.instantiate_classes(parser.parse_object({"value": copy.deepcopy(value)})).value
    except ArgumentError as error:
        raise ValueError(f"{in_words(kind)}.{near_miss(str(value), map(str, choices(kind)))}") from error


def parser_of(cls: type) -> ArgumentParser:
    """A parser of the constructor's arguments."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, None, fail_untyped=False, sub_configs=True)
    return parser


def takes_null(action: Any) -> bool:
    """Whether the type or the default of an argument allows null. The parser itself accepts null for any type."""
    kind = getattr(action, "_typehint", None)
    optional = action.default is None and not getattr(action, "required", False)
    return optional or kind in (None, Any) or any(part in (None, NoneType) for part in parts_of(kind))


def required(cls: type) -> list[str]:
    """The arguments that have no default."""
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in STARRED]


def argument_problems(stage: object) -> list[Problem]:
    """The problems of a stage's arguments whose values have another type than its constructor says."""
    problems: list[Problem] = []
    seen: set[str] = set()
    for base in type(stage).__mro__:
        if "__init__" not in vars(base) or not issubclass(base, Callback):
            continue
        own = {name: value for name, value in vars(stage).items() if name not in seen}
        problems += wrong_types(base.__init__, own)  # type: ignore[misc]
        seen |= set(inspect.signature(base.__init__).parameters)  # type: ignore[misc]  # a base may say another type
    return problems


def _constructors(cls: type) -> Iterator[list[inspect.Parameter]]:
    """The constructor parameters, without ``self``, of the class and of each of its bases that is a Callback."""
    for base in cls.__mro__:
        if "__init__" in vars(base) and issubclass(base, Callback):
            yield list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
