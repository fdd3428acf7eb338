"""The figures of a sweep, a search and an analysis as PNG files in the run folder."""

from __future__ import annotations

from pqqp_lightning.report.plots import AdvantagePlot, CurvePlot, FrontPlot, LayerPlot
from pqqp_lightning.report.sweep_numbers import has_advantage, has_curve
from pqqp_lightning.storage.reports import AnalysisReport, SearchReport, SweepReport
from pqqp_lightning.storage.run_folder import RunFolder


def draw_sweep(folder: RunFolder, report: SweepReport) -> list[str]:
    """Draw the sweep's figures into ``folder``.

    Returns:
        The files' names.
    """
    from pqqp_lightning.report.figures import draw_png  # here: matplotlib takes a second to import

    drawn = []
    if has_curve(report):
        drawn.append(draw_png(CurvePlot(report), folder.curve_figure))
    if has_advantage(report):
        drawn.append(draw_png(AdvantagePlot(report), folder.advantage_figure))
    return drawn


def draw_search(folder: RunFolder, report: SearchReport) -> list[str]:
    """Draw the pipelines and their front into ``folder``.

    Returns:
        The file's name.
    """
    from pqqp_lightning.report.figures import draw_png  # here: matplotlib takes a second to import

    return [draw_png(FrontPlot(report), folder.front_figure)]


def draw_analysis(folder: RunFolder, report: AnalysisReport) -> list[str]:
    """Draw the layers into ``folder``.

    Returns:
        The file's name.
    """
    from pqqp_lightning.report.figures import draw_png  # here: matplotlib takes a second to import

    return [draw_png(LayerPlot(report), folder.layers_figure)]
