"""Running text, as one string for training and calibration and another for evaluation."""

from __future__ import annotations

import zlib
from pathlib import Path

from pqqp_lightning.data.hub_tables import find_column, read_table
from pqqp_lightning.errors import Problem, RecipeError

PYTHON_DOCS = "python-docs"
SEPARATOR = "\n\n"  # as GPTQ and SparseGPT join WikiText
HELD_OUT = 10  # a tenth of plain text files is for evaluation


def read_python_docs(evaluation: bool) -> str:
    """Part of the Python documentation that comes with Python itself (``pydoc_data.topics``).

    Whole topics are held out, chosen by their names; paragraphs that training topics share with them are left out of
    the training part.
    """
    from pydoc_data.topics import topics

    held_out = {name for name in topics if zlib.crc32(name.encode()) % 5 == 1}
    evaluated = [topics[name] for name in sorted(held_out)]
    if evaluation:
        return SEPARATOR.join(evaluated)
    seen = {paragraph.strip() for text in evaluated for paragraph in text.split("\n\n")}
    trained = (topics[name].split("\n\n") for name in sorted(topics.keys() - held_out))
    return SEPARATOR.join("\n\n".join(p for p in text if p.strip() not in seen) for text in trained)


def read_files(paths: list[str], evaluation: bool) -> str:
    """The last tenth of plain text files, or what stands before it; the cut is at the end of a line."""
    text = SEPARATOR.join(_read_file(path) for path in paths)
    cut = text.find("\n", len(text) - len(text) // HELD_OUT) + 1 or len(text) - len(text) // HELD_OUT
    return text[cut:] if evaluation else text[:cut]


def read_rows(source: str, config_name: str | None, split: str, column: str) -> str:
    """A text column of a hub data set or parquet folder, its rows joined by blank lines."""
    table = read_table(source, config_name, split)
    rows = table[find_column(table, source, "text_column", column)]
    texts = [row for row in rows if isinstance(row, str)]
    if not texts:
        text = f"of {source!r} does not contain text"
        raise RecipeError(Problem("text_column", column, text, "Name another column.").within("data"))
    return SEPARATOR.join(texts)


def _read_file(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        problem = Problem("source", path, f"is not UTF-8 text (byte {error.start})", "Convert it first.")
        raise RecipeError(problem.within("data")) from error
    except OSError as error:
        raise RecipeError(Problem("source", path, f"cannot be read ({error.strerror})").within("data")) from error
