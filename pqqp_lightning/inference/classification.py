"""Classifies image files with a run's model, prepared as the run prepared its evaluation images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule
from torch import Tensor
from tqdm.auto import tqdm

from pqqp_lightning.argument_types import path_problems, wrong_types
from pqqp_lightning.data.augmentation import Preprocessing
from pqqp_lightning.data.image_sources import to_tensor
from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.inference.finished_run import load_for_use
from pqqp_lightning.storage.files import read_json, write_csv
from pqqp_lightning.storage.run_folder import RunFolder, check_run_folder, check_writable, files_beside_model

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Of the files that are taken from a folder; any file can be named."""
HEAD = "file,class,probability"
"""How the CSV begins; only such a file is replaced."""


@dataclass(frozen=True)
class Answer:
    """What the model says about one image.

    Attributes:
        file: its path.
        classes: names of the most likely classes, the most likely first.
        probabilities: of each.
    """

    file: Path
    classes: list[str]
    probabilities: list[float]


@dataclass(frozen=True)
class Classified:
    """All answers.

    Attributes:
        answers: in the order of the files.
        skipped: file to why it could not be classified.
        out: the CSV.
    """

    answers: list[Answer]
    skipped: dict[Path, str]
    out: Path


@dataclass
class _Batch:
    """Inputs of one shape, and their files."""

    inputs: list[Tensor] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


def classify_images(
    run: str | Path,
    images: Sequence[str | Path],
    *,
    out: str | Path = "classes.csv",
    top: int = 3,
    batch_size: int = 32,
    packed: bool = False,
) -> Classified:
    """Classify images with the model of a run.

    Images are scaled, cropped and normalised as the run's evaluation images were.

    Args:
        run: the run folder.
        images: image files, or folders with images at any depth.
        out: the CSV to write, one row for each image; only an earlier one is replaced.
        top: classes to name for each image.
        batch_size: images per forward pass.
        packed: keep weights packed. Takes the memory of the run's checkpoint, and is slower.

    Raises:
        RecipeError: with everything that is wrong with the arguments or the run, before the model is loaded; or no
            image can be read.
    """
    if problems := check_classification(run, images, out=out, top=top, batch_size=batch_size, packed=packed):
        raise RecipeError(problems)
    folder, table = Path(run), Path(out)
    files, _ = _find_images(images)
    preprocessing = _preprocessing(folder)
    module = load_for_use(folder, packed)
    answers: list[Answer] = []
    skipped: dict[Path, str] = {}
    bar = tqdm(files, desc="classify", unit="image", leave=False, disable=None)  # None: only in a terminal
    for batch in _batches(bar, preprocessing, batch_size, skipped):
        answers += _answers(module, batch, preprocessing.classes, top, folder)
    if not answers:
        reasons = "; ".join(f"{file}: {reason}" for file, reason in list(skipped.items())[:3])
        raise RecipeError(Problem("images", text=f"cannot be read ({reasons})", way_out="Name other images."))
    write_csv(table, [_row(answer) for answer in answers], "Choose another --out.")
    return Classified(answers, skipped, table)


def check_classification(
    run: str | Path,
    images: Sequence[str | Path],
    *,
    out: str | Path = "classes.csv",
    top: int = 3,
    batch_size: int = 32,
    packed: bool = False,
) -> list[Problem]:
    """What is wrong with the arguments of :func:`classify_images`, before the model is loaded."""
    if problems := wrong_types(classify_images, locals()):
        return problems
    problems = path_problems(run=run) or check_run_folder(Path(run)) or _check_kind(Path(run))
    _, missing = _find_images(images)
    problems += [*missing, *(path_problems(out=out) or _check_out(Path(out)))]
    for name, number in (("top", top), ("batch_size", batch_size)):
        if number < 1:
            problems.append(Problem(name, number, "is not above 0", f"Leave --{name} out."))
    return problems


def _check_kind(folder: Path) -> list[Problem]:
    """The problem if the run does not say how its images were prepared."""
    files = files_beside_model(folder)
    if files.preprocessing.is_file() or _image_data_of(files) is not None:
        return []
    if files.tokenizer.is_dir():
        return [Problem("run", str(folder), "holds a language model", "Use pqqp-lightning generate.")]
    text = f"does not say how its images were prepared ({files.preprocessing.name} is missing)"
    way_out = "Name a run with ImageData, or use pqqp_lightning.load(RUN) in Python."
    return [Problem("run", str(folder), text, way_out)]


def _image_data_of(files: RunFolder) -> dict[str, Any] | None:
    """The arguments of the ImageData in the recipe of a run from before runs kept their preprocessing."""
    if not files.recipe.is_file():
        return None
    data = (yaml.safe_load(files.recipe.read_text(encoding="utf-8")) or {}).get("data")
    if not isinstance(data, dict) or str(data.get("class_path")).rpartition(".")[2] != "ImageData":
        return None
    return data.get("init_args") or {}


def _preprocessing(folder: Path) -> Preprocessing:
    from pqqp_lightning.data import ImageData

    files = files_beside_model(folder)
    if files.preprocessing.is_file():
        return Preprocessing(**read_json(files.preprocessing, "channels", "mean", "std"))
    return ImageData(**(_image_data_of(files) or {})).image_preprocessing(read=False)


def _find_images(given: Sequence[str | Path]) -> tuple[list[Path], list[Problem]]:
    """The image files, those of a folder in the order of their paths, and what is wrong with ``given``."""
    files: dict[Path, None] = {}
    problems = [] if given else [Problem("images", [], "names no image", "Name image files, or a folder of them.")]
    for word in given:
        path = Path(word)
        if not str(word).strip():
            problems.append(Problem("images", str(word), "is not a path", "Name image files, or a folder of them."))
        elif path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in EXTENSIONS and file.is_file()]
            if not inside:
                text = "is a folder without images"
                problems.append(Problem("images", str(path), text, f"Images end with {', '.join(EXTENSIONS)}."))
            files.update(dict.fromkeys(inside))
        elif path.is_file():
            files[path] = None
        else:
            problems.append(Problem("images", str(path), "does not exist", "Name image files, or a folder of them."))
    return list(files), problems


def _check_out(out: Path) -> list[Problem]:
    if out.is_dir():
        return [Problem("out", str(out), "is a folder", f"Name a file: --out {out / 'classes.csv'}.")]
    if out.is_file():
        with out.open(encoding="utf-8", errors="replace") as file:
            if not file.readline().startswith(HEAD):
                return [Problem("out", str(out), "exists, and is not such a table", "Choose another --out.")]
    return check_writable("out", out.parent)


def _batches(
    files: Sequence[Path], preprocessing: Preprocessing, batch_size: int, skipped: dict[Path, str]
) -> Iterator[_Batch]:
    """The inputs of ``files`` in order; a batch ends early before an input of another shape."""
    pipeline = preprocessing.pipeline()
    batch = _Batch()
    for file in files:
        try:
            pixels = _open(file, preprocessing.channels)
        except Exception as error:  # a damaged file makes Pillow raise anything: SyntaxError, struct.error, EOFError
            skipped[file] = str(error).replace(repr(str(file)), "").strip() or type(error).__name__
            continue
        image = _prepare(pixels, pipeline, preprocessing.input_size)
        if batch.inputs and (len(batch.inputs) == batch_size or batch.inputs[0].shape != image.shape):
            yield batch
            batch = _Batch()
        batch.inputs.append(image)
        batch.files.append(file)
    if batch.inputs:
        yield batch


def _open(file: Path, channels: int) -> Tensor:
    from PIL import Image

    with Image.open(file) as image:
        return to_tensor(image, channels)


def _prepare(image: Tensor, pipeline: Any, input_size: list[int]) -> Tensor:
    """The model's input; an image that comes out in another size than the run's is scaled and cropped before."""
    from torchvision.transforms.v2 import functional

    prepared: Tensor = pipeline(image)
    if not input_size or list(prepared.shape[-2:]) == input_size:
        return prepared
    height, width = image.shape[-2:]
    factor = max(input_size[0] / height, input_size[1] / width)
    scaled = functional.resize(image, [round(height * factor), round(width * factor)], antialias=True)
    return pipeline(functional.center_crop(scaled, input_size))


def _answers(module: LightningModule, batch: _Batch, names: list[str], top: int, folder: Path) -> list[Answer]:
    with torch.inference_mode():
        logits = module(torch.stack(batch.inputs).to(module.device, _dtype_of(module)))
    if not isinstance(logits, Tensor) or logits.shape[:-1] != (len(batch.files),):
        text = f"holds a {type(module).__name__}, which does not return one row of logits for each image"
        raise RecipeError(Problem("run", str(folder), text, "Use pqqp_lightning.load(RUN) in Python."))
    probabilities, chosen = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))  # [B, top]
    answers = []
    for file, values, classes in zip(batch.files, probabilities.tolist(), chosen.tolist(), strict=True):
        named = [names[c] if c < len(names) else str(c) for c in classes]
        answers.append(Answer(file, named, values))
    return answers


def _dtype_of(module: LightningModule) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _row(answer: Answer) -> dict[str, str]:
    """One row of the CSV: the most likely class, then the further ones."""
    row = {"file": str(answer.file)}
    for place, (name, probability) in enumerate(zip(answer.classes, answer.probabilities, strict=True), start=1):
        end = "" if place == 1 else f"_{place}"
        row |= {f"class{end}": name, f"probability{end}": f"{probability:.6f}"}
    return row
