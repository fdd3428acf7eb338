"""The command line: LightningCLI with stages by name, a run folder, and errors that show the way out."""

from __future__ import annotations

import errno
import json
import logging
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, set_loader
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pqqp_lightning.analysis import analyze_pair
from pqqp_lightning.calibration.compare import SAMPLES
from pqqp_lightning.diagnosis import check_sections, diagnose, refuse_nulls
from pqqp_lightning.errors import RecipeError, suggest
from pqqp_lightning.executor import LOCAL
from pqqp_lightning.fingerprint import DECIDING
from pqqp_lightning.listing import print_methods, summarize
from pqqp_lightning.order import search_orders
from pqqp_lightning.page import write_pages
from pqqp_lightning.page.kinds import kind_of
from pqqp_lightning.saved_recipe import bundled, with_saved_recipe
from pqqp_lightning.settings import (
    COMMAND_LINE,
    ENVIRONMENT,
    Setting,
    load_yaml,
    merged_section,
    place,
    read_settings,
    recipe_name,
    replaced_stages,
    stage_class_names,
    without_section,
)
from pqqp_lightning.stage import Stage
from pqqp_lightning.stages import import_from_working_folder, import_working_folder, known_stages, load_installed
from pqqp_lightning.storage import not_written
from pqqp_lightning.sweep.search import MOST_POINTS, sweep_grid
from pqqp_lightning.trainer import Trainer, goes_on

NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
SEARCHES = ("order", "sweep", "analyze")


class NotStarted(RecipeError):
    """What keeps a run from starting before its stages could look at the model."""


class CommandTrainer(Trainer):
    """The command line's trainer: also has the commands that are not Lightning's."""

    def order(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        metric: str | None = None,
        higher_is_better: bool | None = None,
        strategy: str = "exhaustive",
        max_runs: int | None = None,
        time_limit: float | None = None,
        comparable_only: bool = False,
        repeats: int = 1,
        store: str | None = None,
        executor: str = LOCAL,
    ) -> None:
        """Find the best order of the stages, each order from the same dense model.

        Args:
            model: the dense model.
            datamodule: its data.
            ckpt_path: "last" to go on with the search in the run folder.
            metric: what decides; the model's own by default.
            higher_is_better: whether more of it is better; known for common metrics.
            strategy: "exhaustive" for all orders; "progressive" for the order from the weakest stage to the strongest
                and moves of one stage; "predict" to measure none, and only say which order calibration speaks for.
            max_runs: at most so many whole orders.
            time_limit: begin no further order after so many minutes.
            comparable_only: leave out orders that end larger than the smallest, or lose a constraint.
            repeats: measure the orders with so many draws of calibration samples.
            store: folder of results that searches share; "store" beside the run folder by default.
            executor: "local" for this process; "ray" for as many tasks at a time as there are processors, each with as
                many threads as torch has here (OMP_NUM_THREADS), on this machine or the cluster at RAY_ADDRESS.
        """
        search_orders(
            self,
            model,
            datamodule,
            resume=goes_on(ckpt_path, "order"),
            metric=metric,
            higher=higher_is_better,
            strategy=strategy,
            max_runs=max_runs,
            time_limit=time_limit,
            comparable_only=comparable_only,
            repeats=repeats,
            store=store,
            executor=executor,
            show=_show,
        )

    def sweep(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        metric: str | None = None,
        higher_is_better: bool | None = None,
        grid: dict[str, Any] = {},  # noqa: B006 (nobody changes it; the parser needs a mapping to add keys to)
        curve: str | None = None,
        curve_bits: list[int] = [],  # noqa: B006
        max_points: int = MOST_POINTS,
        time_limit: float | None = None,
        store: str | None = None,
        executor: str = LOCAL,
    ) -> None:
        """Measure a grid over knobs and orders, and what it says about the order of compression.

        Args:
            model: the dense model.
            datamodule: its data.
            ckpt_path: "last" to go on in the run folder; without it the store alone spares what is known.
            metric: what decides; the model's own by default.
            higher_is_better: whether more of it is better; known for common metrics.
            grid: the values of knobs, as in --grid.prune.sparsity [0.5,0.7].
            curve: the stage that quantizes, where the grid leaves it open.
            curve_bits: further bit widths for the curve of quantization alone.
            max_points: refuse a grid of more points.
            time_limit: begin nothing new after so many minutes.
            store: folder of results that searches share; "store" beside the run folder by default.
            executor: "local" for this process; "ray" for as many tasks at a time as there are processors, each with as
                many threads as torch has here (OMP_NUM_THREADS), on this machine or the cluster at RAY_ADDRESS.
        """
        sweep_grid(
            self,
            model,
            datamodule,
            grid,
            resume=goes_on(ckpt_path, "sweep"),
            metric=metric,
            higher=higher_is_better,
            curve=curve,
            curve_bits=curve_bits,
            max_points=max_points,
            time_limit=time_limit,
            store=store,
            executor=executor,
            show=_show,
        )

    def analyze(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        metric: str | None = None,
        higher_is_better: bool | None = None,
        samples: int = SAMPLES,
        store: str | None = None,
    ) -> None:
        """Compare, layer by layer, what two stages do alone and in both orders.

        Args:
            model: the dense model.
            datamodule: its data.
            ckpt_path: "last" to go on in the run folder; without it the store alone spares what is known.
            metric: what the orders are judged by; the model's own by default.
            higher_is_better: whether more of it is better; known for common metrics.
            samples: calibration samples on which the layers' outputs are compared.
            store: folder of results that searches share; "store" beside the run folder by default.
        """
        analyze_pair(
            self,
            model,
            datamodule,
            resume=goes_on(ckpt_path, "analyze"),
            metric=metric,
            higher=higher_is_better,
            samples=samples,
            store=store,
            show=_show,
        )


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
            _show(Path(self.trainer.default_root_dir))

    def _resolved_recipe(self) -> str:
        """The recipe with every default written out, runnable again."""
        config = self.config[self.subcommand].clone()
        for key in ("config", "ckpt_path"):
            config.pop(key, None)
        return self._parser(self.subcommand).dump(config, skip_none=False, skip_validation=True)


def run_command(arguments: Sequence[str]) -> None:
    """Run one command of the command line.

    Raises:
        RecipeError: with every problem of the recipe.
    """
    _quiet_the_libraries()
    for warning in load_installed():
        print(warning, file=sys.stderr)
    command, *rest = arguments
    if command == "methods":
        if rest:
            raise RecipeError("usage: pqqp-lightning methods")
        for warning in import_working_folder():
            print(warning, file=sys.stderr)
        print_methods(known_stages())
    elif command == "report":
        _report(rest)
    else:
        _recipe_command(command, rest)


def _quiet_the_libraries() -> None:
    """Keep what libraries say about themselves out of the way of progress bars and tables."""
    for logger in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    for message in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        r"The number of training batches",
        r".*does not have many workers",
        r"`weights_only` was not set",
    ):
        warnings.filterwarnings("ignore", message=message)


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


def _report(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise RecipeError("usage: pqqp-lightning report RUN, as in pqqp-lightning report runs/quickstart")
    _show(Path(arguments[0]))


def _show(folder: Path) -> None:
    """Print what a run, a search or a sweep found, and write it as a page."""
    kind_of(folder).show(folder)
    html, markdown = write_pages(folder)
    print(f"{html}: the same with plots, for a browser. {markdown}: as text.")


def _recipe_command(command: str, arguments: list[str]) -> None:
    _import_models_and_data()
    arguments = with_saved_recipe(command, [bundled(argument) for argument in arguments])
    set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
    settings, unread = read_settings(command, arguments)
    for name in stage_class_names(settings):
        if name not in known_stages():
            import_from_working_folder(name)
    if not unread:
        refuse_nulls(command, settings)
        for note in replaced_stages(settings):
            rank_zero_only(print)(note)
    given = _with_one_grid(arguments, settings) if command == "sweep" else arguments
    sys.argv[1:] = [command, *given]  # also what the processes of a distributed run are started with
    try:
        CommandLine(
            LightningModule,
            save_config_callback=None,
            trainer_class=CommandTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
        )
    except ArgumentError as error:
        raise RecipeError(diagnose(command, arguments, error)) from error
    except (RecipeError, MisconfigurationException, OSError) as error:
        if not (refused := _refused(error)):
            raise
        problems = place(refused, settings, recipe_name(arguments) or COMMAND_LINE)
        more = check_sections(settings) if isinstance(error, NotStarted) else []
        raise RecipeError(dict.fromkeys([*problems, *more])) from error


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


def _import_models_and_data() -> None:
    """So that bare class names are known."""
    for module in ("models.causal_lm", "models.image_classifier", "data.text", "data.tokens", "data.images"):
        import_module(f"pqqp_lightning.{module}")


def _with_one_grid(arguments: list[str], settings: list[Setting]) -> list[str]:
    """The whole grid as one option: of two knobs of one stage, the parser would keep the last alone."""
    grid = merged_section(settings, "grid")
    if not grid or not isinstance(grid, dict):
        return arguments
    return [*without_section(arguments, "grid"), f"--grid={json.dumps(grid, default=str)}"]
