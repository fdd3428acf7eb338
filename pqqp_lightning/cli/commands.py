"""The command line: LightningCLI with stages by name, a run folder, and errors that show the way out."""

from __future__ import annotations

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
from jsonargparse import set_loader
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pqqp_lightning.calibration.layer_errors import SAMPLES
from pqqp_lightning.cli.diagnosis import check_sections, diagnose, refuse_nulls
from pqqp_lightning.cli.methods import print_methods
from pqqp_lightning.cli.parser import CommandLine, NotStarted, _refused
from pqqp_lightning.cli.saved_recipe import bundled, with_saved_recipe
from pqqp_lightning.cli.settings import (
    COMMAND_LINE,
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
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.experiments.analysis import analyze_pair
from pqqp_lightning.experiments.order import search_orders
from pqqp_lightning.experiments.sweep import MOST_POINTS, sweep_grid
from pqqp_lightning.report.pages import show_run
from pqqp_lightning.runs.trainer import Trainer, goes_on
from pqqp_lightning.stages.discovery import (
    import_from_working_folder,
    import_working_folder,
    known_stages,
    load_installed,
)
from pqqp_lightning.trials.executors import LOCAL


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
            show=show_run,
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
            show=show_run,
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
            show=show_run,
        )


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


def _report(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise RecipeError("usage: pqqp-lightning report RUN, as in pqqp-lightning report runs/quickstart")
    show_run(Path(arguments[0]))


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
