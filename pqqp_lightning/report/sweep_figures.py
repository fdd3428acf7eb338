"""Draws a sweep's figures from ``sweep.json``: the curve of quantization, and A against what it may grow with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pqqp_lightning.report.figure_style import SHAPES, WIDTH, Style, plain_text, rule_out, title_text
from pqqp_lightning.report.plots import AdvantagePlot, CurvePlot
from pqqp_lightning.report.sweep_numbers import advantage_of, ratio_of
from pqqp_lightning.storage.reports import Correlation, CurveReport, PointReport, SweepReport

Quantity = Literal["gap", "ratio_difference"]
QUANTITIES: tuple[Quantity, ...] = ("gap", "ratio_difference")
WIDE = 20
"""An axis is logarithmic if its largest value is more than this many times the median."""


def draw_curve(plot: CurvePlot, style: Style) -> Figure:
    """Draw quantization alone over C, and each pruning with a dotted line to its C* on the curve."""
    report = plot.report
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    axes = figure.subplots()
    sign = 1 if report["higher_is_better"] else -1
    for i, curve in enumerate(report["curves"]):
        _draw_curve(axes, curve, sign, style.palette[i % len(style.palette)], report["quantizing"])
    prunings = {pt["steps"][report["pruning"]]: pt["pair"] for pt in report["points"]}
    for i, (step, pair) in enumerate(prunings.items()):
        score, rate = pair["score_pruned"], pair["rate_pruned"]
        if score is not None and rate is not None:
            ratios = _ratios(report, step)
            where = ", ".join(f"{ratio:.1f}x" for ratio in ratios) or f"{ratio_of(pair).words(form='.1f')}x"
            label = plain_text(f"{step}: C* {where}")
            _draw_pruning(axes, label, (rate, sign * score), SHAPES[i % len(SHAPES)], ratios, style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda c, _: f"{c:g}x"))
    values: list[float] = []
    for curve in report["curves"]:
        values += [sign * point["score"] for point in curve["points"]]
    if _is_wide(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda m, _: f"{m:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    better = "more is better" if report["higher_is_better"] else "less is better"
    axes.set(xlabel="nominal compression rate C of the stages' layers", ylabel=f"{report['metric']} ({better})")
    axes.set_title(
        title_text(f"{report['quantizing']} alone, and the C* at which it matches the score of {report['pruning']}")
    )
    rule_out(axes, style)
    axes.margins(x=0.1, y=0.1)
    axes.legend(fontsize=8, title="hollow: at its own C; filled: at C*", title_fontsize=8)
    return figure


def _draw_curve(axes: Axes, curve: CurveReport, sign: int, colour: str, name: str) -> None:
    """Draw the line on which C* is interpolated: straight in C and M, so curved on logarithmic axes."""
    rates = [point["rate"] for point in curve["points"]]
    scores = [point["score"] for point in curve["points"]]
    between = np.unique(np.concatenate([np.geomspace(rates[0], rates[-1], 400), rates]))
    label = f"{name} alone" + (f" ({curve['label']})" if curve["label"] else "")
    axes.plot(between, sign * np.interp(between, rates, scores), color=colour, label=plain_text(label))
    axes.plot(rates, [sign * s for s in scores], "o", color=colour)
    for point in curve["points"]:
        text = "dense" if not point["knobs"] else ", ".join(str(v) for v in point["knobs"].values())
        if "bits" in point["knobs"]:
            text = f"{point['knobs']['bits']} bits"
        at = (point["rate"], sign * point["score"])
        offset = (5, 10 * sign)  # on the outer side of the curve
        axes.annotate(plain_text(text), at, xytext=offset, textcoords="offset points", fontsize=8, va="center")


def _draw_pruning(
    axes: Axes, label: str, place: tuple[float, float], shape: str, ratios: Sequence[float], style: Style
) -> None:
    """Draw one pruning at its own rate, and where quantization reaches its score."""
    rate, score = place
    colour = style.palette[1]
    axes.plot(rate, score, shape, color=colour, markerfacecolor=style.page, label=label)
    for ratio in ratios:
        axes.plot([rate, ratio], [score, score], ":", color=colour, linewidth=1)
        axes.plot(ratio, score, shape, color=colour)


def _ratios(report: SweepReport, step: str) -> list[float]:
    """C* of one pruning on each curve."""
    ratios: dict[float, None] = {}
    for point in report["points"]:
        ratio = point["pair"]["equivalent_ratio"]
        if point["steps"][report["pruning"]] == step and ratio is not None:
            ratios[ratio] = None
    return list(ratios)


def draw_advantage(plot: AdvantagePlot, style: Style) -> Figure:
    """Draw A(Q->P) over G(Q, P) and over C*_P - C_Q, with intervals and monotone fits."""
    report = plot.report
    figure = Figure(figsize=(WIDTH, 7.6), layout="constrained")
    panels = figure.subplots(2, 1)
    for axes, quantity in zip(panels, QUANTITIES, strict=True):
        _draw_quantity(axes, quantity, report, style)
    metric = report["metric"] if report["higher_is_better"] else f"-{report['metric']}"
    first, second = report["quantizing"], report["pruning"]
    gained = f"{report['hypothesis']['advantage']} in {metric}\n(above 0: {first} first is better)"
    for axes in panels:
        axes.set_ylabel(plain_text(gained))
    figure.suptitle(title_text(f"Gain of {first} before {second}, over how much weaker {first} is than {second}"))
    panels[0].set_xlabel(plain_text(f"{report['hypothesis']['gap']['name']} in {metric}"))
    panels[1].set_xlabel(plain_text(f"{report['hypothesis']['ratio_difference']['name']} (times)"))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, title=_legend_title(report))
    return figure


def _draw_quantity(axes: Axes, quantity: Quantity, report: SweepReport, style: Style) -> None:
    found = report["hypothesis"][quantity]
    q = report["quantizing"]
    steps = list(dict.fromkeys(point["steps"][q] for point in report["points"]))
    for i, step in enumerate(steps):
        colour = style.palette[i % len(style.palette)]
        shape = SHAPES[i % len(SHAPES)]
        for point in report["points"]:
            if point["steps"][q] == step:
                _draw_point(axes, point, quantity, colour, shape, style)
        axes.plot([], [], shape, color=colour, label=plain_text(step))
    if fit := found["fit"]:
        axes.plot(fit["x"], fit["y"], "-", color=style.other, alpha=0.7, label="monotone fit", zorder=1)
    axes.axhline(0, color=style.quiet, linewidth=0.8)
    axes.axvline(0, color=style.quiet, linewidth=0.8)
    shown = [pt for pt in report["points"] if advantage_of(pt) is not None]
    _scale(axes.yaxis, [advantage_of(pt) for pt in shown])
    if quantity == "gap":
        _scale(axes.xaxis, [pt["pair"]["gap"] for pt in shown])
    axes.set_title(plain_text(_found_text(found)), fontsize=10)
    rule_out(axes, style)


def _draw_point(axes: Axes, point: PointReport, quantity: Quantity, colour: str, shape: str, style: Style) -> None:
    """Draw A with its interval; hollow if the two orders cannot be compared."""
    x, a = point["pair"][quantity], point["pair"]["advantage"]
    if x is None or a is None or a["value"] is None:
        return
    if a["low"] is not None and a["high"] is not None:
        axes.plot([x, x], [a["low"], a["high"]], color=colour, linewidth=1.2, alpha=0.7)
    axes.plot(x, a["value"], shape, color=colour, markerfacecolor=style.page if _is_marked(point) else colour)


def _found_text(found: Correlation) -> str:
    points = f"{found['points']} point{'s' if found['points'] != 1 else ''}"
    if found["value"] is None:
        return points
    return f"Spearman {found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f}), {points}"


def _legend_title(report: SweepReport) -> str:
    pairs = [point["pair"]["advantage"] for point in report["points"] if point["pair"]["advantage"]]
    lines = ["bars: 95% intervals"] if any(pair["low"] is not None for pair in pairs) else []
    if any(_is_marked(point) for point in report["points"]):
        lines.append("hollow: sizes differ, or\na constraint was lost")
    return "\n".join(lines)


def _is_marked(point: PointReport) -> bool:
    return any(order["marks"] for order in point["orders"])


def _scale(axis: Axis, values: Sequence[float | None]) -> None:
    """Use a logarithmic scale on both sides of 0 if a few large values would hide the others."""
    sizes = [abs(v) for v in values if v]
    if sizes and _is_wide(sizes):
        axes: Any = axis.axes
        change = axes.set_yscale if axis is axes.yaxis else axes.set_xscale
        change("symlog", linthresh=float(f"{np.median(sizes):.1g}"))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _is_wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) > WIDE * float(np.median(values))
