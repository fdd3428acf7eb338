"""A sweep's figures as PNG, drawn from ``sweep.json`` alone: the curve of quantization, and what A grows with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pqqp_lightning.report.sweep import ratio_of

Report = dict[str, Any]
CURVE, ADVANTAGE = "curve.png", "advantage.png"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which people with any colour vision can tell apart."""
SHAPES = "osD^vP*X"
FIT = "#666666"
WIDE = 20
"""An axis whose largest value is so many times its median is drawn logarithmic."""


def draw_figures(folder: Path, report: Report) -> list[str]:
    """Draw what the sweep has to show into ``folder``.

    Returns:
        The files' names.
    """
    drawn = []
    if any(len(curve["points"]) > 1 for curve in report.get("curves", [])):
        drawn.append(save_figure(_curve_figure(report), folder / CURVE))
    if any(_advantage(point) is not None for point in report["points"]):
        drawn.append(save_figure(_advantage_figure(report), folder / ADVANTAGE))
    return drawn


def _curve_figure(report: Report) -> Figure:
    """Quantization alone over C; each pruning beside it, with a dotted line to its C* on the curve."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    sign = 1 if report["higher_is_better"] else -1
    for i, curve in enumerate(report["curves"]):
        _draw_curve(axes, curve, sign, COLOURS[i % len(COLOURS)], report["quantizing"])
    prunings = {pt["steps"][report["pruning"]]: pt["pair"] for pt in report["points"]}
    for i, (step, pair) in enumerate(prunings.items()):
        if pair["score_pruned"] is not None and pair["rate_pruned"] is not None:
            _draw_pruning(axes, step, pair, sign, SHAPES[i % len(SHAPES)], _ratios(report, step))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda c, _: f"{c:g}x"))
    if _is_wide([sign * pt["score"] for curve in report["curves"] for pt in curve["points"]]):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda m, _: f"{m:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    better = "more is better" if report["higher_is_better"] else "less is better"
    axes.set(xlabel="nominal compression rate C of the stages' layers", ylabel=f"{report['metric']} ({better})")
    axes.set_title(
        plain_text(f"{report['quantizing']} alone, and the C* at which it scores as {report['pruning']} does")
    )
    axes.grid(alpha=0.3)
    axes.margins(x=0.1, y=0.1)
    axes.legend(fontsize=8, title="hollow: at its own C; filled: at C*", title_fontsize=8)
    return figure


def _draw_curve(axes: Axes, curve: Report, sign: int, colour: str, name: str) -> None:
    """The line on which C* is interpolated, which is straight in C and M, and so bent on logarithmic axes."""
    rates, scores = ([pt[key] for pt in curve["points"]] for key in ("rate", "score"))
    between = np.unique(np.concatenate([np.geomspace(rates[0], rates[-1], 400), rates]))
    label = f"{name} alone" + (f" ({curve['label']})" if curve["label"] else "")
    axes.plot(between, sign * np.interp(between, rates, scores), color=colour, label=plain_text(label))
    axes.plot(rates, [sign * s for s in scores], "o", color=colour)
    for point in curve["points"]:
        text = "dense" if not point["knobs"] else ", ".join(str(v) for v in point["knobs"].values())
        if "bits" in point["knobs"]:
            text = f"{point['knobs']['bits']} bits"
        at, free = (point["rate"], sign * point["score"]), (5, 10 * sign)  # the side that the curve turns from
        axes.annotate(plain_text(text), at, xytext=free, textcoords="offset points", fontsize=8, va="center")


def _draw_pruning(axes: Axes, step: str, pair: Report, sign: int, shape: str, ratios: Sequence[float]) -> None:
    """One pruning at its own rate, and where quantization scores the same."""
    score = sign * pair["score_pruned"]
    where = ", ".join(f"{ratio:.1f}x" for ratio in ratios) or f"{ratio_of(pair).words(form='.1f')}x"
    label = f"{step}: C* {where}"
    axes.plot(pair["rate_pruned"], score, shape, color=COLOURS[1], markerfacecolor="white", label=plain_text(label))
    for ratio in ratios:
        axes.plot([pair["rate_pruned"], ratio], [score, score], ":", color=COLOURS[1], linewidth=1)
        axes.plot(ratio, score, shape, color=COLOURS[1])


def _ratios(report: Report, step: str) -> list[float]:
    """C* of one pruning on every curve."""
    own = (pt["pair"]["equivalent_ratio"] for pt in report["points"] if pt["steps"][report["pruning"]] == step)
    return list(dict.fromkeys(ratio for ratio in own if ratio is not None))


def _advantage_figure(report: Report) -> Figure:
    """A(Q->P) over G(Q, P) and over C*_P - C_Q, with intervals and the monotone fits."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, quantity in zip(panels, ("gap", "ratio_difference"), strict=True):
        _draw_quantity(axes, quantity, report)
    metric = report["metric"] if report["higher_is_better"] else f"-{report['metric']}"
    first, second = report["quantizing"], report["pruning"]
    panels[0].set_ylabel(
        plain_text(f"{report['hypothesis']['advantage']} in {metric} (above 0: {first} first is better)")
    )
    figure.suptitle(plain_text(f"What {first} before {second} gains, over how much weaker {first} is than {second}"))
    panels[0].set_xlabel(plain_text(f"{report['hypothesis']['gap']['name']} in {metric}"))
    panels[1].set_xlabel(plain_text(f"{report['hypothesis']['ratio_difference']['name']} (times)"))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, title=_legend_title(report))
    return figure


def _draw_quantity(axes: Axes, quantity: str, report: Report) -> None:
    found, q = report["hypothesis"][quantity], report["quantizing"]
    steps = list(dict.fromkeys(point["steps"][q] for point in report["points"]))
    for i, step in enumerate(steps):
        own = [pt for pt in report["points"] if pt["steps"][q] == step and _advantage(pt) is not None]
        own = [pt for pt in own if pt["pair"][quantity] is not None]
        colour, shape = COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)]
        for point in own:
            _draw_point(axes, point, quantity, colour, shape)
        axes.plot([], [], shape, color=colour, label=plain_text(step))
    if fit := found["fit"]:
        axes.plot(fit["x"], fit["y"], "-", color=FIT, alpha=0.7, label="monotone fit", zorder=1)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(0, color="black", linewidth=0.8)
    shown = [pt for pt in report["points"] if _advantage(pt) is not None]
    _scale(axes.yaxis, [_advantage(pt) for pt in shown])
    if quantity == "gap":
        _scale(axes.xaxis, [pt["pair"]["gap"] for pt in shown])
    axes.set_title(plain_text(_found_text(found)), fontsize=10)
    axes.grid(alpha=0.3)


def _draw_point(axes: Axes, point: Report, quantity: str, colour: str, shape: str) -> None:
    """A with its interval; hollow where the two orders differ in more than the order."""
    pair = point["pair"]
    x, a = pair[quantity], pair["advantage"]
    if a["low"] is not None:
        axes.plot([x, x], [a["low"], a["high"]], color=colour, linewidth=1.2, alpha=0.7)
    axes.plot(x, a["value"], shape, color=colour, markerfacecolor="white" if _is_marked(point) else colour)


def _found_text(found: Report) -> str:
    points = f"{found['points']} point{'s' if found['points'] != 1 else ''}"
    if found["value"] is None:
        return points
    return f"Spearman {found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f}), {points}"


def _legend_title(report: Report) -> str:
    pairs = [point["pair"]["advantage"] for point in report["points"] if point["pair"]["advantage"]]
    lines = ["bars: 95% intervals"] if any(pair["low"] is not None for pair in pairs) else []
    if any(_is_marked(point) for point in report["points"]):
        lines.append("hollow: sizes differ, or\na constraint was lost")
    return "\n".join(lines)


def _is_marked(point: Report) -> bool:
    return any(order["marks"] for order in point["orders"])


def _advantage(point: Report) -> float | None:
    advantage = point["pair"]["advantage"] if "pair" in point else None
    return None if advantage is None else advantage["value"]


def _scale(axis: Axis, values: Sequence[float | None]) -> None:
    """Logarithmic to both sides of 0 where a few values would hide the others."""
    sizes = [abs(v) for v in values if v]
    if sizes and _is_wide(sizes):
        axes: Any = axis.axes
        change = axes.set_yscale if axis is axes.yaxis else axes.set_xscale
        change("symlog", linthresh=float(f"{np.median(sizes):.1g}"))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _is_wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) > WIDE * float(np.median(values))


def plain_text(text: str) -> str:
    """Text without formulas: a user's name may hold a dollar."""
    return text.replace("$", r"\$")


def save_figure(figure: Figure, path: Path) -> str:
    """Write the PNG, the same bytes for the same figure; returns its name."""
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
    return path.name
