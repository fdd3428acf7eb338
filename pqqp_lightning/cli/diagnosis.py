"""What is wrong with a command line or a recipe, all of it, worded for the person who wrote it.

The parser (jsonargparse) stops at the first error. When it does, every section, class and knob that was set is looked
at by itself here. This runs on failure only.
"""

from __future__ import annotations

import copy
import re
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from types import NoneType
from typing import Any, get_origin

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule

from pqqp_lightning.cli.settings import COMMAND_LINE, FLAGS, NO_VALUE, Setting, place, read_settings, recipe_name
from pqqp_lightning.errors import RecipeError, near_miss, suggest
from pqqp_lightning.runs.trainer import Trainer
from pqqp_lightning.stages.discovery import known_stages
from pqqp_lightning.stages.knobs import WORDS, _choices, _in_words, _parser_of, _parts, _required, _takes_null
from pqqp_lightning.stages.stage import Stage

SECTIONS = {"model", "data", "trainer", "stages"}
OPTIONS: dict[str, Any] = {
    "stage_order": list[str] | None,
    "run_dir": str | None,
    "seed_everything": bool | int,
    "ckpt_path": str | None,
}
OPTIONS_OF: dict[str, dict[str, Any]] = {
    "fit": {"weights_only": bool | None},
    "order": {
        "metric": str | None,
        "higher_is_better": bool | None,
        "strategy": str,
        "max_runs": int | None,
        "time_limit": float | None,
        "comparable_only": bool,
        "repeats": int,
        "store": str | None,
        "executor": str,
    },
    "sweep": {
        "metric": str | None,
        "higher_is_better": bool | None,
        "grid": dict[str, Any],
        "curve": str | None,
        "curve_bits": list[int],
        "max_points": int,
        "time_limit": float | None,
        "store": str | None,
        "executor": str,
    },
    "analyze": {
        "metric": str | None,
        "higher_is_better": bool | None,
        "samples": int,
        "store": str | None,
    },
    "validate": {"weights_only": bool | None, "verbose": bool},
    "test": {"weights_only": bool | None, "verbose": bool},
}


def refuse_nulls(command: str, settings: Sequence[Setting]) -> None:
    """Where something is null, see whether that is meant: the parser takes it for any value.

    Raises:
        RecipeError: with every null that is not.
    """
    if not any(_holds_null(setting.value) for setting in settings):
        return
    options = OPTIONS | OPTIONS_OF[command]
    problems = _check_options([s for s in settings if s.key in options], options) + check_sections(settings)
    if of_null := [problem for problem in problems if re.search(r"\bNone\b|: is null\.", problem)]:
        raise RecipeError(dict.fromkeys(of_null))


def _holds_null(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(map(_holds_null, inner))


def diagnose(command: str, arguments: Sequence[str], error: ArgumentError) -> list[str]:
    """Every problem of the command line and its recipes; the parser's own words if none is found."""
    settings, problems = read_settings(command, arguments)
    options = OPTIONS | OPTIONS_OF[command]
    known = {*SECTIONS, *options}
    problems += [problem for setting in settings for problem in _check_name(setting, known)]
    problems += [
        f"{COMMAND_LINE}: '{word}' has one dash. Write -{word}."
        for word in arguments
        if re.match(r"-[a-z]\w", word) and word.partition("=")[0].partition(".")[0].lstrip("-") in known
    ]
    settings = [setting for setting in settings if setting.value is not NO_VALUE]
    if not problems and not any(s.key.split(".")[0] == "model" for s in settings):
        place_of_it = recipe_name(arguments) or COMMAND_LINE
        problems.append(f"{place_of_it}: model: is missing. Add model: {{class_path: CausalLM}}, or give --config.")
    problems += _check_options([s for s in settings if s.key in options], options)
    problems += check_sections(settings)
    return list(dict.fromkeys(problems)) or [f"{recipe_name(arguments) or COMMAND_LINE}: {_first_lines(error)}"]


def _check_name(setting: Setting, known: set[str]) -> list[str]:
    section = setting.key.split(".")[0]
    if section in FLAGS:
        return []
    if section in ("config", "c"):
        return [f"{setting.where}: --config has no value. Write --config recipe.yaml."]
    if section not in known and (owners := [name for name, own in OPTIONS_OF.items() if section in own]):
        given = f"--{section}" if setting.where == COMMAND_LINE else section
        whose = " and ".join(owners)
        return [f"{setting.where}: '{given}' belongs to {whose}. Take it out, or run pqqp-lightning {owners[0]}."]
    if section not in known and setting.where == COMMAND_LINE:
        return [f"{COMMAND_LINE}: '--{section}' is no option.{suggest(section, {*known, 'config', 'print_config'})}"]
    if section not in known:
        return [f"{setting.where}: '{section}' is no section.{suggest(section, known)}"]
    if setting.value is NO_VALUE:
        return [f"{setting.where}: --{setting.key} has no value. Write --{setting.key} VALUE."]
    return []


def check_sections(settings: Sequence[Setting]) -> list[str]:
    """Every problem of the sections that can be seen without building the model."""
    problems = _check_stages(settings)
    for section, base in (("model", LightningModule), ("data", LightningDataModule)):
        own = [s for s in settings if s.key.split(".")[0] == section and (s.value is not None or section == "model")]
        ours = {c.__name__: c for c in _subclasses(base) if c.__module__.startswith("pqqp_lightning.")}
        problems += _check_class(own, section, (base,), ours) if own else []
    return problems + _check_trainer(settings)


def _check_options(settings: Iterable[Setting], options: dict[str, Any]) -> list[str]:
    parser = ArgumentParser(exit_on_error=False)
    for name, kind in options.items():
        parser.add_argument(f"--{name}", type=kind)
    problems = []
    for setting in settings:
        null = setting.value is None and NoneType not in _parts(options[setting.key])
        if null or not _accepts(parser, setting):
            expected = _in_words(options[setting.key])
            problems.append(f"{setting.where}: {setting.key}={setting.value!r}: expected {expected}.")
    return problems


def _check_stages(settings: Sequence[Setting]) -> list[str]:
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
        if given:
            problems += _check_class(own, f"stages.{name}", (Stage,), dict(known_stages()))
        else:
            others = [n for n in names if n != name]
            problems.append(
                f"{own[0].where}: stages.{name}: there is no such stage.{suggest(name, others)} "
                f"To add it, also give --stages.{name} METHOD."
            )
    return problems


def _check_class(
    settings: Sequence[Setting], key: str, bases: tuple[type, ...], known: dict[str, type], *, complete: bool = True
) -> list[str]:
    """A section that names a class: does it exist, and is each knob one of its own, of the right type?"""
    problems: list[str] = []
    cls: type | None = None
    depth, first = len(key.split(".")), settings[0].where
    knobs: list[Setting] = []
    for setting in settings:
        if setting.key == key and setting.value is None:
            problems.append(f"{setting.where}: {key}: is null. Give a class, or leave it out.")
        name, arguments = _class_and_knobs(setting.key.split(".")[depth:], setting.value)
        if name is not None:
            found = _resolve(name, bases, known)
            if isinstance(found, str):
                problems.append(f"{setting.where}: {key}: {found}")
            else:
                cls = found
        knobs += [Setting(setting.where, k, v) for k, v in arguments.items()]
    if cls is None:
        return problems or [f"{first}: {key}: class_path is missing. Known: {', '.join(sorted(known))}."]
    where = f"{key} ({cls.__name__})"
    problems += _check_knobs(cls, where, knobs)
    missing = [name for name in _required(cls) if name not in {knob.key for knob in knobs}] if complete else []
    problems += [f"{first}: {where}: {name} is required. Add it." for name in missing]
    return problems or place(_own_problems(cls, where, knobs), settings, first)


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
    return None, {".".join(rest): value}


def _resolve(name: str, bases: tuple[type, ...], known: dict[str, type]) -> type | str:
    """The class, or what is wrong with its name."""
    if name in known:
        return known[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        return f"'{name}' is no known class.{suggest(name, known)}"
    try:
        found = getattr(__import__(module, fromlist=[attribute]), attribute)
    except Exception as error:  # whatever the module of a user raises
        return f"'{name}' cannot be imported: {type(error).__name__}: {error}.{near_miss(attribute, known)}"
    if not (isinstance(found, type) and issubclass(found, bases)):
        return f"'{name}' is no {' or '.join(base.__name__ for base in bases)}."
    return found


def _check_trainer(settings: Sequence[Setting]) -> list[str]:
    knobs, problems = [], []
    for setting in settings:
        section, *names = setting.key.split(".")
        if section != "trainer" or len(names) > 1:
            continue
        if names:
            knobs.append(Setting(setting.where, names[0], setting.value))
        elif isinstance(setting.value, dict):
            knobs += [Setting(setting.where, str(k), v) for k, v in setting.value.items()]
        else:
            problems.append(
                f"{setting.where}: trainer: expected options, as in {{precision: 32}}, got {setting.value!r}."
            )
    return problems + _check_knobs(Trainer, "trainer", knobs)


def _check_knobs(cls: type, where: str, knobs: Sequence[Setting]) -> list[str]:
    parser = _parser_of(cls)
    kinds = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    names = {name for name in kinds if name not in FLAGS and "." not in name}
    problems = []
    for knob in knobs:
        if "." in knob.key:
            problems += _check_field(knob, where.partition(" ")[0], kinds)
        elif knob.key not in names:
            problems.append(f"{knob.where}: {where}: '{knob.key}' is no knob.{suggest(knob.key, names)}")
        elif not _accepts(parser, knob):
            inside = _check_classes_inside(knob, where.partition(" ")[0], kinds[knob.key])
            near = near_miss(str(knob.value), map(str, _choices(kinds[knob.key])))
            wrong = f"{knob.key}={knob.value!r}: expected {_in_words(kinds[knob.key])}.{near}"
            problems += inside or [f"{knob.where}: {where}: {wrong}"]
    return problems


def _check_field(knob: Setting, section: str, kinds: dict[str, Any]) -> list[str]:
    """What is wrong with one field of a knob that takes a dataclass, as in ``distill.weight``; of others nothing."""
    name, _, field = knob.key.partition(".")
    found = [part for part in _parts(kinds.get(name)) if isinstance(part, type) and is_dataclass(part)]
    fields = [Setting(knob.where, field, knob.value)]
    return [p for cls in found for p in _check_knobs(cls, f"{section}.{name} ({cls.__name__})", fields)]


def _check_classes_inside(knob: Setting, section: str, kind: Any) -> list[str]:
    """What is wrong with the classes in a knob that takes some (callbacks, a logger, an optimizer, a dataclass)."""
    bases = tuple(c for c in _parts(kind) if isinstance(c, type) and c not in WORDS)
    known = {c.__name__: c for base in bases for c in (base, *_subclasses(base))}
    key, problems = f"{section}.{knob.key}", []
    plain = [{"class_path": base.__name__} for base in bases if is_dataclass(base)]
    for value in knob.value if isinstance(knob.value, list) else [knob.value]:
        if plain and isinstance(value, dict):
            value = plain[0] | value
        if known and isinstance(value, dict) and "class_path" in value:
            complete = get_origin(kind) is not Callable  # who calls it gives the rest
            problems += _check_class([Setting(knob.where, key, value)], key, bases, known, complete=complete)
    return problems


def _own_problems(cls: type, where: str, knobs: Sequence[Setting]) -> list[str]:
    """What an instance of a stage or datamodule says about its knobs, if one can be made."""
    if not issubclass(cls, Stage | LightningDataModule):
        return []
    try:
        values = _parser_of(cls).parse_object({knob.key: copy.deepcopy(knob.value) for knob in knobs})
        instance = cls(**values.as_dict())
        if isinstance(instance, Stage):
            return [f"{where}: {problem}" for problem in instance.check_knobs()]
        return list(map(str, instance.check())) if hasattr(instance, "check") else []
    except RecipeError as error:
        return [str(problem) for problem in error.problems]
    except Exception:  # this is not the place to report it
        return []


def _accepts(parser: ArgumentParser, setting: Setting) -> bool:
    action = next((action for action in parser._actions if action.dest == setting.key), None)
    if setting.value is None and action is not None and not _takes_null(action):
        return False
    try:
        parser.parse_object({setting.key: copy.deepcopy(setting.value)})  # which changes what it is given
    except ArgumentError as error:
        return f'"{setting.key}"' not in str(error)
    return True


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
