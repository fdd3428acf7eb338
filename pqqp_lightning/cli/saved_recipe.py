"""Recipes that the user does not write on the command line: that of a run's folder, and those in the package."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

import yaml

import pqqp_lightning
from pqqp_lightning.cli.diagnosis import OPTIONS, OPTIONS_OF, SECTIONS
from pqqp_lightning.cli.settings import COMMAND_LINE, load_yaml, option, read_settings
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.storage.run_folder import RunFolder


def with_saved_recipe(command: str, arguments: list[str]) -> list[str]:
    """``validate`` and ``test`` of a run need its folder alone: the recipe and the checkpoint are in it."""
    run = option(arguments, "run_dir")
    if command not in ("validate", "test") or run is None:
        return arguments
    if option(arguments, "config") is not None:
        if option(arguments, "ckpt_path") is None:
            print(f"{command}: the recipe's model, not compressed; without --config it would be the one in {run}.")
        return arguments
    recipe = RunFolder(Path(run)).recipe
    if not recipe.is_file():
        raise RecipeError(f"{run}: holds no {recipe.name}. Name the folder of a run, or give --config.")
    settings, _ = read_settings(command, arguments)
    if idle := [setting.key for setting in settings if setting.key.split(".")[0] in ("stages", "stage_order")]:
        raise RecipeError(
            f"{COMMAND_LINE}: {', '.join(idle)}: {command} measures the model in {run} as it was saved. Leave it out."
        )
    extra = [] if option(arguments, "ckpt_path") else ["--ckpt_path", "last"]
    return ["--config", str(_without_options_of_searches(recipe, command)), *arguments, *extra]


def _without_options_of_searches(recipe: Path, command: str) -> Path:
    """The recipe that a search saved, for another command: a copy without the search's own options."""
    text = recipe.read_text(encoding="utf-8")
    content = load_yaml(text)
    known = SECTIONS | OPTIONS.keys() | OPTIONS_OF[command].keys()
    if not isinstance(content, dict) or content.keys() <= known:
        return recipe
    folder = Path(tempfile.mkdtemp(prefix="pqqp-recipe-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    kept = {key: value for key, value in content.items() if key in known}
    (folder / recipe.name).write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    return folder / recipe.name


def bundled(argument: str) -> str:
    """A recipe that is not in the working folder, but in the package: ``recipes/quickstart.yaml`` works anywhere."""
    key, equals, value = argument.rpartition("=")
    if value.startswith(("recipes/", "configs/")) and value.endswith(".yaml") and not Path(value).exists():
        packaged = Path(pqqp_lightning.__file__).parent / value
        if packaged.is_file():
            return f"{key}{equals}{packaged}"
    return argument
