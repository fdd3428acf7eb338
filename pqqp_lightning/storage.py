"""Files written whole or not at all: a temporary name, fsync, rename."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pqqp_lightning.errors import RecipeError


def cache_folder() -> Path:
    """``$PQQP_CACHE``, or ``~/.cache/pqqp-lightning``."""
    named = os.environ.get("PQQP_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "pqqp-lightning"


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _worded(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON, atomically."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The same for rows, with the columns of all of them; what is missing stays empty."""
    text = io.StringIO()
    columns = dict.fromkeys(column for row in rows for column in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def append_line(path: Path, line: str) -> None:
    """Append one line and flush it to the disk; a torn last line of an earlier kill is dropped first."""
    with _worded(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if path.exists() else b""
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(whole.rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of the complete lines of ``path``; none if there is no such file."""
    if not path.exists():
        return []
    with _undamaged(path):
        whole = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in whole[: whole.rfind("\n") + 1].splitlines() if line.strip()]


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """The JSON object in ``path``, which has the keys ``needed``.

    Raises:
        RecipeError: it is damaged.
    """
    with _undamaged(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or (missing := set(needed) - content.keys()):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}" if isinstance(content, dict) else "no object")
        return content


def check_folder(path: Path, marks: Sequence[str]) -> list[str]:
    """A problem if ``path``, which need not exist, cannot be a run folder.

    A run folder is moved aside as a whole when another run takes its place. So it must neither hold the folder one
    works in, nor files that are no run's.

    Args:
        path: of the run folder.
        marks: files of which a folder that holds a run has one.
    """
    if Path.cwd().resolve().is_relative_to(path.resolve()):
        what = "is" if Path.cwd().resolve() == path.resolve() else "holds"
        return [f"run_dir={path}: {what} the folder you work in. Give the run one of its own: --run_dir runs/NAME."]
    if problems := check_writable("run_dir", path):
        return problems
    if not path.is_dir() or any((path / mark).exists() for mark in marks):
        return []
    foreign = [f.name for f in sorted(path.iterdir()) if f.name[0] != "." and (f.is_file() or f.name == "model")]
    if not foreign:
        return []
    named = ", ".join(foreign[:3]) + (", ..." if foreign[3:] else "")
    return [f"run_dir={path}: holds files that are no run's ({named}). Give the run its own: --run_dir runs/NAME."]


def check_writable(option: str, path: Path) -> list[str]:
    """A problem if the folder ``path`` of that option, which need not exist, cannot be written to."""
    if path.is_symlink() and not path.exists():
        return [f"{option}='{path}': is a link to {path.readlink()}, which is not there. Choose another --{option}."]
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK):
        return []
    reason = "is a file" if nearest.is_file() else "is not writable"
    return [f"{option}='{path}': cannot be written: {nearest} {reason}. Choose another --{option}."]


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it appears at ``path``, in place of an earlier one, only when it is complete."""
    temporary, aside = (path.with_name(f".{path.name}.{os.getpid()}{kind}.tmp") for kind in ("", ".old"))
    with _worded(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.iterdir():
                sync(file)
            sync(temporary)
            if path.exists():  # aside in one step: a folder that is half removed would look like a damaged one
                path.replace(aside)
            temporary.replace(path)
            sync(path.parent)
        finally:
            clear_leftovers(path)


def not_written(path: object, error: OSError) -> str:
    """What to say and do when a file cannot be written."""
    return (
        f"{path}: cannot be written: {error.strerror or error}. What was finished before is still there: make room "
        "and go on with --ckpt_path last, or choose another --run_dir."
    )


def clear_leftovers(path: Path) -> None:
    """Remove what a killed writer of ``path`` left behind."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The file's SHA-256, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise RecipeError(f"{path}: is truncated or altered ({error}). Run the recipe again.") from error


@contextmanager
def _worded(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecipeError(not_written(path, error)) from error
