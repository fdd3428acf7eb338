"""The model and data of a run, in any form that Lightning accepts, and the calibration batches drawn from them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, Subset

from pqqp_lightning.errors import Problem, RecipeError

FALLBACK_SAMPLES = 128
"""Calibration samples taken from the training data if the datamodule has no ``calibration_dataloader``."""


@dataclass(frozen=True)
class RunData:
    """The model and its data as the user gave them: loaders, a datamodule, or a model with its own loaders.

    Attributes:
        module: the model.
        train: training loaders, if given.
        validation: evaluation loaders, if given.
        datamodule: a datamodule in place of loaders.
    """

    module: LightningModule
    train: Any = None
    validation: Any = None
    datamodule: LightningDataModule | None = None

    @property
    def owner(self) -> Any:
        """The datamodule or model whose loader hooks are called."""
        return self.datamodule if self.datamodule is not None else self.module

    def has(self, hook: str) -> bool:
        """Whether loaders were given or the owner defines ``hook``: ``train_dataloader`` or ``val_dataloader``."""
        given = self.train if hook == "train_dataloader" else self.validation
        base = LightningModule if self.datamodule is None else LightningDataModule
        return given is not None or is_overridden(hook, self.owner, base)

    def has_training_data(self) -> bool:
        """Whether there is training data.

        A datamodule whose class defines ``train_dataloader`` may still lack it: its ``has_training_data`` says so.
        """
        return self.has("train_dataloader") and getattr(self.datamodule, "has_training_data", True)

    def has_calibration_data(self) -> bool:
        """Whether there is calibration data, or training data to take it from."""
        return hasattr(self.owner, "calibration_dataloader") or self.has_training_data()

    def check(self) -> list[Problem]:
        """Problems of the data itself, and evaluation data that is missing."""
        problems = []
        if not self.has("val_dataloader"):
            way_out = "Add data: {class_path: TextData}, a datamodule or val_dataloaders."
            problems.append(Problem(text="there is no evaluation data", way_out=way_out).within("data"))
        check = getattr(self.datamodule, "check", None)
        return problems + (list(check()) if callable(check) else [])

    def read(self, trainer: Trainer) -> None:
        """Make the datamodule read its data now, so that its errors come before anything is written."""
        if self.datamodule is None or not trainer.is_global_zero:
            return
        # Text data asks the trainer for its model's tokenizer; Lightning connects them only when a loop starts.
        trainer.strategy.connect(self.module)
        self.datamodule.trainer = trainer
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")

    def calibration_batches(self, rank: int, ranks: int, limit: int | None) -> tuple[list[Any], Any]:
        """This rank's calibration batches, and a batch of one sample.

        Args:
            rank: of this process.
            ranks: number of processes; each takes every ``ranks``-th sample.
            limit: maximum number of batches (``fast_dev_run``).

        Raises:
            RecipeError: there are fewer samples than processes, or several training loaders to take them from.
        """
        loader = self._calibration_loader()
        dataset: Any = loader.dataset
        if not hasattr(dataset, "__len__"):  # a stream: its samples have no index, so whole batches are dealt out
            batches: list[Any] = list(islice(loader, limit or FALLBACK_SAMPLES))[rank::ranks]
            return batches, batches[0]
        if len(dataset) < ranks:
            text = f"needs at least one calibration sample per process: got {len(dataset)} for {ranks}"
            raise RecipeError(Problem(text=text, way_out="Use more samples.").within("data"))
        share = Subset(dataset, range(rank, len(dataset), ranks))
        batches = list(islice(self._plain_loader(share, loader), limit))
        one_sample = next(iter(DataLoader(share, batch_size=1, collate_fn=loader.collate_fn)))
        return batches, one_sample

    def probe_batch(self) -> Any:
        """One sample of the calibration data; without such data, the first evaluation batch."""
        if self.has_calibration_data():
            return self.calibration_batches(0, 1, 1)[1]
        loaders = self.evaluation_loaders()
        return next(iter(loaders[0] if isinstance(loaders, list | tuple) else loaders))

    def evaluation_loaders(self) -> Any:
        """The loaders of the validation data, as the user gave them."""
        return self.validation if self.validation is not None else self.owner.val_dataloader()

    def training_loaders(self) -> Any:
        """The loaders of the training data, as the user gave them."""
        return self.train if self.train is not None else self.owner.train_dataloader()

    def _calibration_loader(self) -> DataLoader[Any]:
        if self.train is None:
            self.owner.setup("fit")  # after trainer.validate, only the evaluation data is set up
        if hasattr(self.owner, "calibration_dataloader"):
            return self.owner.calibration_dataloader()
        loader = self.training_loaders()
        if not isinstance(loader, DataLoader):
            text = "the training data is not one DataLoader"
            raise RecipeError(Problem(text=text, way_out="Define calibration_dataloader().").within("data"))
        dataset: Any = loader.dataset
        if hasattr(dataset, "__len__"):
            first_samples = Subset(dataset, range(min(FALLBACK_SAMPLES, len(dataset))))
            return self._plain_loader(first_samples, loader)
        return loader

    @staticmethod
    def _plain_loader(dataset: Any, like: DataLoader[Any]) -> DataLoader[Any]:
        """A loader without shuffling, with the batch size and collation of ``like``."""
        return DataLoader(dataset, batch_size=like.batch_size or 1, collate_fn=like.collate_fn, shuffle=False)
