"""Checks sections that name a class and its arguments (a stage, the model, the data, the trainer)."""

from __future__ import annotations

import copy
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass, replace
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from pqqp_lightning.argument_types import WORDS, choices, in_words, parts_of
from pqqp_lightning.cli.settings import Setting, add_sources
from pqqp_lightning.errors import Problem, RecipeError, near_miss, suggest
from pqqp_lightning.stages.arguments import parser_of, required, takes_null
from pqqp_lightning.stages.stage import Stage

PARSER_OPTIONS = {"print_config", "help", "h", "print_shtab", "config"}
"""Options that jsonargparse adds to every parser."""


def check_class(
    settings: Sequence[Setting], key: str, bases: tuple[type, ...], known: dict[str, type], *, complete: bool = True
) -> list[Problem]:
    """The problems of a section: its class, and the names and types of its arguments.

    Args:
        settings: the settings of the section.
        key: the key of the section.
        bases: the class must be a subclass of one of these.
        known: classes that may be given by bare name.
        complete: whether every required argument must be given.
    """
    problems: list[Problem] = []
    cls: type | None = None
    depth, first = len(key.split(".")), settings[0].where
    arguments: list[Setting] = []
    for setting in settings:
        if setting.key == key and setting.value is None:
            way_out = "Give a class, or leave it out."
            problems.append(Problem(key, None, f"{key} is null", way_out, source=setting.where, complete=True))
        name, given = _class_and_arguments(setting.key.split(".")[depth:], setting.value)
        if name is not None:
            found = _resolve(name, bases, known)
            if isinstance(found, Problem):
                problems.append(replace(found.within(key), source=setting.where))
            else:
                cls = found
        arguments += [Setting(setting.where, argument, value) for argument, value in given.items()]
    if cls is None:
        way_out = f"Known: {', '.join(sorted(known))}."
        return problems or [Problem(key, text="class_path is missing", way_out=way_out, section=key, source=first)]
    problems += check_arguments(cls, key, cls.__name__, arguments)
    if complete:
        for name in required(cls):
            if name not in {argument.key for argument in arguments}:
                problem = Problem(name, text="is required", way_out="Add it.", source=first)
                problems.append(problem.within(key, cls.__name__))
    # only a class with valid arguments can be created and asked
    return problems or add_sources(_own_problems(cls, key, arguments), settings, first)


def _class_and_arguments(names: list[str], value: Any) -> tuple[str | None, dict[str, Any]]:
    """The class and the arguments in a setting; ``names`` is its key relative to the section."""
    if not names:
        if isinstance(value, dict):
            outer = {k: v for k, v in value.items() if k not in ("class_path", "init_args", "dict_kwargs")}
            return value.get("class_path"), {**outer, **(value.get("init_args") or {})}
        return (str(value) if value is not None else None), {}
    if names == ["class_path"]:
        return str(value), {}
    if names[0] == "init_args":
        names = names[1:]
    if not names:
        return None, value if isinstance(value, dict) else {}
    return None, {".".join(names): value}


def _resolve(name: str, bases: tuple[type, ...], known: dict[str, type]) -> type | Problem:
    """The class, or the problem of its name."""
    if name in known:
        return known[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        return Problem("", name, f"Unknown class '{name}'", suggest(name, known).strip(), complete=True)
    try:
        found = getattr(__import__(module, fromlist=[attribute]), attribute)
    except Exception as error:  # a user's module may raise anything
        reason = f"'{name}' cannot be imported: {type(error).__name__}: {error}"
        return Problem("", name, reason, near_miss(attribute, known).strip(), complete=True)
    if not (isinstance(found, type) and issubclass(found, bases)):
        expected = " or ".join(base.__name__ for base in bases)
        return Problem("", name, f"'{name}' is not a {expected}", complete=True)
    return found


def check_arguments(cls: type, section: str, owner: str, arguments: Sequence[Setting]) -> list[Problem]:
    """The problems of the names and types of arguments.

    Args:
        cls: the class with the constructor.
        section: the key of the section.
        owner: the class's name in messages; empty if the section already names it.
        arguments: with keys relative to the section.
    """
    parser = parser_of(cls)
    kinds = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    names = {name for name in kinds if name not in PARSER_OPTIONS and "." not in name}
    problems: list[Problem] = []
    for argument in arguments:
        if "." in argument.key:
            problems += _check_field(argument, section, kinds)
        elif argument.key not in names:
            text, way_out = f"Unknown argument '{argument.key}'", suggest(argument.key, names).strip()
            unknown = Problem(argument.key, argument.value, text, way_out, source=argument.where, complete=True)
            problems.append(unknown.within(section, owner))
        elif not accepts(parser, argument):
            kind = kinds[argument.key]
            inside = _check_classes_inside(argument, section, kind)
            problems += inside or [wrong_value(argument, kind).within(section, owner)]
    return problems


def wrong_value(setting: Setting, kind: Any) -> Problem:
    """The problem of a value that is not of the type ``kind``."""
    way_out = near_miss(str(setting.value), map(str, choices(kind))).strip()
    plain_list = any(get_origin(part) is list and get_args(part)[0] in WORDS for part in parts_of(kind))
    if plain_list and isinstance(setting.value, str | int | float):
        way_out = f"Write [{setting.value}]."
    expected = f"one of {in_words(kind)}" if get_origin(kind) is Literal else in_words(kind)
    return Problem(setting.key, setting.value, f"should be {expected}", way_out, source=setting.where)


def accepts(parser: ArgumentParser, setting: Setting) -> bool:
    """Whether the parser accepts the value. The parser accepts null for any type; here the type decides."""
    action = next((action for action in parser._actions if action.dest == setting.key), None)
    if setting.value is None and action is not None and not takes_null(action):
        return False
    try:
        parser.parse_object({setting.key: copy.deepcopy(setting.value)})  # it changes its argument
    except ArgumentError as error:
        return f'"{setting.key}"' not in str(error)  # otherwise the error is about a missing argument
    return True


def _check_field(argument: Setting, section: str, kinds: dict[str, Any]) -> list[Problem]:
    """The problems of one field of an argument that is a dataclass, as in ``distill.weight``."""
    name, _, field = argument.key.partition(".")
    problems: list[Problem] = []
    for part in parts_of(kinds.get(name)):
        if isinstance(part, type) and is_dataclass(part):
            fields = [Setting(argument.where, field, argument.value)]
            problems += check_arguments(part, f"{section}.{name}", part.__name__, fields)
    return problems


def _check_classes_inside(argument: Setting, section: str, kind: Any) -> list[Problem]:
    """The problems of the classes in an argument: callbacks, a logger, an optimizer, a dataclass."""
    bases = tuple(part for part in parts_of(kind) if isinstance(part, type) and part not in WORDS)
    known = {cls.__name__: cls for base in bases for cls in (base, *subclasses(base))}
    if not known:
        return []
    plain = next((base.__name__ for base in bases if is_dataclass(base)), None)
    complete = get_origin(kind) is not Callable  # the caller of the callable gives the other arguments
    key = f"{section}.{argument.key}"
    problems: list[Problem] = []
    for value in argument.value if isinstance(argument.value, list) else [argument.value]:
        if not isinstance(value, dict):
            continue
        if plain is not None:  # a recipe does not name the dataclass
            value = {"class_path": plain} | value
        if "class_path" in value:
            problems += check_class([Setting(argument.where, key, value)], key, bases, known, complete=complete)
    return problems


def _own_problems(cls: type, section: str, arguments: Sequence[Setting]) -> list[Problem]:
    """The problems that a stage or datamodule finds in its own arguments, if it can be created."""
    if not issubclass(cls, Stage | LightningDataModule):
        return []
    try:
        parser = parser_of(cls)
        values = parser.parse_object({a.key: copy.deepcopy(a.value) for a in arguments})
        instance = cls(**parser.instantiate_classes(values).as_dict())  # options in a dict become their dataclass
        if isinstance(instance, Stage):
            found = RecipeError(instance.check_arguments()).problems
            return [problem.within(section, cls.__name__) for problem in found]
        found = RecipeError(instance.check() if hasattr(instance, "check") else []).problems
        return [p.within(section, cls.__name__) if p.key and not p.section else p for p in found]
    except RecipeError as error:
        return error.problems
    except Exception:  # building the run reports it, with its traceback
        return []


def subclasses(base: type) -> Iterator[type]:
    """All subclasses, at any depth."""
    cls: type
    for cls in base.__subclasses__():
        yield cls
        yield from subclasses(cls)
