"""``COMMAND --help`` without importing torch: the text of the last time, for as long as nothing it comes from changed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from pqqp_lightning import __version__


def print_help(arguments: Sequence[str], make: Callable[[], None]) -> None:
    """Print what ``make`` prints (and exits after), from the cache if it is there; else cache it, if that is possible."""
    path = _cache_folder() / "help" / _digest(arguments)
    with contextlib.suppress(OSError):
        print(path.read_text(encoding="utf-8"), end="")
        return
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        make()
    print(text.getvalue(), end="")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(text.getvalue(), encoding="utf-8")
        temporary.replace(path)


def _digest(arguments: Sequence[str]) -> str:
    """Of everything that the text comes from: our files, the terminal's width, and what is installed beside us."""
    package = Path(__file__).parent
    files = [*package.rglob("*.py"), *(package / "callbacks").glob("*.py")]  # rglob does not follow the link
    parts = [__version__, str(package), str(shutil.get_terminal_size().columns), *arguments]
    parts += sorted(f"{file}:{file.stat().st_mtime_ns}" for file in files)
    for entry in sorted(entry_points(group="pqqp_lightning.callbacks")):
        parts.append(f"{entry.name}={entry.value} {entry.dist.name} {entry.dist.version}" if entry.dist else entry.name)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def _cache_folder() -> Path:
    named = os.environ.get("PQQP_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "pqqp-lightning"
