"""Reads what the user set, and where: in recipes, fragments, the command line or the environment."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from pqqp_lightning.errors import Problem, suggest

COMMAND_LINE = "command line"
FRAGMENTS = ("model", "data", "trainer")
NO_VALUE = object()
ENVIRONMENT = "PQQP"
_parser_yaml = get_loader("yaml")


class DuplicateKey(yaml.MarkedYAMLError):
    """A mapping has the same key twice."""


@dataclass(frozen=True)
class Setting:
    """A value that the user gave.

    Attributes:
        where: the recipe's path, "command line", or an environment variable.
        key: dotted, as in ``stages.prune.sparsity``.
        value: plain data; NO_VALUE for an option without a value.
    """

    where: str
    key: str
    value: Any

    def sets(self, key: str) -> bool:
        """Whether this sets ``key`` (dotted, without ``init_args``)."""
        if self.path == key:
            return True
        if not key.startswith(f"{self.path}."):
            return False
        value = self.value
        for name in key.removeprefix(f"{self.path}.").split("."):
            if isinstance(value, dict) and name not in value:
                value = value.get("init_args")
            if not isinstance(value, dict) or name not in value:
                return False
            value = value[name]
        return True

    @property
    def path(self) -> str:
        """The key without ``init_args`` and ``class_path``."""
        return self.key.replace(".init_args", "").removesuffix(".class_path")


def read_settings(command: str, arguments: Sequence[str]) -> tuple[list[Setting], list[Problem]]:
    """The settings of the environment, the recipes and the command line, in this order, and what cannot be read."""
    problems: list[Problem] = []
    settings = list(_settings_of_environment(command))
    for key, value in word_pairs(arguments):
        if key in ("config", "c") and value is not None:
            settings += _settings_of_file(Path(value), problems)
        elif key == "" and value is not None:
            text = f"Unexpected argument '{value}'"
            problems.append(Problem("", value, text, _way_out(value), source=COMMAND_LINE, complete=True))
        elif value is None:
            settings.append(Setting(COMMAND_LINE, key, NO_VALUE))
        else:
            settings += _split_stages(Setting(COMMAND_LINE, key, _parse(value)))
    return settings, problems


def load_yaml(text: str) -> Any:
    """YAML as the parser reads it, except that a duplicate key is an error; the parser would keep the last value.

    Raises:
        yaml.YAMLError: not YAML, or a duplicate key.
    """
    _refuse_duplicates(yaml.compose(text, Loader=yaml.SafeLoader))
    return _parser_yaml(text)


def option(arguments: Sequence[str], name: str) -> str | None:
    """The last value of ``--name`` on the command line."""
    found = [value for key, value in word_pairs(arguments) if key == name or (name == "config" and key == "c")]
    return found[-1] if found else None


def merged_section(settings: Iterable[Setting], section: str) -> Any:
    """The value of ``section`` from all settings; a dotted key changes only its own entry."""
    merged: Any = {}
    for setting in settings:
        first, *rest = setting.key.split(".")
        if first != section or setting.value is NO_VALUE:
            continue
        if not rest:
            merged = copy.deepcopy(setting.value)
            continue
        merged = inner = merged if isinstance(merged, dict) else {}
        for name in rest[:-1]:
            inner[name] = inner = inner[name] if isinstance(inner.get(name), dict) else {}
        inner[rest[-1]] = setting.value
    return merged


def without_section(arguments: Sequence[str], section: str) -> list[str]:
    """The command line without ``--section`` and ``--section.anything``."""
    kept, pending = list[str](), list(arguments)
    while pending:
        words = [pending.pop(0)]
        key, value = next(word_pairs([*words, *pending[:1]]))
        if words[0].startswith("-") and "=" not in words[0] and value is not None:
            words.append(pending.pop(0))
        if key.split(".")[0] != section or value is None:
            kept += words
    return kept


def replaced_stages(settings: Iterable[Setting]) -> list[str]:
    """A note for every recipe whose ``stages`` replace those of an earlier recipe."""
    named: dict[str, list[str]] = {}
    for setting in settings:
        if setting.key.startswith("stages.") and setting.where.endswith((".yaml", ".yml")):
            named.setdefault(setting.where, []).append(setting.key.split(".")[1])
    return [
        f"{later}: its stages ({', '.join(named[later])}) replace those of {earlier} ({', '.join(named[earlier])})."
        for earlier, later in pairwise(named)
    ]


def stage_class_names(settings: Iterable[Setting]) -> list[str]:
    """The class names of stages that are given without a module."""
    names = []
    for setting in settings:
        parts = setting.key.split(".")
        if parts[0] == "stages" and (len(parts) == 2 or parts[2:] == ["class_path"]):
            name = setting.value.get("class_path") if isinstance(setting.value, dict) else setting.value
            if isinstance(name, str) and name.isidentifier():
                names.append(name)
    return names


def add_sources(problems: Iterable[Problem], settings: Sequence[Setting], otherwise: str) -> list[Problem]:
    """The problems with the source that set their key, or ``otherwise`` if no source did."""
    return [
        problem if problem.source else replace(problem, source=_source_of(problem.key, settings) or otherwise)
        for problem in problems
    ]


def _source_of(key: str, settings: Sequence[Setting]) -> str | None:
    """The source that set ``key`` last, or first set a key inside it, or else did so for the section around it."""
    while key:
        if setters := [setting.where for setting in settings if setting.sets(key)]:
            return setters[-1]
        if inside := [setting.where for setting in settings if setting.path.startswith(f"{key}.")]:
            return inside[0]
        key = key.rpartition(".")[0]
    return None


def word_pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(option without dashes, value) pairs of a command line; the option is empty for a word without one."""
    pending = list(arguments)
    while pending:
        word = pending.pop(0)
        if not word.startswith("-"):
            yield "", word
            continue
        key, equals, value = word.lstrip("-").partition("=")
        if equals:
            yield key, value
        elif pending and not pending[0].startswith("--"):
            yield key, pending.pop(0)
        else:
            yield key, None


def _settings_of_environment(command: str) -> Iterator[Setting]:
    prefix = f"{ENVIRONMENT}_{command.upper()}__"
    for name, value in os.environ.items():
        if name.startswith(prefix):
            yield Setting(name, name.removeprefix(prefix).lower().replace("__", "."), _parse(value))


def _settings_of_file(path: Path, problems: list[Problem]) -> Iterator[Setting]:
    content = _read_yaml(path, problems)
    if content is None:
        return
    if not isinstance(content, dict):
        text = f"is not a recipe: expected 'model:', 'data:', 'stages:' ..., but got {content!r:.60}"
        problems.append(Problem(text=text, source=str(path)))
        return
    for key, value in content.items():
        where = path
        if key in FRAGMENTS and isinstance(value, str) and value.endswith(".yaml"):
            where = Path(os.path.normpath(path.parent / value))
            value = _read_yaml(where, problems)
            if value is None:
                continue
        yield from _split_stages(Setting(str(where), str(key), value))


def _read_yaml(path: Path, problems: list[Problem]) -> Any:
    """The content of a recipe or fragment; None if it cannot be read, and ``problems`` gets the reason."""

    def refuse(text: str, way_out: str = "") -> None:
        problems.append(Problem(text=text, way_out=way_out, source=str(path)))

    if path.is_dir():
        inside = [file.name for file in sorted(path.glob("*.yaml"))]
        refuse("is a folder", f"Name a file in it: {path / inside[0]}." if inside else "It has no recipe.")
        return None
    if not path.is_file():
        near = suggest(path.name, [file.name for file in path.parent.glob("*.yaml")]) if path.parent.is_dir() else ""
        refuse("there is no such file", near.strip())
        return None
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        refuse(f"cannot be read: {error.strerror}", "Make it readable.")
    except UnicodeDecodeError as error:
        refuse(f"is not UTF-8 text (byte {error.start + 1})", "Save it as UTF-8.")
    except yaml.YAMLError as error:
        mark, reason = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        if isinstance(error, DuplicateKey):
            refuse(f"{at}{reason}", "Rename one.")
        else:
            refuse(f"{at}is not YAML: {reason}")
    return None


def _way_out(word: str) -> str:
    """What the user may have meant by a word that is not an option."""
    if word.endswith((".yaml", ".yml")):
        return f"Give a recipe with --config {word}."
    if word.endswith(("]", "}", ",")):
        return "Quote a value that has blanks, as in '[0.5, 0.7]'."
    if Path(word).is_dir():
        return f"Name a run folder with --run_dir {word}."
    return "Options start with --."


def _refuse_duplicates(node: Any) -> None:
    """Raise :class:`DuplicateKey` if a mapping at or below ``node`` has a key twice; merge keys may repeat."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key.value, str) and key.value != "<<":
                if key.value in seen:
                    raise DuplicateKey(None, None, f"Duplicate key '{key.value}'", key.start_mark)
                seen.add(key.value)
            _refuse_duplicates(value)


def _split_stages(setting: Setting) -> Iterator[Setting]:
    if setting.key == "stages" and isinstance(setting.value, dict):
        for name, value in setting.value.items():
            yield Setting(setting.where, f"stages.{name}", value)
    else:
        yield setting


def _parse(value: str) -> Any:
    try:
        return load_yaml(value)
    except yaml.YAMLError:
        return value
