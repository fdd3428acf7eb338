"""The model and data of a run, in any form that Lightning accepts, and the calibration batches drawn from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset, Subset

from pqqp_lightning.calibration.walk import samples_in
from pqqp_lightning.checkpoint.nested import tensors_in
from pqqp_lightning.errors import Problem, RecipeError

FALLBACK_SAMPLES = 128
"""Calibration samples taken from the training data if the datamodule has no ``calibration_dataloader``."""
PROBE_SAMPLES, PROBE_BYTES = 8, 1 << 16
"""Evaluation samples on which a checkpoint's model is compared after loading, and the bytes up to which several are."""


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
        for what, given in (("training", self.train), ("evaluation", self.validation)):
            if isinstance(given, Iterator):  # the run reads its data many times
                text = f"the {what} data can be iterated only once ({type(given).__name__})"
                problems.append(Problem(text=text, way_out="Give a DataLoader.").within("data"))
        check = getattr(self.datamodule, "check", None)
        return problems + (list(check()) if callable(check) else [])

    def read(self, trainer: Trainer, *, every_rank: bool = False) -> None:
        """Make the datamodule read its data now, so that its errors come before anything is written.

        Args:
            trainer: the datamodule finds it as ``self.trainer``.
            every_rank: on the first rank only by default.
        """
        if self.datamodule is None or not (trainer.is_global_zero or every_rank):
            return
        # Text data asks the trainer for its model's tokenizer; Lightning connects them only when a loop starts.
        trainer.strategy.connect(self.module)
        self.datamodule.trainer = trainer
        if trainer.is_global_zero:
            self.datamodule.prepare_data()
        self.datamodule.setup("fit")

    def check_read(self, *, calibrates: bool, trains: bool) -> list[Problem]:
        """Problems that show only when the data is there. Call it after :meth:`read`.

        Args:
            calibrates: whether a stage takes calibration data.
            trains: whether a stage trains.
        """
        if hasattr(self.owner, "calibration_dataloader") or (self.train is None and self.datamodule is None):
            return []  # a datamodule that was made for calibration; or loaders that the model makes in a run only
        if not self.has_training_data() or not (calibrates or trains):
            return []
        loaders = self.training_loaders()
        problems = _check_source(_alone(loaders)) if calibrates else []
        if trains and _length(loaders) == 0:
            problems.append(no_training_batch())
        return problems

    def calibration_batches(self, rank: int, ranks: int, limit: int | None) -> tuple[list[Any], Any]:
        """This rank's calibration batches, and a batch of one sample where the data has samples.

        Args:
            rank: of this process.
            ranks: number of processes; each takes every ``ranks``-th sample.
            limit: maximum number of batches (``fast_dev_run``).

        Raises:
            RecipeError: there are fewer samples than processes, or several training loaders to take them from.
        """
        loader = self._calibration_loader()
        dataset = _indexed_dataset(loader)
        if dataset is None:  # a stream: its samples have no index, so whole batches are dealt out
            batches = list(islice(loader, limit or FALLBACK_SAMPLES))[rank::ranks]
            if not batches:
                text = f"needs at least one calibration batch per process, of which there are {ranks}"
                raise RecipeError(Problem(text=text, way_out="Use more samples, or smaller batches.").within("data"))
            return batches, batches[0]
        if len(dataset) < ranks:
            text = f"needs at least one calibration sample per process: got {len(dataset)} for {ranks}"
            raise RecipeError(Problem(text=text, way_out="Use more samples.").within("data"))
        share = Subset(dataset, range(rank, len(dataset), ranks))
        batches = list(islice(_plain_loader(share, loader), limit))
        # BatchNorm without running statistics computes with those of the batch, and refuses a single sample.
        norms = [module for module in self.module.modules() if isinstance(module, _BatchNorm)]
        samples = 2 if any(norm.running_mean is None for norm in norms) else 1
        return batches, next(iter(_plain_loader(share, loader, batch_size=samples)))

    def calibration_probe(self) -> Any:
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

    def probe_batch(self) -> Any:
        """A batch of the first evaluation samples: one, or up to ``PROBE_SAMPLES`` if they are small."""
        loader = self._first_evaluation_loader()
        dataset = _indexed_dataset(loader)
        if dataset is None or _gives_batches(loader):
            return next(iter(loader))
        batch: Any = None
        for samples in (1, min(PROBE_SAMPLES, len(dataset))):
            larger = next(iter(_plain_loader(Subset(dataset, range(samples)), loader, samples)))
            if batch is None or sum(tensor.nbytes for tensor in tensors_in(larger)) <= PROBE_BYTES:
                batch = larger
        return batch

    def first_samples(self, count: int, *, calibration: bool = False) -> Any:
        """A batch of the first ``count`` evaluation or calibration samples; without an index, the first batch."""
        loader = self._calibration_loader() if calibration else self._first_evaluation_loader()
        dataset = _indexed_dataset(loader)
        if dataset is None or _gives_batches(loader):
            return next(iter(loader))
        count = min(count, len(dataset))
        return next(iter(_plain_loader(Subset(dataset, range(count)), loader, count)))

    def first_evaluation_batch(self) -> Any:
        """The first batch of the first evaluation loader, as it comes from there."""
        return next(iter(self._first_evaluation_loader()))

    def _first_evaluation_loader(self) -> Any:
        loaders = self.evaluation_loaders()
        while isinstance(loaders, Mapping | list | tuple | CombinedLoader):
            if isinstance(loaders, CombinedLoader):
                loaders = loaders.flattened
            loaders = next(iter(loaders.values() if isinstance(loaders, Mapping) else loaders))
        return loaders

    def _calibration_loader(self) -> Any:
        """The loader to calibrate from; of training data, its first samples only.

        Raises:
            RecipeError: it gives something else than one batch at a time.
        """
        if self.train is None:
            self.owner.setup("fit")  # after trainer.validate, only the evaluation data is set up
        own = hasattr(self.owner, "calibration_dataloader")
        loader = self.owner.calibration_dataloader() if own else _alone(self.training_loaders())
        if problems := _check_source(loader):
            raise RecipeError(problems)
        if own:
            return loader
        dataset = _indexed_dataset(loader)
        if dataset is None:
            return _first_batches(loader)
        count = min(FALLBACK_SAMPLES, len(dataset))
        if _gives_batches(loader):
            count = len(list(_first_batches(dataset[i] for i in range(len(dataset)))))
        return _plain_loader(Subset(dataset, range(count)), loader)


def no_training_batch() -> Problem:
    """The problem of training data that is there, but gives no batch."""
    way_out = "Give more samples, a smaller batch size, or drop_last=False."
    return Problem(text="the training data has no batch", way_out=way_out).within("data")


def _alone(loaders: Any) -> Any:
    """The loader in a list of one, or ``loaders`` itself."""
    return loaders[0] if isinstance(loaders, list | tuple) and len(loaders) == 1 else loaders


def _indexed_dataset(loader: Any) -> Any:
    """The loader's dataset if its samples can be taken by index, else None."""
    dataset = getattr(loader, "dataset", None)
    indexed = isinstance(loader, DataLoader) and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return dataset if indexed and not isinstance(dataset, IterableDataset) else None


def _gives_batches(loader: DataLoader[Any]) -> bool:
    """Whether the dataset's items are whole batches: ``DataLoader(batch_size=None)``."""
    return loader.batch_size is None and loader.batch_sampler is None


def _plain_loader(dataset: Any, like: DataLoader[Any], batch_size: int | None = None) -> DataLoader[Any]:
    """A loader without shuffling, with the batch size (unless given) and the collation of ``like``."""
    size = None if _gives_batches(like) else batch_size or like.batch_size or 1
    return DataLoader(dataset, batch_size=size, collate_fn=like.collate_fn, shuffle=False)


def _first_batches(loader: Iterable[Any]) -> Iterator[Any]:
    """The first batches of ``loader`` in its order, as many as have ``FALLBACK_SAMPLES`` samples."""
    samples = 0
    for batch in loader:
        yield batch
        samples += samples_in(batch)
        if samples >= FALLBACK_SAMPLES:
            return


def _check_source(loader: Any) -> list[Problem]:
    """The problem of data that gives something else than one batch at a time."""
    if isinstance(loader, Iterable) and not isinstance(loader, Mapping | list | tuple | str | CombinedLoader):
        return []
    several = isinstance(loader, Mapping | list | tuple | CombinedLoader)
    text = f"the data to calibrate from is {'several loaders' if several else type(loader).__name__}, not one loader"
    way_out = "Define calibration_dataloader() in the datamodule or the model, with one loader."
    return [Problem(text=text, way_out=way_out).within("data")]


def _length(loaders: Any) -> int | None:
    """The number of batches, if the loader knows it."""
    try:
        return len(loaders)
    except (TypeError, NotImplementedError):
        return None
