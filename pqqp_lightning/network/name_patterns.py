"""Selection of layers by name pattern: ``targets``, ``ignore`` and arguments per layer.

A pattern is a shell glob that matches a whole module name, its last components (``q_proj``, ``mlp.*``), or one of its
parents (``layers.0`` selects everything below it).
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

T = TypeVar("T")


def matches(name: str, pattern: str) -> bool:
    """Whether a module ``name`` matches ``pattern``."""
    return any(fnmatchcase(name, p) for p in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*"))


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether ``name`` matches one of ``patterns``."""
    return any(matches(name, p) for p in patterns)


def value_for(name: str, argument: T | dict[str, T]) -> T | None:
    """Return an argument's value for one layer; of a dict, the value of the first pattern that matches, or None."""
    if not isinstance(argument, dict):
        return argument
    return next((value for pattern, value in argument.items() if matches(name, pattern)), None)


def values_of(argument: Any) -> list[Any]:
    """Return every value of an argument: the argument itself, or the values of its patterns; empty for None."""
    if argument is None:
        return []
    return list(argument.values()) if isinstance(argument, dict) else [argument]
