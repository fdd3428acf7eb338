"""A run's report as a page, from its records alone: ``report.html``, which needs nothing else, and ``report.md``."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader

from pqqp_lightning.errors import RecipeError
from pqqp_lightning.report.blocks import Page
from pqqp_lightning.report.kinds import kind_of
from pqqp_lightning.report.markdown import to_markdown
from pqqp_lightning.storage.files import write_text

HTML, MARKDOWN = "report.html", "report.md"


def write_pages(folder: Path) -> list[Path]:
    """Write the pages of the run in ``folder`` beside its records.

    Returns:
        ``report.html`` and ``report.md``.

    Raises:
        RecipeError: there is no whole run, or its folder cannot be written.
    """
    page = read_page(folder)
    return [_write(folder / HTML, to_html(page)), _write(folder / MARKDOWN, to_markdown(page))]


def read_page(folder: Path) -> Page:
    """The page of a run, of a search for the best order, of a sweep, of an analysis, or of a prediction."""
    kind = kind_of(folder)
    return kind.draw(folder, kind.read(folder))


def to_html(page: Page) -> str:
    """One file with its style and drawings; whatever a user named is escaped."""
    templates = Environment(
        loader=PackageLoader("pqqp_lightning.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return templates.get_template(HTML).render(page=page)


def _write(path: Path, text: str) -> Path:
    try:
        write_text(path, text)
    except RecipeError as error:
        reason = getattr(error.__cause__, "strerror", None) or error.__cause__
        words = f"{path}: the page cannot be written: {reason}. Make the folder writable, or report a copy of it."
        raise RecipeError(words) from error
    return path


def show_run(folder: Path) -> None:
    """Print what a run, a search or a sweep found, and write it as a page."""
    kind_of(folder).show(folder)
    html, markdown = write_pages(folder)
    print(f"{html}: the same with plots, for a browser. {markdown}: as text.")
