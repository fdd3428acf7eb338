"""What is wrong with a command line or a recipe, all of it, worded for the person who wrote it.

The parser (jsonargparse) stops at the first error. When it does, the recipe's files and the command line are read
again here, plainly, and every section, class and knob is looked at by itself. This runs on failure only.
"""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule

from pqqp_lightning.errors import suggest
from pqqp_lightning.stage import Stage
from pqqp_lightning.stages import known_stages
from pqqp_lightning.trainer import Trainer

SECTIONS = {"model", "data", "trainer", "stages", "stage_order", "run_dir", "seed_everything", "ckpt_path", "config"}
EXTRA = {"fit": {"weights_only"}, "order": {"metric", "higher_is_better"}}
FLAGS = {"print_config", "help", "print_shtab"}


@dataclass(frozen=True)
class Setting:
    """A value that the user gave.

    Attributes:
        where: the recipe's path, or "command line".
        key: dotted, as in ``stages.prune.sparsity``.
        value: plain data.
    """

    where: str
    key: str
    value: Any


def diagnose(command: str, arguments: Sequence[str], error: ArgumentError) -> list[str]:
    """Every problem of the command line and its recipes; the parser's own words if none is found."""
    problems: list[str] = []
    settings = list(_settings(arguments, problems))
    known = SECTIONS | FLAGS | EXTRA.get(command, {"verbose", "weights_only"})
    for setting in settings:
        section = setting.key.split(".")[0]
        if section not in known:
            dashes = "--" if setting.where == "command line" else ""
            problems.append(f"{setting.where}: '{dashes}{section}' is no section.{suggest(section, SECTIONS)}")
    problems += _check_stages(settings)
    problems += _check_section(settings, "model", LightningModule)
    problems += _check_section(settings, "data", LightningDataModule)
    problems += _check_trainer(settings)
    return list(dict.fromkeys(problems)) or [f"{recipe_name(arguments) or 'command line'}: {_first_lines(error)}"]


def recipe_name(arguments: Sequence[str]) -> str | None:
    """The last recipe on the command line."""
    return option(arguments, "config")


def option(arguments: Sequence[str], name: str) -> str | None:
    """The last value of ``--name`` on the command line."""
    found = [value for key, value in _pairs(arguments) if key == name or (name == "config" and key == "c")]
    return found[-1] if found else None


def stage_class_names(arguments: Sequence[str]) -> list[str]:
    """The bare class names that the recipes and the command line give to stages."""
    names = []
    for setting in _settings(arguments, []):
        parts = setting.key.split(".")
        if parts[0] == "stages" and (len(parts) == 2 or parts[2:] == ["class_path"]):
            name = setting.value.get("class_path") if isinstance(setting.value, dict) else setting.value
            if isinstance(name, str) and name.isidentifier():
                names.append(name)
    return names


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


def _settings(arguments: Sequence[str], problems: list[str]) -> Iterator[Setting]:
    """What the recipes and the command line set, the stages one by one; files that cannot be read go to problems."""
    for key, value in _pairs(arguments):
        if key in ("config", "c") and value is not None:
            yield from _settings_of_file(Path(value), problems)
        elif key == "" and value is not None:
            problems.append(f"command line: '{value}' belongs to no option. Options start with --.")
        elif key:
            yield from _split_stages(Setting("command line", key, _parse(value)))


def _settings_of_file(path: Path, problems: list[str]) -> Iterator[Setting]:
    content = _read_yaml(path, problems)
    if content is None:
        return
    if not isinstance(content, dict):
        problems.append(f"{path}: is not a recipe: expected 'model:', 'data:', 'stages:' ..., got {content!r:.60}.")
        return
    for key, value in content.items():
        if key in ("model", "data", "trainer") and isinstance(value, str) and value.endswith(".yaml"):
            value = _read_yaml(path.parent / value, problems)
        yield from _split_stages(Setting(str(path), str(key), value))


def _read_yaml(path: Path, problems: list[str]) -> Any:
    if not path.is_file():
        near = suggest(path.name, [f.name for f in path.parent.glob("*.yaml")]) if path.parent.is_dir() else ""
        problems.append(f"{path}: there is no such file.{near}")
        return None
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problems.append(f"{path}: is not YAML{at}: {getattr(error, 'problem', None) or error}.")
        return None


def _split_stages(setting: Setting) -> Iterator[Setting]:
    if setting.key == "stages" and isinstance(setting.value, dict):
        for name, value in setting.value.items():
            yield Setting(setting.where, f"stages.{name}", value)
    else:
        yield setting


def _parse(value: str | None) -> Any:
    try:
        return yaml.safe_load(value) if value is not None else True
    except yaml.YAMLError:
        return value


def _check_stages(settings: list[Setting]) -> list[str]:
    problems = []
    names = list(dict.fromkeys(s.key.split(".")[1] for s in settings if s.key.startswith("stages.")))
    for setting in settings:
        if setting.key == "stages" and not isinstance(setting.value, dict):
            problems.append(
                f"{setting.where}: stages: expected a mapping of names to stages, got {setting.value!r:.60}. "
                "Write stages: {prune: {class_path: SparseGPT, init_args: {sparsity: 0.5}}}."
            )
    for name in names:
        own = [s for s in settings if s.key.split(".")[:2] == ["stages", name]]
        given = [s.key for s in own if len(s.key.split(".")) == 2 or s.key.endswith(".class_path")]
        if not given:
            others = [n for n in names if n != name]
            problems.append(
                f"{own[0].where}: stages.{name}: there is no such stage.{suggest(name, others)} "
                f"To add it, also give --stages.{name} METHOD."
            )
            continue
        problems += _check_class(own, f"stages.{name}", Stage, dict(known_stages()))
    return problems


def _check_section(settings: list[Setting], section: str, base: type) -> list[str]:
    own = [s for s in settings if s.key.split(".")[0] == section]
    if not own:
        needed = "model: {class_path: CausalLM}" if section == "model" else "data: {class_path: TextData}"
        return [f"{section}: is missing. Add {needed} to the recipe."] if section == "model" else []
    known = {c.__name__: c for c in _subclasses(base) if c.__module__.startswith("pqqp_lightning.")}
    return _check_class(own, section, base, known)


def _check_class(settings: list[Setting], key: str, base: type, known: dict[str, type]) -> list[str]:
    """A section that names a class: does it exist, and is each knob one of its own, of the right type?"""
    problems: list[str] = []
    cls: type | None = None
    depth = len(key.split("."))
    knobs: list[Setting] = []
    for setting in settings:
        rest = setting.key.split(".")[depth:]
        name, arguments = _class_and_knobs(rest, setting.value)
        if name is not None:
            found = _resolve(name, base, known)
            if isinstance(found, str):
                problems.append(f"{setting.where}: {key}: {found}")
            else:
                cls = found
        knobs += [Setting(setting.where, k, v) for k, v in arguments.items()]
    if cls is None:
        missing = not problems
        return problems + ([f"{settings[0].where}: {key}: class_path is missing. Known: {', '.join(known)}."] * missing)
    return problems + _check_knobs(cls, f"{key} ({cls.__name__})", knobs)


def _class_and_knobs(rest: list[str], value: Any) -> tuple[str | None, dict[str, Any]]:
    if not rest:
        if isinstance(value, dict):
            outer = {k: v for k, v in value.items() if k not in ("class_path", "init_args", "dict_kwargs")}
            return value.get("class_path"), {**outer, **(value.get("init_args") or {})}
        return (str(value) if value is not None else None), {}
    if rest == ["class_path"]:
        return str(value), {}
    if rest[0] == "init_args":
        rest = rest[1:]
    if not rest:
        return None, value if isinstance(value, dict) else {}
    return None, {rest[0]: value} if len(rest) == 1 else {}


def _resolve(name: str, base: type, known: dict[str, type]) -> type | str:
    """The class, or what is wrong with its name."""
    if name in known:
        return known[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        return f"'{name}' is no known class.{suggest(name, known)}"
    try:
        found = getattr(__import__(module, fromlist=[attribute]), attribute)
    except (ImportError, AttributeError) as error:
        return f"'{name}' cannot be imported: {error}.{suggest(attribute, known)}"
    if not (isinstance(found, type) and issubclass(found, base)):
        return f"'{name}' is no {base.__name__}."
    return found


def _check_knobs(cls: type, where: str, knobs: list[Setting]) -> list[str]:
    parser = ArgumentParser(exit_on_error=False)
    names = {str(n) for n in parser.add_class_arguments(cls, None, fail_untyped=False, sub_configs=True)}
    problems = []
    for knob in knobs:
        if knob.key not in names:
            problems.append(f"{knob.where}: {where}: '{knob.key}' is no knob.{suggest(knob.key, names)}")
            continue
        try:
            parser.parse_object({knob.key: knob.value})
        except ArgumentError as error:
            if f'"{knob.key}"' in str(error):
                problems.append(f"{knob.where}: {where}: {knob.key}={knob.value!r}: {_expected(parser, knob.key)}")
    given = {knob.key for knob in knobs}
    required = {n for n in names if n in _required(parser)} - given
    return problems + [f"{where}: {name} is required. Add it." for name in sorted(required)]


def _required(parser: ArgumentParser) -> set[str]:
    return {str(name) for name in getattr(parser, "required_args", set())}


def _expected(parser: ArgumentParser, knob: str) -> str:
    action = next(a for a in parser._actions if a.dest == knob)
    kind = getattr(action, "_typehint", None)
    name = getattr(kind, "__name__", None) if isinstance(kind, type) else str(kind)
    return f"expected {str(name).replace('typing.', '').replace('NoneType', 'null')}."


def _check_trainer(settings: list[Setting]) -> list[str]:
    knobs = []
    for setting in settings:
        parts = setting.key.split(".")
        if parts[0] != "trainer":
            continue
        if len(parts) == 1 and isinstance(setting.value, dict):
            knobs += [Setting(setting.where, str(k), v) for k, v in setting.value.items()]
        elif len(parts) == 2:
            knobs.append(Setting(setting.where, parts[1], setting.value))
    return _check_knobs(Trainer, "trainer", knobs)


def _subclasses(base: type) -> Iterator[type]:
    cls: type
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)


def _first_lines(error: ArgumentError) -> str:
    """The parser's message on one line, without the list of everything it tried."""
    lines = [line.strip(" -") for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("Subtypes:", "Errors:", "Given value type"))]
    return " ".join(kept[:4])
