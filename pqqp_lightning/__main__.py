"""The command line's entry point: answers ``--help`` without torch, and prints what the user must put right."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from pqqp_lightning.cli.command_table import COMMANDS, general_help

HOW_TO_RESUME = "What was finished is kept. To resume, run the same command with --ckpt_path last."


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. Exits with code 2 and prints one line per problem if the user has to put something right.

    Exits silently, as other programs do, if whoever reads the output has stopped (``... | head``).

    Args:
        argv: the words after ``pqqp-lightning``; by default those that this process was started with.
    """
    try:
        try:
            _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # what cannot be written is noticed here, not when Python exits
    except BrokenPipeError:
        unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
        if not unread:  # another pipe, such as that of a worker
            raise
        for stream in unread:  # Python would write the rest when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _is_unread(stream: TextIO) -> bool:
    """Whether nobody reads what is written to a stream."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)  # errors and hang-ups are always reported
    except (OSError, ValueError):  # not a file
        return False
    return bool(poll.poll(0))


def _run(arguments: list[str]) -> None:
    """Run a command, given the words after ``pqqp-lightning``."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(general_help(), end="")
        return
    if arguments[0] in ("--version", "-V"):
        from pqqp_lightning import __version__

        print(f"pqqp-lightning {__version__}")
        return
    from pqqp_lightning.errors import Problem, RecipeError, suggest

    name = arguments[0]
    try:
        if name not in COMMANDS:
            way_out = suggest(name, COMMANDS).strip()
            raise RecipeError(Problem(value=name, text=f"Unknown command '{name}'", way_out=way_out, complete=True))
        command = COMMANDS[name]
        if not (command.takes_recipe or command.has_options) and arguments[1:] in (["-h"], ["--help"]):
            print(general_help(), end="")
            return
        from pqqp_lightning.cli.light_torchmetrics import import_torchmetrics_lightly

        import_torchmetrics_lightly()
        sys.path.insert(0, os.getcwd())  # so that a stage or model in the working folder can be imported
        with _raising_at_sigterm():
            from pqqp_lightning.cli.commands import run_command

            run_command(arguments)
    except RecipeError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as stop:
        status = _status_of_signal(stop)
        if status is None:
            raise
        print("stopped.", HOW_TO_RESUME if COMMANDS[name].resumable else "", file=sys.stderr)
        sys.exit(status)


class Terminated(SystemExit):
    """SIGTERM, wherever the command is; Lightning itself handles it in its loops only."""


@contextmanager
def _raising_at_sigterm() -> Iterator[None]:
    """Raise :class:`Terminated` at SIGTERM. Only the main thread can set a handler; others leave it as it is."""

    def terminate(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _status_of_signal(stop: BaseException) -> int | None:
    """128 + the signal that ended a command, None if no signal did.

    Lightning's own status does not tell: it exits with 1 after SIGINT and with 0 after SIGTERM.
    """
    if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
        return 128 + signal.SIGINT
    terminated = isinstance(stop, Terminated) or type(stop).__name__ == "SIGTERMException"
    return 128 + signal.SIGTERM if terminated else None


if __name__ == "__main__":
    main()
