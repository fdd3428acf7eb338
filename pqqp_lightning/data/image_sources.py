"""Labelled images from a table, a folder tree or scikit-learn, all as uint8 tensors [C, H, W]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from pqqp_lightning.data.hub_tables import read_table, require_column
from pqqp_lightning.errors import Problem, RecipeError, suggest
from pqqp_lightning.models.loading import is_path

if TYPE_CHECKING:
    from datasets import Dataset as Table

DIGITS = "digits"
LABEL_NAMES = ("label", "labels", "fine_label")


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Examples ``(uint8 image [C, H, W], label)`` by index.

    Args:
        read: returns the image (PIL, or uint8 [1, H, W]) and the label at an index.
        count: number of examples.
        num_classes: number of classes, or None if unknown.
        channels: C: 1 for grey, 3 for colour; any other number repeats the grey image.
        classes: names of the classes, empty if they have none.
    """

    def __init__(
        self,
        read: Callable[[int], tuple[Any, int]],
        count: int,
        num_classes: int | None,
        channels: int,
        classes: Sequence[str] = (),
    ) -> None:
        self.read = read
        self.count = count
        self.num_classes = num_classes
        self.channels = channels
        self.classes = list(classes)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image, label = self.read(index)
            return to_tensor(image, self.channels), int(label)
        except (OSError, SyntaxError, TypeError, ValueError) as error:  # SyntaxError: Pillow's word for a broken PNG
            problem = Problem(text=f"image {index} or its label cannot be read ({error})", way_out="Remove it.")
            raise RecipeError(problem.within("data")) from error


class TransformedSubset(Dataset[tuple[Tensor, int]]):
    """Chosen images, transformed for the model.

    Args:
        images: the examples to choose from.
        indices: the chosen examples, in this order.
        transform: turns a uint8 image [C, H, W] into the model's input.
    """

    def __init__(self, images: LabelledImages, indices: Sequence[int], transform: Callable[[Tensor], Tensor]) -> None:
        self.images = images
        self.indices = indices
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[self.indices[index]]
        return self.transform(image), label


def collate(examples: list[tuple[Tensor, int]]) -> Any:
    """Stack examples into a batch ``(images [B, C, H, W], labels [B])``."""
    shapes = sorted({tuple(image.shape) for image, _ in examples})
    if len(shapes) > 1:
        text = f"the images differ in size ({shapes[0]} and {shapes[-1]} in one batch)"
        way_out = "Set data.image_size, or a resizing transform."
        raise RecipeError(Problem(text=text, way_out=way_out).within("data"))
    return default_collate(examples)


def read_digits(evaluation: bool, channels: int) -> LabelledImages:
    """scikit-learn's 1,797 scans of 8x8 pixels; a fixed fifth is held out for evaluation."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    held_out = len(order) // 5
    chosen = order[:held_out] if evaluation else order[held_out:]
    grey = torch.from_numpy(bunch.images)[chosen] * (255 / 16)  # scikit-learn's grey levels go from 0 to 16
    images = grey.round().to(torch.uint8).unsqueeze(1)  # [N, 1, 8, 8]
    labels = torch.from_numpy(bunch.target)[chosen].tolist()
    # Worker processes get the dataset pickled: functions of this module can be pickled, inner functions cannot.
    return LabelledImages(partial(_read_pair, images, labels), len(labels), 10, channels)


def is_image_tree(source: str) -> bool:
    """Whether ``source`` is a folder of the form ``split/class/image``."""
    folder = Path(source).expanduser()
    if not is_path(source) or not folder.is_dir():
        return False
    has_tables = any(folder.glob("*.parquet")) or any(folder.glob("*/*.parquet"))
    return not has_tables and any(folder.glob("*/*/*"))


def read_image_tree(source: str, split: str, channels: int) -> LabelledImages:
    """The images in ``source/split/class/``; the classes are numbered by their names' order."""
    from torchvision.datasets import ImageFolder

    root = Path(source).expanduser()
    if not (root / split).is_dir():
        splits = [child.name for child in root.iterdir() if child.is_dir()]
        way_out = suggest(split, splits).strip()
        raise RecipeError(Problem("source", source, f"has no split {split!r}", way_out).within("data"))
    try:
        folder = ImageFolder(str(root / split))
    except FileNotFoundError as error:
        raise RecipeError(
            Problem("source", source, f"has a split {split!r} that cannot be read: {error}").within("data")
        ) from error
    return LabelledImages(folder.__getitem__, len(folder), len(folder.classes), channels, folder.classes)


def read_image_table(
    source: str, config_name: str | None, split: str, image_column: str | None, label_column: str | None, channels: int
) -> LabelledImages:
    """The images of a hub data set or a parquet folder.

    Columns that are not named are found by type or by their usual names.
    """
    from datasets import ClassLabel, Image

    table = read_table(source, config_name, split)
    image = _find_image(table, source, image_column)
    label = _find_label(table, source, label_column)
    if not isinstance(table.features[image], Image):
        table = table.cast_column(image, Image())
    kind = table.features[label]
    if not isinstance(kind, ClassLabel) and "int" not in str(getattr(kind, "dtype", "")):
        text = f"of {source!r} contains {kind} instead of class numbers"
        raise RecipeError(Problem("label_column", label, text).within("data"))
    classes = kind.num_classes if isinstance(kind, ClassLabel) else max(table[label]) + 1
    names = kind.names if isinstance(kind, ClassLabel) else ()
    table = table.select_columns([image, label])  # reading a row decodes all of its columns
    return LabelledImages(partial(_read_row, table, image, label), len(table), classes, channels, names)


def _read_pair(images: Tensor, labels: list[int], index: int) -> tuple[Tensor, int]:
    return images[index], labels[index]


def _read_row(table: Table, image: str, label: str, index: int) -> tuple[Any, int]:
    row = table[index]
    return row[image], row[label]


def _find_image(table: Table, source: str, name: str | None) -> str:
    from datasets import Image

    if name is not None:
        return require_column(table, source, "image_column", name)
    candidates = [column for column, kind in table.features.items() if isinstance(kind, Image)]
    candidates += [column for column in table.column_names if column in ("image", "img")]
    if not candidates:
        way_out = f"Set image_column: {', '.join(table.column_names)}."
        raise RecipeError(Problem("source", source, "has no image column", way_out).within("data"))
    return candidates[0]


def _find_label(table: Table, source: str, name: str | None) -> str:
    from datasets import ClassLabel

    if name is not None:
        return require_column(table, source, "label_column", name)
    # Names come first: CIFAR-100 has a second label column of coarse classes.
    candidates = [column for column in LABEL_NAMES if column in table.column_names]
    candidates += [column for column, kind in table.features.items() if isinstance(kind, ClassLabel)]
    if not candidates:
        way_out = f"Set label_column: {', '.join(table.column_names)}."
        raise RecipeError(Problem("source", source, "has no label column", way_out).within("data"))
    return candidates[0]


def to_tensor(image: Any, channels: int) -> Tensor:
    """A uint8 tensor [C, H, W] of an image (PIL, or uint8 [1, H, W])."""
    if not isinstance(image, Tensor):
        from torchvision.transforms.v2.functional import pil_to_tensor

        image = pil_to_tensor(image.convert("RGB" if channels == 3 else "L"))
    return image.expand(channels, -1, -1) if image.shape[0] == 1 else image
