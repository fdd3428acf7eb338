"""The trainer of the command line. The signatures of its methods define the options of the commands."""

from __future__ import annotations

from functools import cache
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule

from pqqp_lightning.cli.command_table import COMMANDS
from pqqp_lightning.experiments import (
    AnalysisOptions,
    OrderOptions,
    PipelineOptions,
    SweepOptions,
    analyze_pair,
    search_orders,
    search_pipelines,
    sweep_grid,
)
from pqqp_lightning.report.pages import show_run
from pqqp_lightning.runs.calibration_precision import MatmulPrecision
from pqqp_lightning.runs.trainer import Trainer, is_resume

SECTIONS = ("model", "data", "trainer", "stages")

RECIPE_OPTIONS: dict[str, tuple[Any, str]] = {
    "stage_order": (list[str] | None, "The stages in another order."),
    "run_dir": (str | None, "The run folder."),
    "calibration_precision": (MatmulPrecision | None, "Short for trainer.calibration_precision."),
}
"""Options of every command beyond those of LightningCLI: type and help."""

NOT_OPTIONS = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders", "weights_only"}
"""Parameters of the trainer's methods that the recipe's sections set, or that have no effect (weights_only)."""


class CommandTrainer(Trainer):
    """Adds the commands ``order``, ``sweep``, ``search`` and ``analyze`` to the trainer.

    The parser reads the options of each command from the method's signature. jsonargparse finds in the method's source
    that ``**options`` are the fields of a dataclass.
    """

    def order(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        **options: Any,
    ) -> None:
        """Find the best order of the stages, each order from the same dense model.

        Args:
            model: the dense model.
            datamodule: its data.
            ckpt_path: "last" resumes the search in the run folder.
            options: the fields of OrderOptions.
        """
        chosen = OrderOptions(**options)
        search_orders(self, model, datamodule, chosen, resume=is_resume(ckpt_path, "order"), show=show_run)

    def sweep(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        **options: Any,
    ) -> None:
        """Measure a grid of arguments in every order, and test the hypothesis about the order of compression.

        Args:
            model: the dense model.
            datamodule: its data.
            ckpt_path: "last" resumes in the run folder; without it, known results are reused from the store only.
            options: the fields of SweepOptions.
        """
        chosen = SweepOptions(**options)
        sweep_grid(self, model, datamodule, chosen, resume=is_resume(ckpt_path, "sweep"), show=show_run)

    def search(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        **options: Any,
    ) -> None:
        """Find the best pipeline that fits a size: which stages, in which order, and how strong.

        Args:
            model: the dense model.
            datamodule: its data.
            ckpt_path: "last" resumes the search in the run folder.
            options: the fields of PipelineOptions.
        """
        chosen = PipelineOptions(**options)
        search_pipelines(self, model, datamodule, chosen, resume=is_resume(ckpt_path, "search"), show=show_run)

    def analyze(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        **options: Any,
    ) -> None:
        """Compare two stages layer by layer, alone and in both orders.

        Args:
            model: the dense model.
            datamodule: its data.
            ckpt_path: "last" resumes in the run folder; without it, known results are reused from the store only.
            options: the fields of AnalysisOptions.
        """
        chosen = AnalysisOptions(**options)
        analyze_pair(self, model, datamodule, chosen, resume=is_resume(ckpt_path, "analyze"), show=show_run)


@cache
def option_parser(command: str) -> ArgumentParser:
    """A parser of the options of ``command`` outside of the sections, as in the command line's parser."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    for name, (kind, _) in RECIPE_OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind)
    parser.add_method_arguments(CommandTrainer, command, skip=NOT_OPTIONS)
    return parser


def option_names(command: str) -> set[str]:
    """The names of the options of ``command`` outside of the sections."""
    return {action.dest for action in option_parser(command)._actions} - {"help", "print_shtab"}


def commands_with(option: str) -> list[str]:
    """The commands that have ``option``."""
    return [name for name, command in COMMANDS.items() if command.takes_recipe and option in option_names(name)]
