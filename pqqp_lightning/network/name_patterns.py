"""Layers by name pattern: ``targets``, ``ignore`` and per-layer knobs.

A pattern is a shell glob that matches a whole module name, its last components (``q_proj``, ``mlp.*``), or a parent
of it (``layers.0`` means everything below).
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


def value_for(name: str, knob: T | dict[str, T]) -> T | None:
    """The value of a knob for one layer: the knob itself, or that of the first pattern that matches, or None."""
    if not isinstance(knob, dict):
        return knob
    return next((value for pattern, value in knob.items() if matches(name, pattern)), None)


def values_of(knob: Any) -> list[Any]:
    """Every value of a knob: the knob itself, or those of its patterns; none of a knob that is not given."""
    if knob is None:
        return []
    return list(knob.values()) if isinstance(knob, dict) else [knob]
