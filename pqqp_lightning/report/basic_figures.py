"""Draws dots with intervals, bars and lines."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pqqp_lightning.report.figure_style import WIDTH, Style, plain_text
from pqqp_lightning.report.formatting import interval_text, number_text
from pqqp_lightning.report.plots import MOST_NAMED, BarPlot, DotPlot, Line, LinePlot, is_logarithmic, is_number

LINE, STRIP, GAP = 0.19, 0.26, 0.06
"""Inches: a line of text, the strip below it with the dot or bar, and the gap between rows."""
LABEL = 36
"""Maximum characters in a line of a row's label; the amount is printed to its right."""
AXIS = 0.3
"""Inches below the rows for the numbers of the axis."""
SMALL = 8.5


def draw_dots(plot: DotPlot, style: Style) -> Figure:
    """One row per dot: its name and value, and below them the dot with its interval."""
    labels = [[*_wrap(dot.label, LABEL), *_wrap(dot.remark, 60)] for dot in plot.dots]
    named = [len(_wrap(dot.label, LABEL)) for dot in plot.dots]
    figure, axes, middles = _rows(labels, named, AXIS, style)
    values: list[float] = []
    for dot in plot.dots:
        values += [value for value in (dot.value, dot.low, dot.high) if is_number(value)]
    _scale(axes.xaxis, values)
    axes.grid(axis="x", color=style.rule, linewidth=0.8)
    axes.tick_params(axis="x", length=0, labelsize=SMALL)
    for dot, y, lines, top in zip(plot.dots, middles, labels, named, strict=True):
        amount = dot.text or number_text(dot.value)
        if interval := interval_text(dot.low, dot.high):
            amount += f" ({interval})"
        _write_row(axes, y, lines, top, amount, dot.best, style)
        colour = style.accent if dot.best else style.other
        if is_number(dot.low) and is_number(dot.high):
            axes.plot([dot.low, dot.high], [y, y], color=colour, linewidth=2.5, gid="interval", solid_capstyle="round")
        if is_number(dot.value):
            axes.plot(
                dot.value, y, "o", markersize=7, markeredgewidth=1.8, color=colour, clip_on=False,
                markerfacecolor=style.page if dot.remark else colour, gid="hollow dot" if dot.remark else "dot",
            )  # fmt: skip
    return figure


def draw_bars(plot: BarPlot, style: Style) -> Figure:
    """One row per bar: its name and amount, and below them the bar."""
    labels = [_wrap(bar.label, LABEL) for bar in plot.bars]
    named = [len(lines) for lines in labels]
    figure, axes, middles = _rows(labels, named, 0.0, style)
    axes.set_xlim(0, max((bar.amount for bar in plot.bars), default=0) or 1)
    axes.xaxis.set_visible(False)
    for bar, y, lines, top in zip(plot.bars, middles, labels, named, strict=True):
        _write_row(axes, y, lines, top, bar.text, False, style)
        axes.barh(y, bar.amount, height=0.15, color=style.other if bar.other else style.accent, gid="bar")
    return figure


def draw_lines(plot: LinePlot, style: Style) -> Figure:
    """Lines from column to column; a missing value leaves a gap."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    axes = figure.subplots()
    values: list[float] = []
    for line in plot.lines:
        values += [value for value in line.values if is_number(value)]
    _scale(axes.yaxis, values)
    axes.grid(axis="y", color=style.rule, linewidth=0.8)
    axes.tick_params(length=0, labelsize=SMALL)
    axes.spines["left"].set_visible(False)
    axes.margins(y=0.15)
    last = len(plot.columns) - 1
    axes.set_xlim(-0.4, last + 0.4)
    few = len(plot.columns) <= MOST_NAMED
    width = 48 // len(plot.columns)
    names = [plain_text("\n".join(_wrap(name, width)[:3])) if few else str(i) for i, name in enumerate(plot.columns)]
    axes.set_xticks(range(len(plot.columns)), names)
    for line in sorted(plot.lines, key=lambda line: line.best):
        drawn = [value if is_number(value) else float("nan") for value in line.values]
        thickness, colour = (2.6, style.accent) if line.best else (1.1, style.other)
        axes.plot(drawn, "o-", color=colour, linewidth=thickness, markersize=5 if line.best else 3.5, gid="line")
        if line.best:
            _write_values(axes, line, range(len(drawn)) if few else (0, last), style)
    return figure


def _write_values(axes: Axes, line: Line, columns: Sequence[int], style: Style) -> None:
    """Write the values: below a local minimum, above other points."""
    for i in columns:
        value = line.values[i]
        if not is_number(value):
            continue
        neighbours = [line.values[j] for j in (i - 1, i + 1) if 0 <= j < len(line.values)]
        valley = bool(neighbours) and all(is_number(v) and v > value for v in neighbours)
        axes.annotate(
            number_text(value), (i, value), xytext=(0, -15 if valley else 8), textcoords="offset points", ha="center",
            fontweight="bold", color=style.text, bbox={"facecolor": style.page, "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip


def _rows(
    labels: Sequence[Sequence[str]], named: Sequence[int], below: float, style: Style
) -> tuple[Figure, Axes, list[float]]:
    """An empty figure with a row per label, and the height of each row's strip in inches from the bottom."""
    heights = [LINE * max(1, len(lines)) + STRIP + GAP for lines in labels]
    total = sum(heights) + below + 0.05
    figure = Figure(figsize=(WIDTH, total))
    axes = figure.add_axes((0.02, below / total, 0.96, 1 - below / total))
    axes.set_ylim(0, total - below)
    axes.yaxis.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    middles = []
    top = total - below
    for height in heights:
        top -= height
        middles.append(top + GAP + STRIP / 2)
    return figure, axes, middles


def _write_row(axes: Axes, y: float, lines: Sequence[str], named: int, amount: str, best: bool, style: Style) -> None:
    """Write the label at the left, its remark below it in small letters, and the amount at the right."""
    weight = "bold" if best else "normal"
    place = axes.get_yaxis_transform()
    # A background hides the grid behind the words.
    behind = {"facecolor": style.page, "edgecolor": "none", "pad": 0.8}
    for i, words in enumerate(lines):
        height = y + STRIP / 2 + LINE * (len(lines) - i - 0.5)
        look = {"fontweight": weight} if i < named else {"color": style.quiet, "fontsize": SMALL}
        axes.text(0, height, plain_text(words), transform=place, va="center", bbox=behind, **look)
        if i == 0:
            axes.text(
                1, height, plain_text(amount), transform=place, va="center", ha="right", fontweight=weight, bbox=behind
            )


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width) if text else []


def _scale(axis: Axis, values: Sequence[float]) -> None:
    """Choose the scale, which is logarithmic for values of different magnitude, and a few round ticks."""
    axes = axis.axes
    horizontal = axis is axes.xaxis
    if not values:
        axis.set_ticks([])
        return
    low, high = min(values), max(values)
    margin = 0.04
    if is_logarithmic(values):
        (axes.set_xscale if horizontal else axes.set_yscale)("log")
        axis.set_major_locator(LogLocator(subs=(1, 3) if high / low < 100 else (1,), numticks=6))
        axis.set_minor_formatter(NullFormatter())
        axis.set_tick_params(which="minor", length=0)
        around = (high / low) ** margin
        low, high = low / around, high * around
    else:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        around = margin * (high - low) or abs(low) / 10 or 1.0
        low, high = low - around, high + around
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
    if horizontal:
        axes.set_xlim(low, high)
