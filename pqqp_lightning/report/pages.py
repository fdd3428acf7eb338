"""Finds what kind of run a folder holds, and prints and writes its report."""

from __future__ import annotations

from pathlib import Path

from pqqp_lightning.errors import RecipeError
from pqqp_lightning.report.analysis import analysis_page, read_analysis
from pqqp_lightning.report.blocks import Page
from pqqp_lightning.report.fit import fit_page, read_report
from pqqp_lightning.report.html import to_html
from pqqp_lightning.report.markdown import to_markdown
from pqqp_lightning.report.order import order_page, read_order_report
from pqqp_lightning.report.prediction import prediction_page, read_prediction
from pqqp_lightning.report.search import read_search_report, search_page
from pqqp_lightning.report.sweep import read_sweep_report, sweep_page
from pqqp_lightning.report.terminal import print_page
from pqqp_lightning.storage.files import write_text
from pqqp_lightning.storage.run_folder import RunFolder


def read_page(folder: Path) -> Page:
    """Read the page of a fit, a search for the best order or pipeline, a sweep, an analysis or a prediction.

    Raises:
        RecipeError: the folder has no report, or a damaged one.
    """
    files = RunFolder(folder)
    if files.sweep.is_file():
        return sweep_page(files, read_sweep_report(files))
    if files.search.is_file():
        return search_page(files, read_search_report(files))
    if files.order.is_file():
        return order_page(files, read_order_report(files))
    if files.analysis.is_file():
        return analysis_page(files, read_analysis(files))
    if files.prediction.is_file():
        return prediction_page(files, read_prediction(files))
    return fit_page(files, read_report(files))


def write_pages(folder: Path, page: Page | None = None) -> list[Path]:
    """Write the run's page into its folder.

    Args:
        folder: of the run.
        page: of the run, if already read.

    Returns:
        ``report.html``, which needs no other file, and ``report.md``.

    Raises:
        RecipeError: the folder has no report, or cannot be written.
    """
    files = RunFolder(folder)
    page = page or read_page(folder)
    return [_write(files.html, to_html(page)), _write(files.markdown, to_markdown(page))]


def show_run(folder: Path) -> None:
    """Print a run's report, and write it as a page."""
    page = read_page(folder)
    print_page(page)
    html, markdown = write_pages(folder, page)
    print(f"{html}: this report with plots. {markdown}: as text.")


def _write(path: Path, text: str) -> Path:
    try:
        write_text(path, text)
    except RecipeError as error:
        reason = getattr(error.__cause__, "strerror", None) or error.__cause__
        way_out = "Make the folder writable, or run the command on a copy of it."
        raise RecipeError(f"{path}: the page cannot be written: {reason}. {way_out}") from error
    return path
