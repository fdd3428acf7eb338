"""Draws figures with matplotlib: as SVG for the page, light and dark, and as PNG files.

Importing matplotlib takes a second, so import this module only to draw.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pqqp_lightning.report.analysis_figures import draw_layers
from pqqp_lightning.report.basic_figures import draw_bars, draw_dots, draw_lines
from pqqp_lightning.report.figure_style import LIGHT, Style, save_png, styled, svg_text
from pqqp_lightning.report.plots import AdvantagePlot, BarPlot, CurvePlot, DotPlot, FrontPlot, LayerPlot, LinePlot, Plot
from pqqp_lightning.report.search_figures import draw_front
from pqqp_lightning.report.sweep_figures import draw_advantage, draw_curve

DRAW: dict[type, Callable[[Any, Style], Figure]] = {
    DotPlot: draw_dots,
    BarPlot: draw_bars,
    LinePlot: draw_lines,
    CurvePlot: draw_curve,
    AdvantagePlot: draw_advantage,
    LayerPlot: draw_layers,
    FrontPlot: draw_front,
}


def draw_svg(plot: Plot, style: Style, salt: str) -> str:
    """The figure as an ``<svg>`` element; ``salt`` differs between the figures of one page."""
    with styled(style):
        return svg_text(DRAW[type(plot)](plot, style), salt)


def draw_png(plot: Plot, path: Path) -> str:
    """Write the figure as a PNG, and return the file's name."""
    with styled(LIGHT):
        return save_png(DRAW[type(plot)](plot, LIGHT), path)
