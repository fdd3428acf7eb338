"""Labelled images, transformed and normalised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from pqqp_lightning.argument_types import refuse_wrong_types
from pqqp_lightning.data import hub_tables as sources
from pqqp_lightning.data import image_sources as pictures
from pqqp_lightning.data.augmentation import Preprocessing, Spec, build_pipeline, normalization
from pqqp_lightning.data.loaders import (
    check_positive,
    draw_indices,
    evaluation_loader,
    fixed_loader,
    require_samples,
    train_loader,
)
from pqqp_lightning.errors import Problem, RecipeError


class ImageData(LightningDataModule):
    """Images and their classes; batches are ``(images [B, C, H, W], labels [B])``.

    Sample YAML::

        data:
          class_path: ImageData
          init_args:
            source: uoft-cs/cifar10
            train_transforms: [{RandomCrop: {size: 32, padding: 4}}, RandomHorizontalFlip]

    Args:
        source: a hub id; a local folder in the hub's layout, or of the form split/class/image; or ``digits``,
            scikit-learn's 8x8 scans, offline.
        config_name: the data set's configuration on the hub, or the subfolder of a local folder.
        train_transforms: transforms for finetuning, by their names in torchvision.transforms.v2, in order.
        evaluation_transforms: transforms for validation, test and calibration.
        image_size: pixels; scale the shorter side to it and crop the centre, before the transforms. null keeps each
            image's size (``digits``: 32).
        channels: 3 for colour, 1 for grey.
        image_column: the column that holds the images; null finds it.
        label_column: the column that holds the labels; null finds it.
        mean: per channel, after scaling to 0..1; null takes ImageNet's.
        std: standard deviation per channel, as ``mean``.
        batch_size: images per batch in training and evaluation.
        calibration_samples: images for calibration, drawn from the train split by ``seed``.
        calibration_batch_size: images per batch in calibration.
        evaluation_samples: images of the evaluation split to use, drawn by ``seed``; null for all.
        train_samples: images of the train split for finetuning, drawn by ``seed``; null for all.
        train_split: split for finetuning and calibration.
        evaluation_split: split for validation and test.
        seed: decides which images are drawn, and the order of training.
        num_workers: processes that load batches.

    Raises:
        RecipeError: from ``setup`` and the dataloaders. ``check`` lists the problems that show without reading data.
    """

    def __init__(
        self,
        source: str = pictures.DIGITS,
        config_name: str | None = None,
        train_transforms: list[str | dict[str, Any]] | None = None,
        evaluation_transforms: list[str | dict[str, Any]] | None = None,
        image_size: int | None = None,
        channels: int = 3,
        image_column: str | None = None,
        label_column: str | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        batch_size: int = 64,
        calibration_samples: int = 128,
        calibration_batch_size: int = 32,
        evaluation_samples: int | None = None,
        train_samples: int | None = None,
        train_split: str = "train",
        evaluation_split: str = "test",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        refuse_wrong_types(ImageData.__init__, locals(), "data")
        self.source = sources.expand_variables(source)
        self.config_name = config_name
        self.train_transforms: Sequence[Spec] = train_transforms or ()
        self.evaluation_transforms: Sequence[Spec] = evaluation_transforms or ()
        self.image_size = 32 if image_size is None and source == pictures.DIGITS else image_size
        self.channels = channels
        self.mean, self.std = mean, std
        self.image_column, self.label_column = image_column, label_column
        self.batch_size = batch_size
        self.calibration_samples, self.calibration_batch_size = calibration_samples, calibration_batch_size
        self.evaluation_samples = evaluation_samples
        self.train_samples = train_samples
        self.train_split, self.evaluation_split = train_split, evaluation_split
        self.seed = seed
        self.calibration_seed = seed  # repeated measurements draw other calibration images, all else unchanged
        self.num_workers = num_workers
        self._images: dict[bool, pictures.LabelledImages] = {}  # by whether they are for evaluation

    @property
    def num_classes(self) -> int | None:
        """How many classes there are; None before ``setup``."""
        counts = [images.num_classes for images in self._images.values() if images.num_classes is not None]
        return max(counts, default=None)

    def check(self) -> list[Problem]:
        """Problems that can be seen without reading the data."""
        problems = check_positive(
            image_size=self.image_size,
            channels=self.channels,
            batch_size=self.batch_size,
            calibration_batch_size=self.calibration_batch_size,
            calibration_samples=self.calibration_samples,
            evaluation_samples=self.evaluation_samples,
            train_samples=self.train_samples,
        )
        problems += check_positive(0, num_workers=self.num_workers) + sources.check_path(self.source)
        problems += sources.check_builtin(self.source, pictures.DIGITS)
        for argument, given in (("mean", self.mean), ("std", self.std)):
            if given is not None and len(given) not in (1, self.channels):
                text = f"has {len(given)} numbers for {self.channels} channels"
                problems.append(Problem(argument, given, text).within("data"))
        if self.std is not None and min(self.std, default=1) <= 0:
            problems.append(Problem("std", self.std, "contains a number that is not above 0").within("data"))
        return problems + ([] if problems else self._check_transforms())

    def prepare_data(self) -> None:
        """Download, once per machine."""
        self._refuse_problems()
        if self.source != pictures.DIGITS:
            sources.download(self.source, self.config_name)

    def setup(self, stage: str | None = None) -> None:
        """Open the splits that ``stage`` needs; those already open are kept."""
        self._refuse_problems()
        self._evaluation_subset()
        if stage in (None, "fit"):
            self._train_subset()
            self._calibration_subset()

    def train_dataloader(self) -> DataLoader[Any]:
        """The training images, in an order that depends on (seed, epoch); augmentation uses the global random state."""
        return train_loader(self._train_subset(), self.batch_size, self.seed, self.num_workers, pictures.collate)

    def val_dataloader(self) -> DataLoader[Any]:
        """The evaluation images."""
        return evaluation_loader(self._evaluation_subset(), self.batch_size, self.num_workers, pictures.collate)

    def test_dataloader(self) -> DataLoader[Any]:
        """The evaluation images."""
        return self.val_dataloader()

    def calibration_dataloader(self) -> DataLoader[Any]:
        """The calibration images, without augmentation; the seed decides which."""
        return fixed_loader(self._calibration_subset(), self.calibration_batch_size, self.num_workers, pictures.collate)

    def image_preprocessing(self, *, read: bool = True) -> Preprocessing:
        """How evaluation images become inputs, for a run to keep.

        Args:
            read: also read the names of the classes and an image's size; the data must then be there.
        """
        mean, std = normalization(self.channels, self.mean, self.std)
        known = Preprocessing(self.channels, mean, std, self.image_size, list(self.evaluation_transforms))
        if not read:
            return known
        image, _ = self._evaluation_subset()[0]
        return replace(known, input_size=list(image.shape[-2:]), classes=self._read(True).classes)

    def _refuse_problems(self) -> None:
        problems = self.check()
        if problems:
            raise RecipeError(problems)

    def _train_subset(self) -> pictures.TransformedSubset:
        return self._subset(False, "train_samples", "train_transforms", self.seed)

    def _evaluation_subset(self) -> pictures.TransformedSubset:
        return self._subset(True, "evaluation_samples", "evaluation_transforms", self.seed)

    def _calibration_subset(self) -> pictures.TransformedSubset:
        return self._subset(False, "calibration_samples", "evaluation_transforms", self.calibration_seed)

    def _subset(self, evaluation: bool, samples: str, transforms: str, seed: int) -> pictures.TransformedSubset:
        """Draw images of one split; ``samples`` and ``transforms`` name the arguments that say how many and which."""
        images = self._read(evaluation)
        split = "evaluation" if evaluation else "train"
        count = require_samples(len(images), samples, getattr(self, samples), f"images in the {split} split")
        return pictures.TransformedSubset(images, draw_indices(len(images), count, seed), self._pipeline(transforms))

    def _read(self, evaluation: bool) -> pictures.LabelledImages:
        if evaluation not in self._images:
            self._images[evaluation] = self._open(evaluation)
            # Folder trees number their classes by name: another set of classes would shift every label.
            classes = [images.classes for images in self._images.values()]
            if classes[0] != classes[-1]:
                differing = sorted(set(classes[0]) ^ set(classes[-1]))
                text = f"has splits that differ in classes: {', '.join(differing[:5])}"
                raise RecipeError(Problem("source", self.source, text).within("data"))
        return self._images[evaluation]

    def _open(self, evaluation: bool) -> pictures.LabelledImages:
        if self.source == pictures.DIGITS:
            return pictures.read_digits(evaluation, self.channels)
        split = self.evaluation_split if evaluation else self.train_split
        if pictures.is_image_tree(self.source):
            return pictures.read_image_tree(self.source, split, self.channels)
        return pictures.read_image_table(
            self.source, self.config_name, split, self.image_column, self.label_column, self.channels
        )

    def _pipeline(self, argument: str) -> nn.Module:
        mean, std = normalization(self.channels, self.mean, self.std)
        return build_pipeline(getattr(self, argument), argument, self.image_size, mean, std)

    def _check_transforms(self) -> list[Problem]:
        problems = []
        for argument in ("train_transforms", "evaluation_transforms"):
            try:
                self._pipeline(argument)
            except RecipeError as error:
                problems += error.problems
        return problems
