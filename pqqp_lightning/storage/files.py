"""Writes files atomically (temporary name, fsync, rename), and reads them with worded errors."""

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
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _worded(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON, atomically."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``rows`` as CSV, atomically; the columns are those of all rows, and missing values stay empty."""
    text = io.StringIO()
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def append_line(path: Path, line: str) -> None:
    """Append one line and flush it to the disk; first drop an incomplete last line, left by a killed process."""
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
    """The JSON objects in the complete lines of ``path``; an empty list if the file does not exist."""
    if not path.exists():
        return []
    with _undamaged(path):
        whole = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in whole[: whole.rfind("\n") + 1].splitlines() if line.strip()]


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """Read the JSON object in ``path``.

    Raises:
        RecipeError: it is damaged, or lacks one of the keys ``needed``.
    """
    with _undamaged(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or (missing := set(needed) - content.keys()):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}" if isinstance(content, dict) else "no object")
        return content


RESUME = "Finished stages are kept: free some space and resume with --ckpt_path last, or choose another --run_dir."
"""The way out where a run's file cannot be written."""


@contextmanager
def new_folder(path: Path, way_out: str = RESUME) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it replaces ``path`` as a whole.

    Args:
        path: of the folder.
        way_out: what to do if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    with _worded(path, way_out):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.iterdir():
                sync(file)
            sync(temporary)
            if path.exists():  # in one step, since a half-deleted folder would look like a damaged one
                path.replace(aside)
            temporary.replace(path)
            sync(path.parent)
        finally:
            clear_leftovers(path)


def not_written(path: object, error: OSError, way_out: str = RESUME) -> str:
    """The message for a file that cannot be written."""
    return f"{path}: cannot be written: {error.strerror or error}. {way_out}"


def clear_leftovers(path: Path) -> None:
    """Delete the temporary files of killed writers of ``path``."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


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
def _worded(path: Path, way_out: str = RESUME) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecipeError(not_written(path, error, way_out)) from error
