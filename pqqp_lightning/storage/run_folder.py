"""The folder of a run: which files lie in it, when it may be begun, and whether it holds the same run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.storage.files import read_json, write_json, write_text
from pqqp_lightning.storage.records import RECORDS, RUN, Record, read_records

RECIPE, STAGES, MODEL = "recipe.yaml", "stages", "model"

WEIGHTS, MANIFEST = "model.safetensors", "manifest.json.gz"


def check_folder(path: Path, marks: Sequence[str]) -> list[Problem]:
    """A problem if ``path``, which need not exist, cannot be a run folder.

    A run folder is moved aside as a whole when another run takes its place. So it must contain neither the current
    folder nor files that do not belong to a run.

    Args:
        path: of the run folder.
        marks: files of which a folder that holds a run has one.
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
    """A problem if the folder ``path`` of that option, which need not exist, cannot be written to."""
    if path.is_symlink() and not path.exists():
        text = f"is a link to {path.readlink()}, which does not exist"
        return [Problem(option, str(path), text, f"Choose another --{option}.")]
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK):
        return []
    reason = "is a file" if nearest.is_file() else "is not writable"
    return [Problem(option, str(path), f"cannot be written: {nearest} {reason}", f"Choose another --{option}.")]


def open_folder(folder: Path, identity: dict[str, Any], recipe_text: str = "") -> bool:
    """Start a run in ``folder``; what an earlier run left there is moved aside, never lost.

    Returns:
        Whether there was anything to move.
    """
    occupied = (folder / RUN).exists() or (folder / RECORDS).exists()
    if occupied:
        number = next(i for i in range(1, 10**6) if not folder.with_name(f"{folder.name}.{i}").exists())
        aside = folder.with_name(f"{folder.name}.{number}")
        folder.rename(aside)
        print(f"{folder} held an earlier run; it is now {aside}.", flush=True)
    write_json(folder / RUN, identity)  # from here on there is a run to go on with
    keep_recipe(folder, recipe_text)
    return occupied


def keep_recipe(folder: Path, recipe_text: str) -> None:
    """Write the recipe into the run folder, unless it is there or there is none."""
    if recipe_text and not (folder / RECIPE).exists():
        write_text(folder / RECIPE, recipe_text)


def finished_records(folder: Path, identity: dict[str, Any]) -> list[Record]:
    """The records of an unfinished run in ``folder``, which must be of the same recipe."""
    check_same_recipe(folder, identity)
    return read_records(folder)


def check_same_recipe(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse to go on with a run of another recipe.

    Raises:
        RecipeError: there is no run in ``folder``, or it is of another recipe.
    """
    path = folder / RUN
    if not path.is_file():
        text = f"{folder}: there is no run to resume"
        raise RecipeError(Problem(text=text, way_out="Leave --ckpt_path out to start one."))
    earlier = read_json(path, "stages")
    if differing := _differences(earlier, identity):
        text = f"{folder}: holds a run of another recipe: {'; '.join(differing)}"
        way_out = "Use that recipe, another --run_dir, or leave --ckpt_path out to start over."
        raise RecipeError(Problem(text=text, way_out=way_out))


def _differences(a: Any, b: Any, where: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        if where == "stages" and list(a) != list(b):
            return [f"stages are {list(a)} there and {list(b)} here"]
        keys = [k for k in {**a, **b} if a.get(k) != b.get(k) or k == "stages"]  # equal dicts may differ in order
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{where}.{k}".lstrip("."))]
    return [f"{where} is {a!r} there and {b!r} here"]
