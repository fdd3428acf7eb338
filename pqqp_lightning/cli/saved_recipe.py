"""Recipes that the user does not write: those in run folders and in the package."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

import pqqp_lightning
from pqqp_lightning.cli.command_trainer import SECTIONS, option_names
from pqqp_lightning.cli.settings import COMMAND_LINE, load_yaml, option, read_settings
from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.storage.run_folder import RunFolder


@contextmanager
def with_saved_recipe(command: str, arguments: list[str]) -> Iterator[list[str]]:
    """The arguments of a command. ``validate`` and ``test`` with ``--run_dir RUN`` get the run's recipe and checkpoint.

    Raises:
        RecipeError: the folder has no recipe, or the command line changes stages that the run already applied.
    """
    run = option(arguments, "run_dir")
    if command not in ("validate", "test") or run is None:
        yield arguments
        return
    if option(arguments, "config") is not None:
        if option(arguments, "ckpt_path") is None:
            print(f"{command}: measures the recipe's model, not compressed. Leave --config out for the one in {run}.")
        yield arguments
        return
    recipe = RunFolder(Path(run)).recipe
    if not recipe.is_file():
        way_out = "Name the folder of a run, or give --config."
        raise RecipeError(Problem("run_dir", run, f"has no {recipe.name}", way_out, source=COMMAND_LINE))
    settings, _ = read_settings(command, arguments)
    idle = [setting for setting in settings if setting.key.split(".")[0] in ("stages", "stage_order")]
    if idle:
        text = f"has no effect: {command} measures the model in {run} as it was saved"
        raise RecipeError(
            Problem(setting.key, text=text, way_out="Leave it out.", source=setting.where) for setting in idle
        )
    if option(arguments, "ckpt_path") is None:
        arguments = [*arguments, "--ckpt_path", "last"]
    with tempfile.TemporaryDirectory(prefix="pqqp-recipe-") as folder:
        yield ["--config", str(_without_other_options(recipe, command, Path(folder))), *arguments]


def _without_other_options(recipe: Path, command: str, folder: Path) -> Path:
    """The path of the saved recipe, or of a copy in ``folder`` without options that ``command`` does not have."""
    content = load_yaml(recipe.read_text(encoding="utf-8"))
    known = {*SECTIONS, *option_names(command)}
    if not isinstance(content, dict) or content.keys() <= known:
        return recipe
    kept = {key: value for key, value in content.items() if key in known}
    (folder / recipe.name).write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    return folder / recipe.name


def packaged(argument: str) -> str:
    """The argument, with a recipe's path replaced by that in the package if only the package has the file.

    This makes ``--config recipes/quickstart.yaml`` work in any folder.
    """
    key, equals, value = argument.rpartition("=")
    if value.startswith(("recipes/", "configs/")) and value.endswith(".yaml") and not Path(value).exists():
        path = Path(pqqp_lightning.__file__).parent / value
        if path.is_file():
            return f"{key}{equals}{path}"
    return argument
