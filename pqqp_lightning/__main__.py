"""The command line's door: answers ``--help`` without importing torch, and words errors for people."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

HELP = """\
usage: pqqp-lightning COMMAND [options]

Prune, quantize and recover a trained network in any order. A recipe (YAML) names the model, the data and an ordered
list of stages; every stage is measured, and the result is a packed checkpoint that is as small as the table says.

commands:
  fit       apply the stages in order                 pqqp-lightning fit --config recipes/quickstart.yaml
  order     try every order of the stages             pqqp-lightning order --config recipes/quickstart.yaml
  sweep     grids over knobs and orders               pqqp-lightning sweep --config recipes/quickstart.yaml
                                                        --grid.prune.sparsity [0.5,0.7] --grid.quantize.bits [8,4]
  analyze   errors of the layers in both orders       pqqp-lightning analyze --config recipes/quickstart.yaml
  validate  measure a model, or a run's checkpoint    pqqp-lightning validate --run_dir runs/quickstart
  test      the same on the test data                 pqqp-lightning test --run_dir runs/quickstart
  report    draw a run's table again, and as a page   pqqp-lightning report runs/quickstart
  methods   list the stages that can be used          pqqp-lightning methods

any option of a recipe can be set on the command line:
  --stages.NAME METHOD --stages.NAME.KNOB VALUE       add a stage, or change one of its knobs
  --stage_order [b,a]                                 apply the recipe's stages in another order
  --run_dir DIR                                       the run folder (runs/RECIPE by default)
  --ckpt_path last                                    go on with the run in the run folder
  --print_config                                      print the whole recipe with its defaults, and stop

pqqp-lightning COMMAND --help lists every option. Environment variables set options too: PQQP_FIT__RUN_DIR=DIR.
"""

GO_ON = "What was finished is kept: the same command with --ckpt_path last goes on from there."

COMMANDS = ("fit", "order", "sweep", "analyze", "validate", "test", "report", "methods")
RESUMABLE = COMMANDS[:4]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; exits with 2 and one line a problem where the user has to put something right."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if arguments[0] in ("--version", "-V"):
        from pqqp_lightning import __version__

        print(f"pqqp-lightning {__version__}")
        return
    from pqqp_lightning.errors import RecipeError, suggest

    try:
        if arguments[0] not in COMMANDS:
            raise RecipeError(f"'{arguments[0]}' is no command.{suggest(arguments[0], COMMANDS)}")
        if arguments[1:] in (["-h"], ["--help"]):
            _print_help(arguments)
            return
        from pqqp_lightning.cli.light_torchmetrics import import_torchmetrics_lightly

        import_torchmetrics_lightly()
        sys.path.insert(0, os.getcwd())  # a stage or model in the working folder is importable
        with _heeding_sigterm():
            from pqqp_lightning.cli.commands import run_command

            run_command(arguments)
    except RecipeError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as stop:
        status = _signalled(stop)
        if status is None:
            raise
        print("stopped.", GO_ON if arguments[0] in RESUMABLE else "", file=sys.stderr)
        sys.exit(status)


class Terminated(SystemExit):
    """SIGTERM, wherever the command is: Lightning heeds it in its loops alone."""


@contextmanager
def _heeding_sigterm() -> Iterator[None]:
    """Raise :class:`Terminated` at SIGTERM, which only the main thread can be told."""

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


def _signalled(stop: BaseException) -> int | None:
    """128 + the signal that ended a command, if one did; Lightning gives 1 after SIGINT, 0 after SIGTERM."""
    if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
        return 128 + signal.SIGINT
    terminated = isinstance(stop, Terminated) or type(stop).__name__ == "SIGTERMException"
    return 128 + signal.SIGTERM if terminated else None


def _print_help(arguments: list[str]) -> None:
    if arguments[0] in ("report", "methods"):
        print(HELP, end="")
        return

    def make() -> None:
        from pqqp_lightning.cli.commands import run_command

        run_command(arguments)

    from pqqp_lightning.cli.help_cache import print_help

    print_help(arguments, make)


if __name__ == "__main__":
    main()
