"""LightningCLI with stages by name and a run folder."""

from __future__ import annotations

import errno
import sys
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pqqp_lightning.cli.methods import summarize
from pqqp_lightning.cli.settings import ENVIRONMENT
from pqqp_lightning.errors import RecipeError, suggest
from pqqp_lightning.report.pages import show_run
from pqqp_lightning.stages.discovery import known_stages
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.storage.files import not_written
from pqqp_lightning.trials.fingerprint import DECIDING

NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}

SEARCHES = ("order", "sweep", "analyze")


class NotStarted(RecipeError):
    """What keeps a run from starting before its stages could look at the model."""


class CommandLine(LightningCLI):
    """LightningCLI with ``--stages``, ``--stage_order`` and ``--run_dir``."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Errors are raised, so that they can be worded; options can come from the environment."""
        kwargs |= {"exit_on_error": False, "default_env": True, "env_prefix": ENVIRONMENT}
        return super().init_parser(**kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The command that was asked for; making the parsers of all of them takes most of a short command's time."""
        skipped = {"model", "dataloaders", "datamodule", "train_dataloaders", "val_dataloaders", "weights_only"}
        return {sys.argv[1]: skipped}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our options beside Lightning's."""
        stages_help = f"Stages by name, in order. {summarize(known_stages())}"
        parser.add_argument("--stages", type=dict[str, Stage], default={}, help=stages_help)
        parser.add_argument("--stage_order", type=list[str] | None, default=None, help="The stages in another order.")
        parser.add_argument("--run_dir", type=str | None, default=None, help="The run folder.")

    def _parse_ckpt_path(self) -> None:
        """Lightning would take hyperparameters from the checkpoint; here the recipe says what the model is."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """A recipe that is no text is an error like others."""
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise ArgumentError(None, str(error)) from error

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise NotStarted(f"seed_everything={self._get(self.config, 'seed_everything')}: {error}.") from error

    def before_instantiate_classes(self) -> None:
        """Settle the run folder and the order of the stages before anything is built."""
        config = self.config[self.subcommand]
        config.run_dir = str(run_folder(config, self.subcommand or "fit"))
        config.trainer.default_root_dir = config.run_dir
        stages = {str(name): stage for name, stage in config.stages.items()}  # 1 and yes are no texts in YAML
        config.stages = ordered(stages, config.stage_order)
        config.stage_order = None

    def instantiate_classes(self) -> None:
        """Build the model, the data, the stages and the trainer; what they refuse comes out of the parser's errors."""
        try:
            super().instantiate_classes()
        except Exception as error:
            if problems := _refused(error):
                raise NotStarted(problems) from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """The trainer, with the stages at the head of its callbacks."""
        stages: dict[str, Stage] = self._get(self.config_init, "stages")
        for name, stage in stages.items():
            stage.name = name
        config = dict(self.config_init[self.subcommand]["trainer"])
        given = config.pop("callbacks") or []
        config["callbacks"] = [*stages.values(), *(given if isinstance(given, list) else [given])]
        if self.subcommand in ("validate", "test") and config["logger"] is None:
            config["logger"] = False  # the run's own logs stay as they are
        try:
            trainer = self.trainer_class(**config)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise RecipeError(_refused(error) or f"trainer: {error} Change the option, or leave it out.") from error
        trainer.recipe_text = self._resolved_recipe()
        resolved = yaml.safe_load(trainer.recipe_text)
        trainer.recipe = {key: resolved[key] for key in ("model", "data") if resolved.get(key) is not None}
        trainer.recipe["trainer"] = {key: resolved["trainer"][key] for key in DECIDING if key in resolved["trainer"]}
        return trainer

    def after_fit(self) -> None:
        """The table of the run."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            show_run(Path(self.trainer.default_root_dir))

    def _resolved_recipe(self) -> str:
        """The recipe with every default written out, runnable again."""
        config = self.config[self.subcommand].clone()
        for key in ("config", "ckpt_path"):
            config.pop(key, None)
        return self._parser(self.subcommand).dump(config, skip_none=False, skip_validation=True)


def run_folder(config: Namespace, command: str) -> Path:
    """``--run_dir``, or ``runs/`` and the names of the recipes (searches have folders of their own)."""
    if given := config.run_dir or config.trainer.default_root_dir:
        return Path(given)
    files = config.get("config") or []
    stem = "-".join(Path(str(file)).stem for file in files) or "run"
    return Path("runs") / (f"{stem}-{command}" if command in SEARCHES else stem)


def ordered(stages: dict[str, Any], order: list[str] | None) -> dict[str, Any]:
    """The stages in ``order``, which must name each of them once.

    Raises:
        NotStarted: it does not.
    """
    if order is None:
        return stages
    problems = [f"stage_order: '{name}' is no stage.{suggest(name, stages)}" for name in order if name not in stages]
    if missing := [name for name in stages if name not in order]:
        problems.append(f"stage_order={order} leaves out {', '.join(missing)}. Name every stage once.")
    if len(set(order)) != len(order):
        problems.append(f"stage_order={order} names a stage twice. Name every stage once.")
    if problems:
        raise NotStarted(problems)
    return {name: stages[name] for name in order}


def _refused(error: BaseException | None) -> list[str]:
    """What a class that the recipe names, or Lightning, refused with ``error`` or with a cause of it."""
    while error is not None:
        if isinstance(error, RecipeError):
            return error.problems
        if isinstance(error, MisconfigurationException | ModuleNotFoundError):
            return [f"trainer: {' '.join(str(error).split())} Change the option, or leave it out."]
        if isinstance(error, OSError) and error.errno in NOT_WRITTEN:
            return [not_written(error.filename or "a file of the run", error)]
        error = error.__cause__
    return []
