"""``pqqp-lightning export``: reads its options from the signatures of ``export_run`` and of the target."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Sequence
from typing import Any

import docstring_parser

from pqqp_lightning.cli.run_options import command_problem, with_command_line
from pqqp_lightning.cli.settings import COMMAND_LINE, word_pairs
from pqqp_lightning.errors import Problem, RecipeError, near_miss
from pqqp_lightning.export.discovery import known_targets
from pqqp_lightning.export.export_run import CheckFailed, Export, export_run
from pqqp_lightning.export.hub import NotUploaded
from pqqp_lightning.export.options import BOOLEANS, options_of, owners_of
from pqqp_lightning.report.formatting import human_bytes

USAGE = "pqqp-lightning export RUN --to TARGET --out PATH"


def run_export(arguments: Sequence[str]) -> None:
    """Export a run as the command line says. Exits with code 1 if the result's check fails.

    Raises:
        RecipeError: with every problem of the command line or the run.
    """
    if list(arguments) in (["-h"], ["--help"]):
        print(_help(), end="")
        return
    options = _read_options(arguments)
    try:
        done = export_run(**options)
    except RecipeError as error:
        raise RecipeError(with_command_line(error.problems)) from error
    except (CheckFailed, NotUploaded) as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    for line in _report(done):
        print(line)


def _parameters() -> dict[str, inspect.Parameter]:
    """The options of every target by name; ``run`` is the only word without one, ``options`` those of one target."""
    own = ("run", "options")
    return {name: p for name, p in inspect.signature(export_run).parameters.items() if name not in own}


def _read_options(arguments: Sequence[str]) -> dict[str, Any]:
    """The arguments of ``export_run``.

    Raises:
        RecipeError: an option is unknown, has no value or the wrong one, or is missing.
    """
    parameters = _parameters()
    options: dict[str, Any] = {}
    problems = []
    for name, value in word_pairs(arguments):
        if name == "" and "run" not in options:
            options["run"] = value
        elif problem := _wrong_word(name, value):
            problems.append(problem)
        elif name in options:
            problems.append(Problem(name, value, "is given twice", "Write it once.", source=COMMAND_LINE))
        else:
            options[name] = BOOLEANS[str(value)] if _is_switch(name) else value
    if "run" not in options:
        problems.append(command_problem("export needs a run folder", f"Run {USAGE}."))
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            problems.append(command_problem(f"export needs --{name}", _missing(name)))
    if problems:
        raise RecipeError(problems)
    return options


def _wrong_word(name: str, value: str | None) -> Problem | None:
    """The problem of an option and its value, or of a word without an option."""
    targets = known_targets()
    if name == "":
        return command_problem(f"Unexpected argument '{value}'", "Options start with --.")
    if name not in _parameters() and not owners_of(name, targets):
        known = [f"--{known}" for known in _parameters()]
        for target in targets.values():
            known += [f"--{option}" for option in options_of(target)]
        near = near_miss(f"--{name}", known).strip()
        return command_problem(f"Unknown option '--{name}'", near or f"Known: {', '.join(known)}.")
    if value is None:
        return Problem(name, text="has no value", way_out=f"Write --{name} VALUE.", source=COMMAND_LINE)
    if _is_switch(name) and value not in BOOLEANS:
        text = "is neither true nor false"
        return Problem(name, value, text, f"Write --{name} true.", source=COMMAND_LINE)
    return None


def _is_switch(name: str) -> bool:
    """Whether it is true or false; the options of one target are read with it."""
    return typing.get_type_hints(export_run).get(name) is bool


def _missing(name: str) -> str:
    return f"Choose one of {', '.join(known_targets())}." if name == "to" else f"Run {USAGE}."


def _report(done: Export) -> list[str]:
    """What was written, what to know about it, what was checked, and how to load it."""
    lines = [f"{done.out}: {human_bytes(done.size_bytes)} (the run's own checkpoint: {human_bytes(done.own_bytes)})."]
    lines += [*done.remarks, *done.checks]
    if done.uploaded:
        lines.append(f"Uploaded to {done.uploaded}.")
    lines += [f"{program}: {words}" for program, words in done.loading.items()]
    return lines


def _help() -> str:
    """Every target and every option, from their docstrings."""
    documented = docstring_parser.parse(inspect.getdoc(export_run) or "")
    meaning = {entry.arg_name: " ".join((entry.description or "").split()) for entry in documented.params}
    lines = [f"usage: {USAGE} [options]", "", documented.short_description or "", "", "targets:"]
    for name, target in known_targets().items():
        lines.append(f"  {name:<20} {target.summary}")
        for option in options_of(target).values():
            default = "" if option.default is None else f" [{str(option.default).lower()}]"
            lines.append(f"    --{option.name:<16} {option.meaning}{default}")
    lines += ["", "options:"]
    for name, parameter in _parameters().items():
        without = parameter.default in (parameter.empty, None)
        default = "" if without else f" [{str(parameter.default).lower()}]"
        lines.append(f"  --{name:<11} {meaning[name]}{default}")
    lines += ["", "example: pqqp-lightning export runs/quickstart --to hf --out model", ""]
    return "\n".join(lines)
