"""Running text: one string for training and calibration, another for evaluation."""

from __future__ import annotations

import zlib
from pathlib import Path

from pqqp_lightning.data.hub_tables import read_table, require_column
from pqqp_lightning.errors import Problem, RecipeError

PYTHON_DOCS = "python-docs"
SEPARATOR = "\n\n"  # GPTQ's and SparseGPT's code join WikiText's rows this way, and their figures depend on it
HELD_OUT = 10  # one part in ten of plain text files is for evaluation


def read_python_docs(evaluation: bool) -> str:
    """One part of the documentation that Python itself carries (``pydoc_data.topics``).

    Whole topics are held out for evaluation. Paragraphs that a training topic shares with them are dropped from the
    training part.
    """
    from pydoc_data.topics import topics

    # A hash of the name, not the position in the list: a new Python version adds topics, and the others stay put.
    held_out = {name for name in topics if zlib.crc32(name.encode()) % 5 == 1}
    evaluated = [topics[name] for name in sorted(held_out)]
    if evaluation:
        return SEPARATOR.join(evaluated)
    evaluated_paragraphs: set[str] = set()
    for text in evaluated:
        evaluated_paragraphs.update(paragraph.strip() for paragraph in text.split("\n\n"))
    trained = []
    for name in sorted(topics.keys() - held_out):
        paragraphs = topics[name].split("\n\n")
        trained.append("\n\n".join(p for p in paragraphs if p.strip() not in evaluated_paragraphs))
    return SEPARATOR.join(trained)


def read_files(paths: list[str], evaluation: bool) -> str:
    """The last tenth of plain text files for evaluation, or the text before it; the cut is at the end of a line."""
    text = SEPARATOR.join(_read_file(path) for path in paths)
    cut = len(text) - len(text) // HELD_OUT
    line_end = text.find("\n", cut)
    if line_end >= 0:
        cut = line_end + 1
    return text[cut:] if evaluation else text[:cut]


def read_rows(source: str, config_name: str | None, split: str, column: str) -> str:
    """The text column of a hub data set or parquet folder, its rows joined by blank lines."""
    table = read_table(source, config_name, split)
    rows = table[require_column(table, source, "text_column", column)]
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
