"""Commands in processes of their own that start at once: forked from a server that has imported torch and Lightning.

A fresh interpreter imports them for ten seconds on a slow machine. Where imports, ``sitecustomize`` or memory are what
is tested, use one: :func:`command_line.run_process`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

TESTS = Path(__file__).parent
LIBRARIES = [path for path in sys.path if path not in ("", str(TESTS), str(TESTS.parent))]  # no test's own folder yet
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["pqqp_lightning.cli.commands", "pqqp_lightning.models", "pqqp_lightning.data"])


def start(
    words: Sequence[str], folder: Path, out: str | Path = os.devnull, err: str | Path | None = None
) -> ForkServerProcess:
    """Begin ``python WORDS`` in ``folder`` with this process's environment.

    Args:
        words: ``-m MODULE ...``, or a script in the folder and its arguments.
        folder: the working folder.
        out: a file for what it prints.
        err: a file for its errors; the tests' own otherwise.
    """
    more = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    path = [str(folder), *more, *LIBRARIES]
    process = _SERVER.Process(target=_become, args=(list(words), folder, dict(os.environ), path, out, err))
    process.start()
    return process


def run_forked(words: Sequence[str], folder: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` in ``folder`` to its end."""
    out, err = (folder.with_name(f"{folder.name}-{kind}.txt") for kind in ("out", "err"))
    process = start(words, folder, out, err)
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise subprocess.TimeoutExpired(list(words), timeout, out.read_text(), err.read_text())
    return subprocess.CompletedProcess(list(words), process.exitcode, out.read_text(), err.read_text())


def _become(
    words: list[str],
    folder: Path,
    environment: Mapping[str, str],
    path: list[str],
    out: str | Path,
    err: str | Path | None,
) -> None:
    """Be that command: what a fresh interpreter would be once it had imported the libraries."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, file in ((1, out), (2, err)):
        if file is not None:
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.path[:] = path
    sys.argv = words[words[0] == "-m" :]
    os._exit(_exit_code(words))


def _exit_code(words: list[str]) -> int:
    code: object = 0
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)
