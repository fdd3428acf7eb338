"""The options of one target alone: the typed signature of its constructor is their only home.

The command line, ``--help`` and ``pqqp_lightning.export(run, to=..., out=..., **options)`` read them from there; the
meaning of each is in the ``Args`` of the class's docstring. Types: ``bool``, ``str``, ``int``, ``Literal`` of words, or
one of these ``| None``.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

import docstring_parser

from pqqp_lightning.errors import NOT_GIVEN, Problem, near_miss
from pqqp_lightning.export.target import Target

BOOLEANS = {"true": True, "false": False}
"""The values of a switch, as the command line writes them."""


@dataclass(frozen=True)
class Option:
    """An option of a target.

    Attributes:
        name: without dashes.
        kind: its type.
        default: its value where it is not given.
        meaning: for ``--help``.
    """

    name: str
    kind: Any
    default: Any
    meaning: str

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The alternatives of a union, or the one type."""
        union = typing.get_origin(self.kind) in (Union, types.UnionType)
        return typing.get_args(self.kind) if union else (self.kind,)

    @property
    def words(self) -> list[str]:
        """The values that can be chosen; empty if there is no list of them."""
        found: list[str] = []
        for kind in self.kinds:
            if typing.get_origin(kind) is Literal:
                found += typing.get_args(kind)
            elif kind is bool:
                found += BOOLEANS
        return found

    def read(self, given: Any) -> Any:
        """The value of a word of the command line, or of an argument in Python.

        Raises:
            ValueError: it has another type; the message says what is expected.
        """
        if bool in self.kinds and given in BOOLEANS:
            return BOOLEANS[given]
        if int in self.kinds and isinstance(given, str) and given.lstrip("-").isdecimal():
            return int(given)
        if any(self._is(given, kind) for kind in self.kinds):
            return given
        expected = (
            f"one of {', '.join(self.words)}" if self.words else "a whole number" if int in self.kinds else "text"
        )
        raise ValueError(f"is not {expected}")

    @staticmethod
    def _is(given: Any, kind: Any) -> bool:
        if typing.get_origin(kind) is Literal:
            return given in typing.get_args(kind)
        if kind is int:
            return isinstance(given, int) and not isinstance(given, bool)
        return isinstance(given, kind)


def options_of(cls: type[Target]) -> dict[str, Option]:
    """The options of a target by name."""
    documented = docstring_parser.parse(inspect.getdoc(cls) or "")
    meaning = {entry.arg_name: " ".join((entry.description or "").split()) for entry in documented.params}
    kinds = typing.get_type_hints(cls.__init__)
    found = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            found[name] = Option(name, kinds[name], parameter.default, meaning.get(name, ""))
    return found


def read_options(
    name: str, given: Mapping[str, Any], targets: Mapping[str, type[Target]]
) -> tuple[dict[str, Any], list[Problem]]:
    """The arguments of a target's constructor.

    Args:
        name: of the target.
        given: by option.
        targets: every target by name.

    Returns:
        The arguments, and the problem of each option that the target does not have or whose value is wrong.
    """
    options = options_of(targets[name])
    arguments: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, value in given.items():
        if key not in options:
            problems.append(_unknown(key, name, targets))
            continue
        try:
            arguments[key] = options[key].read(value)
        except ValueError as error:
            near = near_miss(str(value), options[key].words).strip()
            way_out = near or f"The default is {_shown(options[key].default)}."
            problems.append(Problem(key, value, str(error), way_out))
    return arguments, problems


def owners_of(option: str, targets: Mapping[str, type[Target]]) -> list[str]:
    """The targets that have an option."""
    return [name for name, cls in targets.items() if option in options_of(cls)]


def _unknown(option: str, name: str, targets: Mapping[str, type[Target]]) -> Problem:
    own = list(options_of(targets[name]))
    if owners := owners_of(option, targets):
        text = f"is an option of --to {' and '.join(owners)}; {name} does not have it"
        return Problem(option, NOT_GIVEN, text, f"Leave --{option} out.")
    way_out = near_miss(option, own).strip() or f"Known: {', '.join(own) or 'none of its own'}."
    return Problem(option, NOT_GIVEN, f"is not an option of --to {name}", way_out)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
