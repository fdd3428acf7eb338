"""LightningCLI with named stages and a run folder."""

from __future__ import annotations

import errno
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pqqp_lightning.cli.command_table import COMMANDS
from pqqp_lightning.cli.command_trainer import NOT_OPTIONS, RECIPE_OPTIONS, CommandTrainer
from pqqp_lightning.cli.methods import summarize
from pqqp_lightning.cli.settings import ENVIRONMENT
from pqqp_lightning.errors import Problem, RecipeError, suggest
from pqqp_lightning.network.offload import OPTION as OFFLOAD
from pqqp_lightning.report.pages import show_run
from pqqp_lightning.stages.discovery import known_stages
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.storage.files import not_written
from pqqp_lightning.trials.fingerprint import RESULT_OPTIONS

NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
CHANGE_OPTION = "Change the option, or leave it out."


class NotStarted(RecipeError):
    """A problem found before the stages could check the model."""


class CommandLine(LightningCLI):
    """LightningCLI with ``--stages``, ``--stage_order`` and ``--run_dir``. Creating it parses and runs the command.

    It neither reads nor changes ``sys.argv``. Lightning starts the other processes of a distributed run with this
    process's ``sys.argv``, the user's command, so that they parse the same arguments.

    Args:
        command: a command that takes a recipe.
        arguments: the words after the command.
    """

    def __init__(self, command: str, arguments: list[str]) -> None:
        self._command = command
        super().__init__(
            LightningModule,
            save_config_callback=None,
            trainer_class=CommandTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            args=[command, *arguments],
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Let the parser raise its errors, so that we can word them, and read the environment."""
        kwargs |= {"prog": "pqqp-lightning", "exit_on_error": False, "default_env": True, "env_prefix": ENVIRONMENT}
        return super().init_parser(**kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in Lightning, which calls it on self
        """Only the given command, because creating all parsers takes most of a short command's time."""
        return {self._command: NOT_OPTIONS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our options to Lightning's."""
        stages_help = f"Stages by name, in order. {summarize(known_stages())}"
        parser.add_argument("--stages", type=dict[str, Stage], default={}, help=stages_help)
        for name, (kind, words) in RECIPE_OPTIONS.items():
            parser.add_argument(f"--{name}", type=kind, default=None, help=words)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would read hyperparameters from the checkpoint, but the recipe defines the model."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse ``args``. Lightning's own method would warn because ``sys.argv`` is not empty."""
        try:
            self.config = parser.parse_args(args)
        except UnicodeDecodeError as error:  # a recipe that is not text
            raise ArgumentError(None, str(error)) from error

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            seed = self._get(self.config, "seed_everything")
            way_out = "Use a whole number from 0 to 4294967295."
            raise NotStarted(Problem("seed_everything", seed, "is not a seed", way_out)) from error

    def before_instantiate_classes(self) -> None:
        """Set the run folder and the order of the stages before anything is built."""
        config = self.config[self.subcommand]
        config.run_dir = str(run_folder(config, self._command))
        config.trainer.default_root_dir = config.run_dir
        config.trainer.calibration_precision = calibration_precision(config)
        config.calibration_precision = None
        # YAML reads the names 1 and yes as numbers and booleans
        stages = {str(name): stage for name, stage in config.stages.items()}
        config.stages = ordered(stages, config.stage_order)
        config.stage_order = None

    def instantiate_classes(self) -> None:
        """Build the model, the data, the stages and the trainer. The parser wraps their errors; unwrap our own."""
        try:
            super().instantiate_classes()
        except Exception as error:
            if problems := problems_behind(error):
                raise NotStarted(problems) from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Create the trainer, with the stages before the other callbacks."""
        stages: dict[str, Stage] = self._get(self.config_init, "stages")
        for name, stage in stages.items():
            stage.name = name
        config = dict(self.config_init[self.subcommand]["trainer"])
        given = config.pop("callbacks") or []
        config["callbacks"] = [*stages.values(), *(given if isinstance(given, list) else [given])]
        if self._command in ("validate", "test") and config["logger"] is None:
            config["logger"] = False  # do not add to the run's own logs
        try:
            trainer = CommandTrainer(**config)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise RecipeError(_trainer_problem(config, error)) from error
        trainer.recipe_text = self._resolved_recipe()
        resolved = yaml.safe_load(trainer.recipe_text)
        trainer.recipe = {key: resolved[key] for key in ("model", "data") if resolved.get(key) is not None}
        (trainer.recipe.get("model", {}).get("init_args") or {}).pop(OFFLOAD, None)  # it changes no result
        # a run may be resumed with other options, as long as they do not change its numbers
        options = resolved["trainer"]
        trainer.recipe["trainer"] = {key: options[key] for key in RESULT_OPTIONS if key in options}
        return trainer

    def after_fit(self) -> None:
        """Show the table of the run."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            show_run(Path(self.trainer.default_root_dir))

    def _resolved_recipe(self) -> str:
        """The recipe with all defaults. It can be run again."""
        config = self.config[self.subcommand].clone()
        for key in ("config", "ckpt_path"):
            config.pop(key, None)
        return self._parser(self.subcommand).dump(config, skip_none=False, skip_validation=True)


def run_folder(config: Namespace, command: str) -> Path:
    """``--run_dir``, or ``runs/`` and the recipes' names; an experiment adds its command."""
    if given := config.run_dir or config.trainer.default_root_dir:
        return Path(given)
    files = config.get("config") or []
    stem = "-".join(Path(str(file)).stem for file in files) or "run"
    return Path("runs") / (f"{stem}-{command}" if COMMANDS[command].is_experiment else stem)


def calibration_precision(config: Namespace) -> str | None:
    """``--calibration_precision``, or the trainer's.

    Raises:
        NotStarted: both are given and differ.
    """
    given, of_trainer = config.calibration_precision, config.trainer.calibration_precision
    if given is not None and of_trainer not in (None, given):
        text = f"contradicts trainer.calibration_precision={of_trainer!r}"
        raise NotStarted(Problem("calibration_precision", given, text, "Give one of them."))
    return given or of_trainer


def ordered(stages: dict[str, Any], order: list[str] | None) -> dict[str, Any]:
    """The stages in ``order``.

    Raises:
        NotStarted: ``order`` does not name each stage exactly once.
    """
    if order is None:
        return stages
    problems = []
    for name in order:
        if name not in stages:
            text = f"Unknown stage '{name}'"
            problems.append(
                Problem("stage_order", order, text, suggest(name, stages).strip(), section="stage_order", complete=True)
            )
    if missing := [name for name in stages if name not in order]:
        problems.append(Problem("stage_order", order, f"leaves out {', '.join(missing)}", "Name every stage once."))
    if len(set(order)) != len(order):
        problems.append(Problem("stage_order", order, "names a stage twice", "Name every stage once."))
    if problems:
        raise NotStarted(problems)
    return {name: stages[name] for name in order}


def problems_behind(error: BaseException | None) -> list[Problem]:
    """The problems in ``error`` or its causes, raised by Lightning or by a class in the recipe."""
    while error is not None:
        if isinstance(error, RecipeError):
            return error.problems
        if isinstance(error, MisconfigurationException | ModuleNotFoundError):
            words = " ".join(str(error).split())
            return [Problem("trainer", text=words, way_out=CHANGE_OPTION, section="trainer")]
        if isinstance(error, OSError) and error.errno in NOT_WRITTEN:
            return [Problem(text=not_written(error.filename or "a file of the run", error))]
        error = error.__cause__
    return []


def _trainer_problem(config: dict[str, Any], error: Exception) -> Problem:
    """The option that Lightning's trainer refuses: without it, the trainer can be created."""
    words = " ".join(str(error).split())
    options = {key: value for key, value in config.items() if key not in ("callbacks", "logger") and value is not None}
    # Lightning's error does not name the option: leave them out one by one
    for name, value in options.items():
        others = {key: other for key, other in options.items() if key != name}
        try:
            CommandTrainer(**others, logger=False)
        except (MisconfigurationException, TypeError, ValueError):
            continue
        text = f"is not accepted ({words.rstrip('.')})"
        return Problem(f"trainer.{name}", value, text, CHANGE_OPTION, section="trainer")
    return Problem("trainer", text=words, way_out=CHANGE_OPTION, section="trainer")
