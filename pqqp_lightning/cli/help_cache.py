"""``COMMAND --help`` without importing torch: the text of the last time, while nothing that it comes from changed."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from importlib.metadata import entry_points, version
from pathlib import Path

import pqqp_lightning
from pqqp_lightning import __version__
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.storage.files import cache_folder, write_text


def print_help(arguments: Sequence[str], make: Callable[[], None]) -> None:
    """Print what ``make`` prints, from the cache if it is there; else it is cached, where that is possible."""
    path = cache_folder() / "help" / _digest(arguments)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        printed = io.StringIO()
        with redirect_stdout(printed), suppress(SystemExit):
            make()
        text = printed.getvalue()
        with suppress(RecipeError):  # the cache cannot be written: the help is shown all the same
            write_text(path, text)
    print(text, end="")


def _digest(arguments: Sequence[str]) -> str:
    """Of all that the text comes from: our files, the terminal's width, and what is installed beside us."""
    package = Path(pqqp_lightning.__file__).parent
    files = [*package.rglob("*.py"), *(package / "callbacks").glob("*.py")]  # rglob does not follow the link
    parts = [*arguments, __version__, version("jsonargparse"), version("lightning"), str(package)]
    parts.append(str(shutil.get_terminal_size().columns))
    parts += sorted(f"{file} {file.stat().st_mtime_ns}" for file in files)
    for entry in entry_points(group="pqqp_lightning.callbacks"):
        parts.append(f"{entry.name} {entry.value} {entry.dist and (entry.dist.name, entry.dist.version)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]
