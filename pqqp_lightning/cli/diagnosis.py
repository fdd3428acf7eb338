"""Finds every problem of a command line and its recipes.

The parser (jsonargparse) stops at the first error. Only then is every section, class and argument checked here, one by
one.
"""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from pqqp_lightning.cli.class_checks import (
    PARSER_OPTIONS,
    accepts,
    check_arguments,
    check_class,
    subclasses,
    wrong_value,
)
from pqqp_lightning.cli.command_trainer import SECTIONS, commands_with, option_names, option_parser
from pqqp_lightning.cli.settings import COMMAND_LINE, NO_VALUE, Setting, option, read_settings
from pqqp_lightning.errors import Problem, RecipeError, near_miss, suggest
from pqqp_lightning.runs.trainer import Trainer
from pqqp_lightning.stages.arguments import arguments_of, parser_of
from pqqp_lightning.stages.discovery import known_stages
from pqqp_lightning.stages.stage import Stage

WRITE_STAGES = "Write stages: {prune: {class_path: SparseGPT, init_args: {sparsity: 0.5}}}."


def refuse_nulls(command: str, settings: Sequence[Setting]) -> None:
    """Refuse null where the type does not allow it, because the parser accepts it for any type.

    Raises:
        RecipeError: with every null that is not allowed.
    """
    if not any(_holds_null(setting.value) for setting in settings):
        return
    problems = _check_options(command, settings) + check_sections(settings)
    if of_null := [problem for problem in problems if _holds_null(problem.value)]:
        raise RecipeError(of_null)


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_null, value.values()))
    if isinstance(value, list):
        return any(map(_holds_null, value))
    return value is None


def diagnose(command: str, arguments: Sequence[str], error: ArgumentError) -> list[Problem]:
    """Every problem of the command line and its recipes, or the parser's own message if no check finds one."""
    settings, problems = read_settings(command, arguments)
    recipe = option(arguments, "config") or COMMAND_LINE
    for setting in settings:
        problems += _check_name(setting, command, settings)
    # the parser reads -stages.x as the short option -s, and its error does not help
    for word in arguments:
        name = word.partition("=")[0].partition(".")[0].lstrip("-")
        if re.match(r"-[a-z]\w", word) and name in (*SECTIONS, *option_names(command)):
            text, way_out = f"'{word}' has one dash", f"Write -{word}."
            problems.append(Problem(name, text=text, way_out=way_out, source=COMMAND_LINE, complete=True))
    problems += _dashed_values(arguments)
    settings = [setting for setting in settings if setting.value is not NO_VALUE]
    if not problems and not any(setting.key.split(".")[0] == "model" for setting in settings):
        way_out = "Add model: {class_path: CausalLM}, or give --config."
        if command in ("validate", "test"):
            way_out = "Name the folder of a run with --run_dir, or give --config."
        problems.append(Problem("model", text="is missing", way_out=way_out, source=recipe))
    problems += _check_options(command, settings)
    problems += check_sections(settings)
    if not problems:
        # the parser's message on one line, without the list of everything that it tried
        lines = [line.strip(" -") for line in str(error).splitlines()]
        kept = [line for line in lines if line and not line.startswith(("Subtypes:", "Errors:", "Given value type"))]
        problems.append(Problem(text=" ".join(kept[:4]), source=recipe))
    return problems


def _dashed_values(arguments: Sequence[str]) -> list[Problem]:
    """The problem of each value that the parser takes for an option, because it begins with a dash."""
    problems = []
    for word, value in pairwise(arguments):
        # argparse itself takes plain negative numbers for values; -stages is named as an option with one dash
        taken = re.match(r"-\d", value) and not re.fullmatch(r"-\d+|-\d*\.\d+", value)
        if word.startswith("--") and "=" not in word and taken:
            text = "begins with a dash, as options do"
            problems.append(Problem(word.lstrip("-"), value, text, f"Write {word}={value}.", source=COMMAND_LINE))
    return problems


def _check_name(setting: Setting, command: str, settings: Sequence[Setting]) -> list[Problem]:
    """The problem of a setting whose key is neither a section nor an option of the command, or that has no value."""
    name, where = setting.key.split(".")[0], setting.where
    if name in ("config", "c"):
        return [Problem("config", text="has no value", way_out="Write --config recipe.yaml.", source=where)]
    if name in PARSER_OPTIONS:
        return []
    known = {*SECTIONS, *option_names(command)}
    if name not in known:
        dashes = "--" if where == COMMAND_LINE else ""
        if owners := commands_with(name):
            text = f"'{dashes}{name}' is an option of {', '.join(owners)}"
            way_out = f"Remove it, or run pqqp-lightning {owners[0]}."
        else:
            text = f"Unknown option '{dashes}{name}'" if dashes else f"Unknown section '{name}'"
            way_out = _suggest_name(setting, command, known, settings)
        return [Problem(name, text=text, way_out=way_out, source=where, complete=True)]
    if setting.value is NO_VALUE:
        kinds = {action.dest: getattr(action, "_typehint", None) for action in option_parser(command)._actions}
        example = "true" if kinds.get(name) is bool else "VALUE"
        return [Problem(setting.key, text="has no value", way_out=f"Write --{setting.key} {example}.", source=where)]
    return []


def _suggest_name(setting: Setting, command: str, known: set[str], settings: Sequence[Setting]) -> str:
    """What the user may have meant by an unknown name: an option, a section, a stage, or an argument of a stage."""
    name = setting.key.split(".")[0]
    if setting.where != COMMAND_LINE:
        return suggest(name, known).strip()
    if any(other.key.split(".")[:2] == ["stages", name] for other in settings):
        section = next((section for section in ("grid", "space") if section in known), "stages")
        return f"Did you mean '--{section}.{setting.key}'?"
    near = near_miss(f"--{name}", [f"--{option}" for option in (*known, "config", "print_config")], cutoff=0.7)
    if not near and name in {action.dest for action in parser_of(Trainer)._actions} - PARSER_OPTIONS:
        return f"Did you mean '--trainer.{name}'?"
    if not near and any(name in arguments_of(cls) for cls in known_stages().values()):
        return f"An argument of a stage is given as --stages.NAME.{name} VALUE."
    return near.strip() or f"pqqp-lightning {command} --help lists the options."


def _check_options(command: str, settings: Sequence[Setting]) -> list[Problem]:
    """The problems of options outside of the sections whose values have another type."""
    parser = option_parser(command)
    kinds = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    names = option_names(command)
    own = [setting for setting in settings if setting.key in names]
    return [wrong_value(setting, kinds[setting.key]) for setting in own if not accepts(parser, setting)]


def check_sections(settings: Sequence[Setting]) -> list[Problem]:
    """The problems of the sections that do not need the model to be built."""
    problems = _check_stages(settings)
    for section, base in (("model", LightningModule), ("data", LightningDataModule)):
        own = [setting for setting in settings if setting.key.split(".")[0] == section]
        if section == "data":  # null is allowed: a model may have its own data
            own = [setting for setting in own if (setting.key, setting.value) != ("data", None)]
        if own:
            known = {cls.__name__: cls for cls in subclasses(base) if cls.__module__.startswith("pqqp_lightning.")}
            problems += check_class(own, section, (base,), known)
    return problems + _check_trainer(settings)


def _check_stages(settings: Sequence[Setting]) -> list[Problem]:
    problems = []
    by_name: dict[str, list[Setting]] = {}
    for setting in settings:
        if setting.key.startswith("stages."):
            by_name.setdefault(setting.key.split(".")[1], []).append(setting)
        elif setting.key == "stages" and not isinstance(setting.value, dict):
            text = f"stages should map names to stages, but is {setting.value!r:.60}"
            where = setting.where
            problems.append(Problem("stages", setting.value, text, WRITE_STAGES, source=where, complete=True))
    for name, own in by_name.items():
        key = f"stages.{name}"
        if any(setting.key in (key, f"{key}.class_path") for setting in own):
            problems += check_class(own, key, (Stage,), dict(known_stages()))
        else:  # only arguments of the stage are given
            near = suggest(name, [other for other in by_name if other != name])
            way_out = f"{near} To add it, also give --stages.{name} METHOD.".strip()
            text, where = f"Unknown stage '{name}'", own[0].where
            problems.append(Problem(key, text=text, way_out=way_out, source=where, complete=True))
    return problems


def _check_trainer(settings: Sequence[Setting]) -> list[Problem]:
    arguments, problems = list[Setting](), list[Problem]()
    for setting in settings:
        section, *names = setting.key.split(".")
        if section != "trainer" or len(names) > 1:
            continue
        if names:
            arguments.append(Setting(setting.where, names[0], setting.value))
        elif isinstance(setting.value, dict):
            arguments += [Setting(setting.where, str(name), value) for name, value in setting.value.items()]
        else:
            text = f"trainer should hold options, as in {{precision: 32}}, but is {setting.value!r:.60}"
            where = setting.where
            problems.append(Problem("trainer", setting.value, text, source=where, complete=True))
    return problems + check_arguments(Trainer, "trainer", "", arguments)
