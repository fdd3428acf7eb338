"""The kinds of run, told apart by the report that lies in the folder: how each is read, printed and made a page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqqp_lightning.report.analysis import ANALYSIS, analysis_page, print_analysis, read_analysis
from pqqp_lightning.report.blocks import Page
from pqqp_lightning.report.fit import fit_page, print_report, read_report
from pqqp_lightning.report.order import order_page, print_order_report, read_order_report
from pqqp_lightning.report.prediction import PREDICTION, prediction_page, print_prediction, read_prediction
from pqqp_lightning.report.sweep import SWEEP, print_sweep_report, read_sweep_report, sweep_page


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes:
        read: its report, from the run's folder.
        draw: its page, from the folder and the report.
        show: print it, from the folder.
    """

    read: Callable[[Path], dict[str, Any]]
    draw: Callable[[Path, Any], Page]
    show: Callable[[Path], None]


FIT = Kind(read_report, fit_page, print_report)
SEARCHES = {
    SWEEP: Kind(read_sweep_report, sweep_page, print_sweep_report),
    "order.json": Kind(read_order_report, order_page, print_order_report),
    ANALYSIS: Kind(read_analysis, analysis_page, print_analysis),
    PREDICTION: Kind(read_prediction, prediction_page, print_prediction),
}
"""By the file that each of them writes; a run without any is a fit."""


def kind_of(folder: Path) -> Kind:
    """What was run in ``folder``."""
    return next((kind for name, kind in SEARCHES.items() if (folder / name).is_file()), FIT)
