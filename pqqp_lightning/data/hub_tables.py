"""Tables of examples from the hub or from a folder in the hub's layout.

``inside`` is the prefix of argument names in messages: ``"questions."`` where ``source`` means ``questions.source``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqqp_lightning.errors import Problem, RecipeError, near_miss, suggest
from pqqp_lightning.models.loading import is_path
from pqqp_lightning.models.transformers_bridge import third_party_errors

if TYPE_CHECKING:
    from datasets import Dataset as Table
else:
    Table = Any  # for Questions, as in models.loading

DATA_FOLDER = "PQQP_DATA"
"""Environment variable that names the folder with the recipes' local data."""
HUB_WAYS_OUT = "Give a local folder in the hub's layout (./data/name), or go online with HF_HUB_OFFLINE unset."


def expand_variables(source: str) -> str:
    """Replace environment variables in ``source`` (``$PQQP_DATA/wikitext``)."""
    # os.path.expandvars leaves an unset variable in place, so the default is filled in first.
    return os.path.expandvars(source.replace(f"${DATA_FOLDER}", os.environ.get(DATA_FOLDER, "../shared/data")))


def check_path(source: str, inside: str = "") -> list[Problem]:
    """A problem if ``source`` looks like a path and nothing is there."""
    path = Path(source).expanduser()
    if is_path(source) and not path.exists():
        return [_of_source(source, inside, f"does not exist (looked at {path.absolute()})")]
    return []


def check_builtin(source: str, builtin: str) -> list[Problem]:
    """A problem if ``source`` is nearly the name of the data that is built in; it may still be any id of the hub."""
    if source == builtin or "/" in source or is_path(source):
        return []
    near = near_miss(source, [builtin])
    return [_of_source(source, "", "is not built in", near.strip())] if near else []


def read_table(source: str, config_name: str | None, split: str, inside: str = "") -> Table:
    """Read one split of a hub data set or of a parquet folder.

    Raises:
        RecipeError: the split does not exist or cannot be read.
    """
    if not is_path(source):
        return _read_hub(source, config_name, split, inside)

    from datasets import load_dataset

    files = find_files(source, config_name, split, inside)
    problem = _of_source(source, inside, f"has a file that cannot be read: {files[0]}", "Download it again.")
    with quiet_datasets(), third_party_errors(problem):
        return load_dataset("parquet", data_files={split.partition("[")[0]: files}, split=split)


def download(source: str, config_name: str | None, inside: str = "") -> None:
    """Download ``source`` into the hub's cache; a local folder needs nothing.

    One process per machine calls this before the others read.
    """
    if not is_path(source):
        _read_hub(source, config_name, None, inside)


def find_files(source: str, config_name: str | None, split: str, inside: str = "") -> list[str]:
    """The parquet files of a split, sorted by name: ``{split}-*.parquet`` and ``{split}.parquet``.

    They lie in the folder ``source``, in its subfolder ``config_name``, or in its only subfolder.
    """
    folder = _find_folder(Path(source).expanduser(), source, config_name, inside)
    split = split.partition("[")[0]  # drop the slice of the hub's notation: train[:10%]
    pattern = re.compile(rf"{re.escape(split)}(-.+)?\.parquet")
    files = sorted(str(file) for file in folder.glob("*.parquet") if pattern.fullmatch(file.name))
    if not files:
        splits = {file.name.partition("-")[0].removesuffix(".parquet") for file in folder.glob("*.parquet")}
        text = f"has no split {split!r} (no {split}-*.parquet in {folder})"
        raise RecipeError(_of_source(source, inside, text, suggest(split, splits).strip()))
    return files


def require_column(table: Table, source: str, argument: str, name: str) -> str:
    """Return ``name`` if the table has that column; else raise a RecipeError that names ``argument``."""
    if name not in table.column_names:
        text = f"is not a column of {source!r}"
        way_out = suggest(name, table.column_names).strip()
        raise RecipeError(Problem(argument, name, text, way_out).within("data"))
    return name


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silence the datasets library inside: it logs each error that this module words and raises."""
    import datasets

    bars = datasets.is_progress_bar_enabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _of_source(source: str, inside: str, text: str, way_out: str = "") -> Problem:
    return Problem(f"{inside}source", source, text, way_out).within("data")


def _find_folder(folder: Path, source: str, config_name: str | None, inside: str) -> Path:
    if folder.is_file():
        way_out = "Give the folder that holds the split's parquet files."
        raise RecipeError(_of_source(source, inside, "is a file", way_out))
    if config_name is not None and (folder / config_name).is_dir():
        return folder / config_name
    if any(folder.glob("*.parquet")):
        return folder
    subfolders = sorted({file.parent.name for file in folder.glob("*/*.parquet")})
    if config_name is not None:
        text = f"is not a folder in {source!r}"
        way_out = suggest(config_name, subfolders).strip()
        raise RecipeError(Problem(f"{inside}config_name", config_name, text, way_out).within("data"))
    if len(subfolders) > 1:
        way_out = f"Set {inside}config_name: {', '.join(subfolders)}."
        raise RecipeError(_of_source(source, inside, "holds several data sets", way_out))
    if not subfolders:
        raise RecipeError(_of_source(source, inside, "has no parquet files, and none one folder below"))
    return folder / subfolders[0]


def _read_hub(source: str, config_name: str | None, split: str | None, inside: str) -> Any:
    from datasets import load_dataset

    part = f" (config_name={config_name!r})" if config_name else ""
    part += f" (split {split!r})" if split else ""
    problem = _of_source(source, inside, f"cannot be loaded from the hub{part}", HUB_WAYS_OUT)
    with quiet_datasets(), third_party_errors(problem):
        return load_dataset(source, config_name, split=split)
