"""Runs one command, and adds to each problem the source of the value that caused it."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import yaml
from jsonargparse import set_loader
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pqqp_lightning.cli.diagnosis import check_sections, diagnose, refuse_nulls
from pqqp_lightning.cli.export_command import EXPORT
from pqqp_lightning.cli.inference_commands import CLASSIFY, GENERATE
from pqqp_lightning.cli.methods import print_methods
from pqqp_lightning.cli.parser import CommandLine, NotStarted, problems_behind
from pqqp_lightning.cli.saved_recipe import packaged, with_saved_recipe
from pqqp_lightning.cli.settings import (
    COMMAND_LINE,
    Setting,
    add_sources,
    load_yaml,
    merged_section,
    option,
    read_settings,
    replaced_stages,
    stage_class_names,
    without_section,
)
from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.report.pages import show_run
from pqqp_lightning.stages.discovery import (
    import_from_working_folder,
    import_working_folder,
    known_stages,
    load_installed,
)

ON_RUN_FOLDERS = {options.command: options for options in (EXPORT, GENERATE, CLASSIFY)}
MERGED = {"sweep": "grid", "search": "space"}
"""The sections of dictionaries by stage and argument, which the recipe and the command line set together."""


def run_command(arguments: Sequence[str]) -> None:
    """Run one command.

    Args:
        arguments: the command, which is in the table, and the words after it.

    Raises:
        RecipeError: with every problem of the recipe or the command line.
    """
    _quiet_the_libraries()
    for warning in load_installed():
        print(warning, file=sys.stderr)
    command, *rest = arguments
    if command == "methods":
        if rest:
            text = f"Unexpected argument '{rest[0]}'"
            way_out = "Run pqqp-lightning methods for all stages."
            raise RecipeError(Problem("", rest[0], text, way_out, source=COMMAND_LINE, complete=True))
        for warning in import_working_folder():
            print(warning, file=sys.stderr)
        print_methods(known_stages())
    elif command == "report":
        if len(rest) != 1 or rest[0].startswith("-") or not rest[0].strip():
            way_out = "Run pqqp-lightning report RUN, as in pqqp-lightning report runs/quickstart."
            raise RecipeError(Problem(text="report needs one run folder", way_out=way_out, source=COMMAND_LINE))
        show_run(Path(rest[0]))
    elif command in ON_RUN_FOLDERS:
        ON_RUN_FOLDERS[command].run(rest)
    else:
        with with_saved_recipe(command, [packaged(argument) for argument in rest]) as complete:
            _run_recipe(command, complete)


def _quiet_the_libraries() -> None:
    """Silence messages of libraries that would break up progress bars and tables."""
    for logger in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    for message in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        r"The number of training batches",
        r".*does not have many workers",
        r"`weights_only` was not set",
    ):
        warnings.filterwarnings("ignore", message=message)


def _run_recipe(command: str, arguments: list[str]) -> None:
    # A recipe may give these modules' classes by bare name, which needs the import.
    for module in ("models.causal_lm", "models.image_classifier", "data.text", "data.tokens", "data.images"):
        import_module(f"pqqp_lightning.{module}")
    # the parser itself would keep the last of two equal keys
    set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
    settings, unreadable = read_settings(command, arguments)
    # a file in the working folder runs code, so import only the one that defines a class of the recipe
    for name in stage_class_names(settings):
        if name not in known_stages():
            import_from_working_folder(name)
    if not unreadable:
        refuse_nulls(command, settings)
        for note in replaced_stages(settings):
            rank_zero_only(print)(note)
    try:
        merged = _with_one_option(arguments, settings, MERGED.get(command, ""))
        CommandLine(command, _with_last_budget(merged, settings) if command == "search" else merged)
    except ArgumentError as error:
        raise RecipeError(diagnose(command, arguments, error)) from error
    except (RecipeError, MisconfigurationException, OSError) as error:
        problems = problems_behind(error)
        if not problems:
            raise
        problems = add_sources(problems, settings, option(arguments, "config") or COMMAND_LINE)
        if isinstance(error, NotStarted):  # the stages' checks did not run: check the rest of the recipe as well
            problems += check_sections(settings)
        raise RecipeError(problems) from error


def _with_last_budget(arguments: list[str], settings: list[Setting]) -> list[str]:
    """Let a budget of the command line replace the recipe's, which would be a second one."""
    from pqqp_lightning.experiments.search_budget import TARGETS

    given = [name for name in TARGETS if option(arguments, name) is not None]
    if not given:
        return arguments
    replaced = {setting.key for setting in settings if setting.key in TARGETS and setting.key not in given}
    return [*arguments, *(f"--{name}=null" for name in sorted(replaced))]


def _with_one_option(arguments: list[str], settings: list[Setting], section: str) -> list[str]:
    """Merge ``section`` into one option, because the parser keeps only the last of two arguments of one stage."""
    merged = merged_section(settings, section)
    if not merged or not isinstance(merged, dict):
        return arguments
    return [*without_section(arguments, section), f"--{section}={json.dumps(merged, default=str)}"]
