"""A run's folder: the names of its files, and the checks before a run starts or resumes in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.storage.files import read_json, write_json, write_text

WEIGHTS, MANIFEST = "model.safetensors", "manifest.json.gz"
"""The files of a checkpoint that are its size."""
PROBE = "probe.safetensors"
"""What the saved model computes on a few samples, to compare with after loading."""
BLOCKS = "blocks"
"""The folder of the blocks that an unfinished stage has compressed, in the folder of its checkpoint."""


class _File:
    """Descriptor of a file or folder in a run folder: gives its path."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: RunFolder, owner: type[RunFolder]) -> Path:
        return folder.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """A run folder, which need not exist.

    Attributes:
        path: of the folder.
    """

    path: Path

    recipe = _File("recipe.yaml")
    """The resolved recipe; a run started from Python has none."""
    run = _File("run.json")
    """The run's identity; the first file that a run writes."""
    records = _File("records.jsonl")
    """One line per finished stage."""
    model = _File("model")
    """The checkpoint of the finished run."""
    stages = _File("stages")
    """The checkpoints of an unfinished run."""
    tokenizer = _File("tokenizer")
    """The model's tokenizer and generation config, for exports; not every run has them."""
    samples = _File("samples.safetensors")
    """A few evaluation samples of a language model (token ids), for the checks of exports; not every run has them."""
    inputs = _File("inputs.safetensors")
    """Inputs of another model on a few samples, with their labels, for exports; not every run has them."""
    preprocessing = _File("preprocessing.json")
    """How the model's images were prepared, and the names of the classes; only runs of an ImageData have it."""
    logs = _File("logs")
    """The output of Lightning's loggers."""
    report = _File("report.json")
    """The report of ``fit``."""
    order = _File("order.json")
    """The report of ``order``."""
    prediction = _File("prediction.json")
    """The report of ``order --strategy predict``."""
    sweep = _File("sweep.json")
    """The report of ``sweep``."""
    points = _File("sweep.csv")
    """One row per point of a sweep."""
    curve = _File("curve.csv")
    """One row per point of a sweep's curve of quantization alone."""
    curve_figure = _File("curve.png")
    """The plot of ``curve``."""
    advantage_figure = _File("advantage.png")
    """The plot of a sweep's gains by order."""
    analysis = _File("analysis.json")
    """The report of ``analyze``."""
    layers = _File("layers.csv")
    """One row per layer of an analysis."""
    layers_figure = _File("layers.png")
    """The plot of ``layers``."""
    search = _File("search.json")
    """The report of ``search``."""
    pipelines = _File("search.csv")
    """One row per pipeline that a search chose."""
    best_recipe = _File("best.yaml")
    """The recipe of a search's answer."""
    study = _File("optuna.log")
    """The journal of a search's Optuna study."""
    latencies = _File("latency.json")
    """The measured latency of each pipeline of a search, which another run would not measure the same."""
    front_figure = _File("front.png")
    """The plot of a search's pipelines and their front."""
    html = _File("report.html")
    """The report as HTML."""
    markdown = _File("report.md")
    """The report as Markdown."""

    def stage(self, position: int, name: str) -> Path:
        """The checkpoint of an unfinished run after the stage at ``position``, counted from 0."""
        return self.stages / f"{position + 1}-{name}"

    @classmethod
    def file_names(cls) -> set[str]:
        """The names of everything that a run may write into its folder."""
        return {file.name for file in vars(cls).values() if isinstance(file, _File)}

    @property
    def marks(self) -> tuple[str, str]:
        """Names of files; a folder with one of them is a run folder."""
        return (self.run.name, self.records.name)

    @property
    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return self.run.exists() or self.records.exists()

    def open(self, identity: dict[str, Any], recipe_text: str = "") -> bool:
        """Start a run; the folder of an earlier run is renamed, never overwritten.

        Args:
            identity: everything that a resumed run must share.
            recipe_text: the resolved recipe; empty for none.

        Returns:
            Whether an earlier run was renamed.
        """
        occupied = self.holds_run
        if occupied:
            number = next(i for i in range(1, 10**6) if not self.path.with_name(f"{self.path.name}.{i}").exists())
            aside = self.path.with_name(f"{self.path.name}.{number}")
            self.path.rename(aside)
            print(f"{self.path} held an earlier run; it is now {aside}.", flush=True)
        write_json(self.run, identity)  # from here on there is a run to resume
        self.keep_recipe(recipe_text)
        return occupied

    def keep_recipe(self, recipe_text: str) -> None:
        """Write the recipe, unless it is empty or already written."""
        if recipe_text and not self.recipe.exists():
            write_text(self.recipe, recipe_text)

    def resume(self, identity: dict[str, Any]) -> None:
        """Check that the folder holds an unfinished run of the same recipe.

        Raises:
            RecipeError: the folder has no run, or one of another recipe.
        """
        if not self.run.is_file():
            text = f"{self.path}: there is no run to resume"
            way_out = "Leave --ckpt_path out to start one."
            raise RecipeError(Problem("ckpt_path", text=text, way_out=way_out, complete=True))
        earlier = read_json(self.run, "stages")
        if differing := _differences(earlier, identity):
            text = f"{self.path}: holds a run of another recipe: {'; '.join(differing)}"
            way_out = "Use that recipe, another --run_dir, or leave --ckpt_path out to start over."
            raise RecipeError(Problem(text=text, way_out=way_out))

    def model_bytes(self) -> int | None:
        """Bytes of the finished run's checkpoint; None without a checkpoint."""
        return checkpoint_bytes(self.model) if self.model.is_dir() else None


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weights and manifest; its probe is not part of the model."""
    return sum((folder / name).stat().st_size for name in (WEIGHTS, MANIFEST))


def check_finished(run: Path) -> list[Problem]:
    """The problem if ``run``, named by a command's ``run``, is not the folder of a finished run or its checkpoint."""
    if not run.is_dir():
        reason = "is a file" if run.is_file() else "is not a folder"
        return [Problem("run", str(run), reason, "Name a run folder, such as runs/quickstart.")]
    files = RunFolder(run)
    if files.holds_run and not files.model.is_dir():
        way_out = "Finish it (fit with --ckpt_path last), or name a run of fit."
        return [Problem("run", str(run), "has no finished model", way_out)]
    return []


def check_run_folder(run: Path) -> list[Problem]:
    """As :func:`check_finished`, and the problem if the folder has no checkpoint."""
    if problems := check_finished(run):
        return problems
    if RunFolder(run).model.is_dir() or (run / MANIFEST).is_file():
        return []
    return [Problem("run", str(run), "is not a run folder", "Name one, such as runs/quickstart.")]


def files_beside_model(run: Path) -> RunFolder:
    """The run folder of ``run``, which may also be the checkpoint folder in it."""
    return RunFolder(run.absolute().parent if (run / MANIFEST).is_file() else run)


def check_folder(path: Path, marks: Sequence[str]) -> list[Problem]:
    """The problem if ``path``, which need not exist, cannot be a run folder.

    A new run renames the whole folder of an earlier one. So a run folder must contain neither the current folder nor
    files that do not belong to a run.

    Args:
        path: of the run folder.
        marks: see :attr:`RunFolder.marks`.
    """
    if Path.cwd().resolve().is_relative_to(path.resolve()):
        what = "is" if Path.cwd().resolve() == path.resolve() else "contains"
        way_out = "Give the run a folder of its own: --run_dir runs/NAME."
        return [Problem("run_dir", str(path), f"{what} the current folder", way_out)]
    if problems := check_writable("run_dir", path):
        return problems
    if not path.is_dir() or any((path / mark).exists() for mark in marks):
        return []
    foreign = [f.name for f in sorted(path.iterdir()) if f.name[0] != "." and (f.is_file() or f.name == "model")]
    if not foreign:
        return []
    named = ", ".join(foreign[:3]) + (", ..." if foreign[3:] else "")
    way_out = "Give the run a folder of its own: --run_dir runs/NAME."
    return [Problem("run_dir", str(path), f"is not a run folder (contains {named})", way_out)]


def check_writable(option: str, path: Path) -> list[Problem]:
    """The problem if the folder ``path``, given by ``option``, cannot be written to; it need not exist."""
    if path.is_symlink() and not path.exists():
        text = f"is a link to {path.readlink()}, which does not exist"
        return [Problem(option, str(path), text, f"Choose another --{option}.")]
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK):
        return []
    reason = "is a file" if nearest.is_file() else "is not writable"
    return [Problem(option, str(path), f"cannot be written: {nearest} {reason}", f"Choose another --{option}.")]


def _differences(a: Any, b: Any, where: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        if where == "stages" and list(a) != list(b):
            return [f"stages are {list(a)} there and {list(b)} here"]
        found: list[str] = []
        for key in {**a, **b}:
            if a.get(key) != b.get(key) or key == "stages":  # equal dicts of stages may differ in order
                found += _differences(a.get(key), b.get(key), f"{where}.{key}".lstrip("."))
        return found
    return [f"{where} is {a!r} there and {b!r} here"]
