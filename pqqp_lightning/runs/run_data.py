"""The data of a run, as Lightning takes it (loaders or a datamodule), and the calibration batches drawn from it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, Subset

from pqqp_lightning.errors import Problem, RecipeError

FALLBACK_SAMPLES = 128
"""Calibration samples taken from the training data where the data does not say which."""


@dataclass(frozen=True)
class DataSource:
    """Exactly what the user gave: loaders, a datamodule, or a module with its own loaders.

    Attributes:
        module: the model.
        train: training loaders.
        validation: evaluation loaders.
        datamodule: a datamodule in place of both.
    """

    module: LightningModule
    train: Any = None
    validation: Any = None
    datamodule: LightningDataModule | None = None

    @property
    def owner(self) -> Any:
        """Who has the loader hooks."""
        return self.datamodule if self.datamodule is not None else self.module

    def has(self, hook: str) -> bool:
        """Whether there are loaders for ``"train_dataloader"`` or ``"val_dataloader"``."""
        given = self.train if hook == "train_dataloader" else self.validation
        return given is not None or is_overridden(hook, self.owner, self._parent())

    def has_training_data(self) -> bool:
        """Whether training data is there; a datamodule may know better than its class (``has_training_data``)."""
        return self.has("train_dataloader") and getattr(self.datamodule, "has_training_data", True)

    def has_calibration_data(self) -> bool:
        """Whether calibration batches can be had."""
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
        """Have the datamodule read its data now: what is wrong with it is found before anything is written."""
        if self.datamodule is None or not trainer.is_global_zero:
            return
        trainer.strategy.connect(self.module)
        self.datamodule.trainer = trainer
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")

    def calibration_batches(self, rank: int, ranks: int, limit: int | None) -> tuple[list[Any], Any]:
        """This rank's calibration batches, and a batch of one sample.

        Args:
            rank: this process.
            ranks: processes in all; samples are dealt out in turn.
            limit: at most so many batches (``fast_dev_run``).
        """
        loader = self._calibration_loader()
        dataset: Any = loader.dataset
        if not hasattr(dataset, "__len__"):
            batches: list[Any] = list(islice(loader, limit or FALLBACK_SAMPLES))[rank::ranks]
            return batches, batches[0]
        if len(dataset) < ranks:
            text = f"needs at least one calibration sample per process: got {len(dataset)} for {ranks}"
            raise RecipeError(Problem(text=text, way_out="Use more samples.").within("data"))
        mine = Subset(dataset, range(rank, len(dataset), ranks))
        batches = list(islice(self._loader(mine, loader), limit))
        return batches, next(iter(DataLoader(mine, batch_size=1, collate_fn=loader.collate_fn)))

    def evaluation_loaders(self) -> Any:
        """The loaders of the validation data, as the user gave them."""
        return self.validation if self.validation is not None else self.owner.val_dataloader()

    def training_loaders(self) -> Any:
        """The loaders of the training data, as the user gave them."""
        return self.train if self.train is not None else self.owner.train_dataloader()

    def _calibration_loader(self) -> DataLoader[Any]:
        if self.train is None:
            self.owner.setup("fit")  # only evaluation may have been set up
        if hasattr(self.owner, "calibration_dataloader"):
            return self.owner.calibration_dataloader()
        loader = self.training_loaders()
        if not isinstance(loader, DataLoader):
            text = "the training data is not one DataLoader"
            raise RecipeError(Problem(text=text, way_out="Define calibration_dataloader().").within("data"))
        dataset: Any = loader.dataset
        if hasattr(dataset, "__len__"):
            return self._loader(Subset(dataset, range(min(FALLBACK_SAMPLES, len(dataset)))), loader)
        return loader

    @staticmethod
    def _loader(dataset: Any, like: DataLoader[Any]) -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=like.batch_size or 1, collate_fn=like.collate_fn, shuffle=False)

    def _parent(self) -> Any:
        return LightningDataModule if self.datamodule is not None else LightningModule
