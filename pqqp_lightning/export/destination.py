"""Where an export goes: checked before any work, filled under another name, moved into place as a whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pqqp_lightning.checkpoint.format import model_folder
from pqqp_lightning.errors import Problem
from pqqp_lightning.export.discovery import known_targets
from pqqp_lightning.export.target import Target
from pqqp_lightning.storage.files import new_folder, sync
from pqqp_lightning.storage.run_folder import RunFolder

WAY_OUT = "Free some space, or choose another --out."


def check_out(out: Path, run: Path) -> list[Problem]:
    """The problem if something is at ``out`` already, or nothing can be written there."""
    where = out.resolve()
    if where.is_relative_to(model_folder(run).resolve()):
        text = "lies in the run's own checkpoint"
        return [Problem("out", str(out), text, "Choose a folder beside it.")]
    if where.is_relative_to(run.resolve()):
        inside = where.relative_to(run.resolve()).parts
        if inside and inside[0] in RunFolder.file_names():
            text = f"lies in the run's own {inside[0]}"
            return [Problem("out", str(out), text, "Choose a folder beside it.")]
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        return [Problem("out", str(out), "exists already", "Choose another --out, or delete it.")]
    nearest = next(folder for folder in out.absolute().parents if folder.exists())
    if not nearest.is_dir():
        return [Problem("out", str(out), f"cannot be written: {nearest} is a file", "Choose another --out.")]
    if not os.access(nearest, os.W_OK):
        return [Problem("out", str(out), f"cannot be written: {nearest} is read-only", "Choose another --out.")]
    return []


def check_kind(out: Path, target: Target) -> list[Problem]:
    """The problem if ``out`` names a file and is a folder, or names another format's file."""
    files = {Path(other.file).suffix: name for name, other in known_targets().items() if other.file}
    name = files.get(out.suffix.lower())
    if name is not None and not target.is_file(out):
        text = f"names a file of --to {name}, and --to {target.name} writes a folder"
        return [Problem("out", str(out), text, f"Use --to {name}, or a name without {out.suffix}.")]
    if target.is_file(out) and out.is_dir():
        return [Problem("out", str(out), "is a folder, and a file is to be written", "Choose another --out.")]
    return []


def new_parents(out: Path) -> str:
    """``" (in a new folder, a/b)"`` if the folders above ``out`` do not exist; a typing error may have named them."""
    return "" if out.parent.is_dir() else f" (in a new folder, {out.parent})"


@contextmanager
def destination(out: Path, target: Target, failed: Callable[[], bool]) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes ``out`` as a whole, or its one file does.

    Args:
        out: the folder or file.
        target: the format.
        failed: whether the check of what was written has failed; a file then gets the name :func:`failed_name`.
    """
    if not target.is_file(out):
        with new_folder(out, WAY_OUT) as folder:
            yield folder
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out.with_name(f".{out.name}.files"), WAY_OUT) as folder:
        yield folder
        sync(folder / target.file)
        (folder / target.file).replace(failed_name(out) if failed() else out)
    shutil.rmtree(out.with_name(f".{out.name}.files"))


def failed_name(out: Path) -> Path:
    """The name of a file whose check failed."""
    return out.with_name(f"{out.name}.failed")
