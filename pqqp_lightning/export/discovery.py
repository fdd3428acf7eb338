"""Finding targets: every file in ``targets/``, and third parties' through the entry-point group of the same name."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any

from pqqp_lightning.errors import Problem, RecipeError, suggest
from pqqp_lightning.export.options import read_options
from pqqp_lightning.export.target import Target

GROUP = "pqqp_lightning.export"
BUILTIN = "pqqp_lightning.export.targets"


def known_targets() -> dict[str, type[Target]]:
    """Every target by name. A third party's module that cannot be imported is left out with a printed warning."""
    for file in iter_modules(import_module(BUILTIN).__path__):
        import_module(f"{BUILTIN}.{file.name}")
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # a broken third-party package must not end the command
            words = f"the targets of '{entry.value}' cannot be imported: {type(error).__name__}: {error}"
            print(words, file=sys.stderr)
    found: dict[str, type[Target]] = {}
    pending = list(Target.__subclasses__())
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        if cls.name:
            found[cls.name] = cls
    return dict(sorted(found.items()))


def find_target(name: str, **options: Any) -> Target:
    """The target of ``--to``.

    Args:
        name: of the target.
        options: its own.

    Raises:
        RecipeError: there is none of that name, or it has not these options, or a library that it needs is not
            installed.
    """
    targets = known_targets()
    if name not in targets:
        raise RecipeError(Problem("to", name, "is not a target", suggest(name, targets).strip()))
    arguments, problems = read_options(name, options, targets)
    if problems:
        raise RecipeError(problems)
    target = targets[name](**arguments)
    if problems := target.check_installed():
        raise RecipeError(problems)
    return target
