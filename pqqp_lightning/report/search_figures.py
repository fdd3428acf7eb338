"""Draws a search's pipelines over their size, from ``search.json``: the front, the budget and the dense model."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pqqp_lightning.report.figure_style import WIDTH, Style, rule_out, title_text
from pqqp_lightning.report.formatting import bounds
from pqqp_lightning.report.plots import FrontPlot, is_logarithmic, is_number
from pqqp_lightning.storage.reports import PipelineEntry, SearchReport

UNIT = 1e6
"""Bytes of a megabyte."""


def draw_front(plot: FrontPlot, style: Style) -> Figure:
    """Draw the metric of every pipeline over its counted size."""
    report = plot.report
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    measured = [entry for entry in report["trials"] if is_number(_value(entry, report))]
    front = sorted((e for e in measured if e["number"] in report["front"]), key=_size)
    others = [entry for entry in measured if entry["number"] not in report["front"]]
    xs, ys = [_size(entry) for entry in others], [_value(entry, report) for entry in others]
    axes.plot(xs, ys, "o", color=style.other, alpha=0.7, markersize=4, label="measured", gid="pipeline")
    _draw_front(axes, front, report, style)
    dense = report["dense"]
    value = dense["metrics"].get(report["metric"])
    if is_number(value):
        axes.plot(dense["size_bytes"] / UNIT, value, "*", color=style.text, markersize=11, label="dense", gid="dense")
    if (limit := report["budget"]["size_bytes"]) is not None:
        axes.axvline(limit / UNIT, color=style.palette[1], linestyle="--", linewidth=1.2, label="budget", gid="budget")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if is_logarithmic([_value(entry, report) for entry in measured]):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda m, _: f"{m:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    better = "more is better" if report["higher_is_better"] else "less is better"
    axes.set(xlabel="counted size in MB", ylabel=f"{report['metric']} ({better})")
    axes.set_title(title_text("Every measured pipeline and the front"))
    rule_out(axes, style)
    axes.legend(fontsize=8)
    return figure


def _draw_front(axes: Axes, front: list[PipelineEntry], report: SearchReport, style: Style) -> None:
    """Draw the front as steps with 95% intervals; the best pipeline is ringed."""
    xs, ys = [_size(entry) for entry in front], [_value(entry, report) for entry in front]
    axes.plot(xs, ys, "o-", color=style.accent, drawstyle="steps-post", label="front", gid="front", markersize=5)
    for entry in front:
        low, high = bounds(entry["interval"])
        if is_number(low) and is_number(high):
            axes.plot([_size(entry)] * 2, [low, high], color=style.accent, linewidth=1.2, alpha=0.6, gid="interval")
        if entry["number"] == report["best"]:
            place = (_size(entry), _value(entry, report))
            axes.plot(*place, "o", markersize=11, markerfacecolor="none", color=style.accent, label="best", gid="best")


def _size(entry: PipelineEntry) -> float:
    assert entry["record"] is not None
    return entry["record"]["size_bytes"] / UNIT


def _value(entry: PipelineEntry, report: SearchReport) -> Any:
    """The metric, which is not None of an entry that is drawn."""
    return None if entry["record"] is None else entry["record"]["metrics"].get(report["metric"])
