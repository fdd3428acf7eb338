"""Finding stages: built-in and third-party ones through entry points, and classes in the user's working folder."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from pqqp_lightning.errors import RecipeError
from pqqp_lightning.stages.stage import Stage

GROUP = "pqqp_lightning.callbacks"


def load_installed() -> list[str]:
    """Import every module of the entry-point group; returns a message for each that fails."""
    failed = []
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # a broken third-party package must not end the command
            failed.append(f"the stages of '{entry.value}' cannot be imported: {type(error).__name__}: {error}")
    return failed


def known_stages() -> dict[str, type[Stage]]:
    """Every imported method by class name: the subclasses of Stage that can be used, without bases of methods."""
    found: dict[str, type[Stage]] = {}
    for cls in _stage_classes():
        # the package's own bases (PruningStage) name no source; a third party's method may name none
        if not cls.__name__.startswith("_") and (cls.source or not cls.__module__.startswith("pqqp_lightning.")):
            found[cls.__name__] = cls
    return dict(sorted(found.items()))


def import_from_working_folder(name: str) -> bool:
    """Import the Python file in the working folder, or in its ``callbacks/``, that defines class ``name``."""
    if not name.isidentifier():
        return False
    definition = re.compile(rf"^class {name}\b", re.MULTILINE)
    for file, text in _working_folder():
        if not definition.search(text):
            continue
        module = ".".join(file.with_suffix("").parts)
        try:
            imported = import_module(module)
        except Exception as error:
            raise RecipeError(
                f"{file}: cannot be imported: {type(error).__name__}: {error}. Fix it: it defines {name}."
            ) from error
        # a library's module of this name, or the file of a folder that was the working folder before
        elsewhere = getattr(imported, "__file__", None)
        if elsewhere is None or Path(elsewhere).resolve() != file.resolve():
            raise RecipeError(
                f"{file}: cannot be imported: Python has a module '{module}' already"
                f" ({elsewhere or 'built in'}). Rename the file: it defines {name}."
            )
        return True
    return False


def import_working_folder() -> list[str]:
    """Import every file in the working folder, or in its ``callbacks/``, that defines a stage.

    Returns:
        A message for each that fails.
    """
    failed = []
    bases = {"Stage", *(cls.__name__ for cls in _stage_classes())}
    for _, text in _working_folder():
        for name, base in re.findall(r"^class (\w+)\((?:\w+\.)*(\w+)", text, re.MULTILINE):
            if base in bases and name not in known_stages():
                try:
                    import_from_working_folder(name)
                except RecipeError as error:
                    failed += [str(problem) for problem in error.problems]
    return failed


def _stage_classes() -> list[type[Stage]]:
    """Every imported subclass of Stage, including bases of methods."""
    found: list[type[Stage]] = []
    pending = list(Stage.__subclasses__())
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        found.append(cls)
    return found


def _working_folder() -> list[tuple[Path, str]]:
    """The Python files in the working folder and in its ``callbacks/``, with their text."""
    files = sorted([*Path().glob("*.py"), *Path("callbacks").glob("*.py")])
    return [(file, file.read_text(encoding="utf-8", errors="replace")) for file in files]
