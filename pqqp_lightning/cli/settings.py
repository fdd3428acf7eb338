"""What the user set, and where: recipes, their fragments, the command line and the environment, read plainly."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from pqqp_lightning.errors import suggest

COMMAND_LINE = "command line"
FRAGMENTS = ("model", "data", "trainer")
FLAGS = {"print_config", "help", "h", "print_shtab"}
NO_VALUE = object()
ENVIRONMENT = "PQQP"
_parser_yaml = get_loader("yaml")
_SUBJECT = re.compile(r"(?P<section>\w+(?:\.[\w-]+)?)(?: \(\w+\))?: ")
_KNOB = re.compile(r"\b(?P<knob>[\w.]+)(?:=|: )")


class DuplicateKey(yaml.MarkedYAMLError):
    """A key stands twice in one mapping."""


@dataclass(frozen=True)
class Setting:
    """A value that the user gave.

    Attributes:
        where: the recipe's path, "command line", or an environment variable.
        key: dotted, as in ``stages.prune.sparsity``.
        value: plain data; NO_VALUE of an option that stands alone.
    """

    where: str
    key: str
    value: Any

    def sets(self, key: str) -> bool:
        """Whether this gives ``key`` (dotted, without ``init_args``) a value."""
        return any(leaf == key or leaf.startswith(f"{key}.") for leaf in _leaves(self.key, self.value))


def read_settings(command: str, arguments: Sequence[str]) -> tuple[list[Setting], list[str]]:
    """What the environment, the recipes and the command line set, in this order, and what cannot be read."""
    problems: list[str] = []
    settings = list(_settings_of_environment(command))
    for key, value in _pairs(arguments):
        if key in ("config", "c") and value is not None:
            settings += _settings_of_file(Path(value), problems)
        elif key == "" and value is not None:
            problems.append(f"{COMMAND_LINE}: '{value}' belongs to no option. {_instead(value)}")
        elif value is None:
            settings.append(Setting(COMMAND_LINE, key, NO_VALUE))
        else:
            settings += _split_stages(Setting(COMMAND_LINE, key, _parse(value)))
    return settings, problems


def load_yaml(text: str) -> Any:
    """YAML as the parser reads it, but a key that stands twice in a mapping is an error: YAML keeps the last alone.

    Raises:
        yaml.YAMLError: no YAML, or a key stands twice.
    """
    _refuse_duplicates(yaml.compose(text, Loader=yaml.SafeLoader))
    return _parser_yaml(text)


def recipe_name(arguments: Sequence[str]) -> str | None:
    """The last recipe on the command line."""
    return option(arguments, "config")


def option(arguments: Sequence[str], name: str) -> str | None:
    """The last value of ``--name`` on the command line."""
    found = [value for key, value in _pairs(arguments) if key == name or (name == "config" and key == "c")]
    return found[-1] if found else None


def merged_section(settings: Iterable[Setting], section: str) -> Any:
    """What the settings make of ``section`` together: a dotted key changes its own place alone."""
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
        key, value = next(_pairs([*words, *pending[:1]]))
        if words[0].startswith("-") and "=" not in words[0] and value is not None:
            words.append(pending.pop(0))
        if key.split(".")[0] != section or value is None:
            kept += words
    return kept


def replaced_stages(settings: Iterable[Setting]) -> list[str]:
    """A note for every recipe whose ``stages`` take the place of an earlier recipe's."""
    named: dict[str, list[str]] = {}
    for setting in settings:
        if setting.key.startswith("stages.") and setting.where.endswith((".yaml", ".yml")):
            named.setdefault(setting.where, []).append(setting.key.split(".")[1])
    return [
        f"{later}: its stages ({', '.join(named[later])}) replace those of {earlier} ({', '.join(named[earlier])})."
        for earlier, later in pairwise(named)
    ]


def stage_class_names(settings: Iterable[Setting]) -> list[str]:
    """The bare class names that are given to stages."""
    names = []
    for setting in settings:
        parts = setting.key.split(".")
        if parts[0] == "stages" and (len(parts) == 2 or parts[2:] == ["class_path"]):
            name = setting.value.get("class_path") if isinstance(setting.value, dict) else setting.value
            if isinstance(name, str) and name.isidentifier():
                names.append(name)
    return names


def place(problems: Iterable[str], settings: Sequence[Setting], otherwise: str) -> list[str]:
    """Each problem once, with the place where its value was set in front of it; ``otherwise`` if none is found."""
    return list(dict.fromkeys(f"{_where(problem, settings) or otherwise}: {problem}" for problem in map(str, problems)))


def _where(problem: str, settings: Sequence[Setting]) -> str | None:
    """Of ``"section (Class): ... knob=value ..."``: who set the knob last, or a knob that is mentioned; else who set
    the section first."""
    found = _SUBJECT.match(problem)
    knob = _KNOB.search(problem, found.end() if found else 0)
    section = found["section"] if found else None
    name = knob["knob"] if knob else ""
    for key in (f"{section}.{name}", f"{name}.{name}", name):
        if places := [s.where for s in settings if s.sets(key)]:
            return places[-1]
    own = [s for s in settings if section and s.sets(section)]
    words = set(re.findall(r"\w+", problem))
    if places := [s.where for s in own if any(leaf.rpartition(".")[2] in words for leaf in _leaves(s.key, s.value))]:
        return places[-1]
    return own[0].where if own else None


def _leaves(key: str, value: Any) -> Iterator[str]:
    key = key.replace(".init_args", "")
    if not isinstance(value, dict) or not value:
        yield key
        return
    for name, inner in value.items():
        yield from _leaves(key if name == "init_args" else f"{key}.{name}", inner)


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(option, value) pairs of a command line, options without their dashes."""
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


def _settings_of_file(path: Path, problems: list[str]) -> Iterator[Setting]:
    content = _read_yaml(path, problems)
    if content is None:
        return
    if not isinstance(content, dict):
        problems.append(f"{path}: is not a recipe: expected 'model:', 'data:', 'stages:' ..., got {content!r:.60}.")
        return
    for key, value in content.items():
        where = path
        if key in FRAGMENTS and isinstance(value, str) and value.endswith(".yaml"):
            where = Path(os.path.normpath(path.parent / value))
            value = _read_yaml(where, problems)
            if value is None:
                continue
        yield from _split_stages(Setting(str(where), str(key), value))


def _read_yaml(path: Path, problems: list[str]) -> Any:
    if path.is_dir():
        inside = [f.name for f in sorted(path.glob("*.yaml"))]
        hint = f"Name a file in it: {path / inside[0]}." if inside else "It holds no recipe."
        problems.append(f"{path}: is a folder. {hint}")
        return None
    if not path.is_file():
        near = suggest(path.name, [f.name for f in path.parent.glob("*.yaml")]) if path.parent.is_dir() else ""
        problems.append(f"{path}: there is no such file.{near}")
        return None
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}. Make it readable.")
        return None
    except UnicodeDecodeError as error:
        problems.append(f"{path}: is no UTF-8 text (byte {error.start + 1}). Save it as UTF-8.")
        return None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problems.append(f"{path}: {at}{problem if isinstance(error, DuplicateKey) else f'is not YAML: {problem}'}.")
        return None


def _instead(word: str) -> str:
    """How a word that stands alone may have been meant."""
    if word.endswith((".yaml", ".yml")):
        return f"A recipe is given with --config {word}."
    if word.endswith(("]", "}", ",")):
        return "Quote a value that holds blanks, as in '[0.5, 0.7]'."
    return "Options start with --."


def _refuse_duplicates(node: Any) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key.value, str) and key.value != "<<":
                if key.value in seen:
                    problem = f"'{key.value}' stands there for the second time, and only one would count. Rename one"
                    raise DuplicateKey(None, None, problem, key.start_mark)
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
