"""The light and dark style of figures, and their output as SVG or PNG: equal figures give equal bytes."""

from __future__ import annotations

import io
import re
import textwrap
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH = 5.0
"""Inches; fits a phone. A large screen shows figures at one and a half times this size."""
SHAPES = "osD^vP*X"


@dataclass(frozen=True)
class Style:
    """The colours, which are also those of the page's style sheet.

    Attributes:
        name: "light" or "dark".
        page: background.
        text: main text.
        quiet: axes and their numbers.
        rule: grids.
        accent: what is highlighted.
        other: everything else that is drawn.
        palette: for several series; after Okabe and Ito, distinguishable with any colour vision.
    """

    name: str
    page: str
    text: str
    quiet: str
    rule: str
    accent: str
    other: str
    palette: tuple[str, ...]


LIGHT = Style(
    *("light", "#ffffff", "#1b2026", "#57606a", "#d4dae0", "#0a62c4", "#7d8894"),
    palette=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
)
DARK = Style(
    *("dark", "#0f1419", "#e7ecf1", "#a0acb8", "#313b45", "#6fb3ff", "#66727e"),
    palette=("#56B4E9", "#F0803C", "#2BC79A", "#E39CC4", "#E6B04A", "#3F8FD2", "#e7ecf1"),
)


def styled(style: Style) -> AbstractContextManager[None]:
    """Matplotlib's settings while a figure is drawn."""
    settings: Any = {
        "font.family": "sans-serif",
        "font.size": 10,
        "figure.facecolor": style.page,
        "axes.facecolor": style.page,
        "axes.edgecolor": style.quiet,
        "axes.labelcolor": style.text,
        "axes.titlecolor": style.text,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": style.rule,
        "text.color": style.text,
        "xtick.color": style.quiet,
        "ytick.color": style.quiet,
        "legend.facecolor": style.page,
        "legend.edgecolor": style.rule,
        "legend.labelcolor": style.text,
        "axes.unicode_minus": False,
        "axes.titlesize": 11,
        "figure.titlesize": 11,
    }
    return matplotlib.rc_context(settings)


def plain_text(text: str) -> str:
    """Escape dollars, which matplotlib would read as formulas: the user's names may contain them."""
    return text.replace("$", r"\$")


def title_text(text: str) -> str:
    """Escaped text, wrapped to the width of a figure."""
    return plain_text("\n".join(textwrap.wrap(text, 58)))


def rule_out(axes: Axes, style: Style) -> None:
    """Draw a grid behind the data."""
    axes.grid(color=style.rule, linewidth=0.8)
    axes.set_axisbelow(True)


def svg_text(figure: Figure, salt: str) -> str:
    """The ``<svg>`` element of a figure, for HTML."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # As text, words can be searched, copied and read aloud. A fixed salt gives the same ids each time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"pqqp {salt}"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    element = buffer.getvalue()
    element = element[element.index("<svg") :].strip()
    opening, _, rest = element.partition(">")
    # HTML needs no namespaces, and the page's style sets the size.
    opening = re.sub(r' (xmlns(:xlink)?|version|width|height)="[^"]*"', "", opening)
    rest = re.sub(r"<!--.*?-->\s*", "", rest, flags=re.DOTALL)  # they repeat the text after them
    # Ids must be unique in the page, but matplotlib uses the same ones in every figure.
    rest = re.sub(r'<g id="[a-z0-9_.]*_[0-9]+"', "<g", rest)
    rest = re.sub(r'<g id="([a-z ]+)"', r'<g class="\1"', rest)
    return f"{opening}>{rest}"


def save_png(figure: Figure, path: Path) -> str:
    """Write the PNG; returns its name."""
    figure.set_dpi(160)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
    return path.name
