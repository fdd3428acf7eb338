"""Images from scikit-learn, parquet folders and trees of folders, with named transforms."""

import io
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pqqp_lightning.data import ImageData
from pqqp_lightning.data.augmentation import IMAGENET_MEAN, IMAGENET_STD
from pqqp_lightning.errors import RecipeError

PQQP_DATA = Path(os.environ.get("PQQP_DATA", Path(__file__).parents[2] / "shared" / "data"))
PLAIN = {"mean": [0.0], "std": [1.0]}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def picture(value, size=(8, 8)):
    return Image.fromarray(np.full((*size, 3), value, np.uint8))


def encoded(value, size=(8, 8)):
    buffer = io.BytesIO()
    picture(value, size).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def parquet(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    kinds = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["a", "b", "c"])})
    for split, values in (("train", range(0, 60, 10)), ("test", (100, 200))):
        rows = {"img": [encoded(v) for v in values], "fine_label": [v // 10 % 3 for v in values]}
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


@pytest.fixture
def tree(tmp_path):
    for split, values in (("train", range(6)), ("test", (6, 7))):
        for value in values:
            folder = tmp_path / "tree" / split / ("odd" if value % 2 else "even")
            folder.mkdir(parents=True, exist_ok=True)
            picture(value * 10).save(folder / f"{value}.png")
    return tmp_path / "tree"


def gather(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_digits_need_nothing_else():
    module = ImageData()
    assert module.check() == []
    module.prepare_data()
    module.setup("fit")
    images, labels = gather(module.val_dataloader())
    assert images.shape == (359, 3, 32, 32)
    assert set(labels.tolist()) == set(range(10))
    assert module.num_classes == 10
    train = gather(module.train_dataloader())[0]
    assert len(train) == 1797 - 359
    seen = {image.numpy().tobytes() for image in images}
    assert sum(image.numpy().tobytes() in seen for image in train) < 3, "the parts do not overlap"
    grey = ImageData(channels=1, image_size=16, **PLAIN)
    grey.setup("validate")
    images = gather(grey.val_dataloader())[0]
    assert images.shape == (359, 1, 16, 16)
    assert images.min() == 0
    assert 0.9 < images.max() <= 1


def test_a_parquet_folder_is_read_by_its_types(parquet):
    module = ImageData(str(parquet), calibration_samples=4, batch_size=2)
    assert module.check() == []
    module.setup("fit")
    images, labels = gather(module.val_dataloader())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.allclose(images[1], (torch.full((3, 8, 8), 200 / 255) - mean) / std)
    assert labels.tolist() == [1, 2]
    assert module.num_classes == 3
    assert len(gather(module.train_dataloader())[0]) == 6


def test_columns_without_types_are_found_by_their_names(tmp_path):
    rows = {"id": ["x", "y"], "image": [encoded(1), encoded(2)], "labels": [0, 4]}
    pq.write_table(pa.table(rows), tmp_path / "test.parquet")
    module = ImageData(str(tmp_path))
    module.setup("validate")
    assert gather(module.val_dataloader())[1].tolist() == [0, 4]
    assert module.num_classes == 5
    with pytest.raises(RecipeError, match=r"image_column='imag' is not a column of .*Did you mean 'image'"):
        ImageData(str(tmp_path), image_column="imag").setup("validate")
    with pytest.raises(RecipeError, match=r"label_column='id' of .* contains .* instead of class numbers"):
        ImageData(str(tmp_path), label_column="id").setup("validate")


def test_tables_without_images_or_labels_are_refused(tmp_path):
    pq.write_table(pa.table({"number": [1]}), tmp_path / "test.parquet")
    with pytest.raises(RecipeError, match=r"has no image column\. Set image_column: number"):
        ImageData(str(tmp_path)).setup("validate")
    pq.write_table(pa.table({"img": [encoded(1)], "kind": [1]}), tmp_path / "test.parquet")
    with pytest.raises(RecipeError, match=r"has no label column\. Set label_column: img, kind"):
        ImageData(str(tmp_path)).setup("validate")


def test_a_tree_of_folders(tree):
    module = ImageData(str(tree), calibration_samples=2, **PLAIN)
    module.setup("fit")
    images, labels = gather(module.val_dataloader())
    assert labels.tolist() == [0, 1]
    assert torch.allclose(images[:, 0, 0, 0], torch.tensor([60, 70]) / 255)
    assert module.num_classes == 2
    with pytest.raises(RecipeError, match=r"has no split 'tests'\. Did you mean 'test'"):
        ImageData(str(tree), evaluation_split="tests").setup("validate")
    (tree / "test" / "third").mkdir()
    picture(1).save(tree / "test" / "third" / "x.png")
    with pytest.raises(RecipeError, match=r"differ in classes: third"):
        ImageData(str(tree)).setup("fit")


def test_an_image_that_cannot_be_read_is_named(tree):
    (tree / "test" / "odd" / "7.png").write_bytes(b"junk")
    module = ImageData(str(tree))
    module.setup("validate")
    with pytest.raises(RecipeError, match=r"image 1 or its label cannot be read"):
        gather(module.val_dataloader())


def test_images_of_several_sizes_need_a_common_one(tree):
    picture(1, (20, 12)).save(tree / "test" / "odd" / "7.png")
    module = ImageData(str(tree))
    module.setup("validate")
    with pytest.raises(RecipeError, match=r"differ in size .*Set data\.image_size"):
        gather(module.val_dataloader())
    module = ImageData(str(tree), image_size=16)
    module.setup("validate")
    assert gather(module.val_dataloader())[0].shape == (2, 3, 16, 16)


def test_augmentation_follows_the_global_random_state_and_spares_evaluation(parquet):
    steps = [{"RandomCrop": {"size": 8, "padding": 4}}, "RandomHorizontalFlip"]
    module = ImageData(str(parquet), train_transforms=steps, calibration_samples=6)
    module.setup("fit")

    def train():
        return gather(module.train_dataloader())[0]

    torch.manual_seed(0)
    first, second = train(), train()
    torch.manual_seed(0)
    assert torch.equal(train(), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    assert torch.equal(gather(module.calibration_dataloader())[0], gather(module.calibration_dataloader())[0])
    gather(module.val_dataloader())
    assert torch.equal(torch.get_rng_state(), state)


def test_fewer_images_are_drawn_by_the_seed(parquet):
    def labels(**options):
        module = ImageData(str(parquet), calibration_samples=3, **PLAIN, **options)
        module.setup("fit")
        calibration = gather(module.calibration_dataloader())[0][:, 0, 0, 0]
        return calibration.tolist(), len(gather(module.train_dataloader())[0])

    assert labels(train_samples=4) == labels(train_samples=4)
    assert labels(train_samples=4)[1] == 4
    assert labels()[1] == 6
    assert len({tuple(labels(seed=seed)[0]) for seed in range(6)}) > 1


def test_cifar_from_its_folder():
    folder = PQQP_DATA / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"CIFAR-10 is not at {folder}: set PQQP_DATA")
    module = ImageData(str(folder), evaluation_samples=20, train_samples=10, calibration_samples=5, num_workers=1)
    module.setup("fit")
    images, labels = gather(module.val_dataloader())
    assert images.shape == (20, 3, 32, 32)
    assert len(set(labels.tolist())) > 3
    assert module.num_classes == 10


def test_loaders_work_with_worker_processes(parquet):
    module = ImageData(str(parquet), calibration_samples=4, num_workers=2)
    module.setup("fit")
    assert len(gather(module.train_dataloader())[0]) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"train_transforms": ["RandomHorizontalFlop"]},
            r"train_transforms\[0\]='RandomHorizontalFlop' .*Did you mean 'RandomHorizontalFlip'",
        ),
        ({"evaluation_transforms": [{"Resize": {"sise": 3}}]}, r"evaluation_transforms\[0\]=\{'Resize'.*'sise'"),
        ({"train_transforms": ["Pad"]}, r"train_transforms\[0\]='Pad' is not accepted"),
        ({"train_transforms": ["MixUp"]}, r"'MixUp' is not a transform of single images"),
        ({"train_transforms": [3]}, r"train_transforms=\[3\] should be \[text or {name: a value}, ...\] or null"),
        ({"train_transforms": ["xxx"], "evaluation_transforms": ["yyy"]}, r"'xxx'[^\n]*\n[^\n]*'yyy'"),
        ({"mean": [0.1, 0.2]}, r"mean=\[0\.1, 0\.2\] has 2 numbers for 3 channels"),
        ({"std": [0.0]}, r"std=\[0\.0\] contains a number that is not above 0"),
        ({"image_size": 0, "channels": 0}, r"image_size=0 is too small[^\n]*\n.*channels=0"),
        ({"source": "digit"}, r"source='digit' is not built in\. Did you mean 'digits'"),
        ({"source": "./nowhere"}, r"does not exist \(looked at /"),
        ({"evaluation_samples": 999}, r"evaluation_samples=999 is more than the 359 images in the evaluation split"),
        ({"calibration_samples": 9999}, r"calibration_samples=9999 is more than the 1438 images in the train split"),
        ({"source": "org/nothing"}, r"'org/nothing' cannot be loaded from the hub \(split 'test'\)"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments, message):
    with pytest.raises(RecipeError, match=message):
        ImageData(**arguments).setup("fit")
