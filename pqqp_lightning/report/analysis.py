"""The page of an analysis of two stages, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from pqqp_lightning.algorithms.rank_statistics import leaves_zero_out
from pqqp_lightning.report.analysis_numbers import Row, interference, kind_rows, layer_rows, mean_errors, order_key
from pqqp_lightning.report.blocks import Figure, Page, Section, Table, Words
from pqqp_lightning.report.formatting import interval_text, number_text
from pqqp_lightning.report.plots import Bar, BarPlot, LayerPlot, Line, LinePlot
from pqqp_lightning.report.sections import build_page, scale_note
from pqqp_lightning.storage.files import read_json
from pqqp_lightning.storage.reports import AnalysisReport, DifferenceReport
from pqqp_lightning.storage.run_folder import RunFolder

ADDS_UP = (0.8, 1.25)
"""Errors add up roughly if the error of all blocks together is within this range, relative to their sum."""

CAPTION = "relative squared error of the layers' outputs on the dense model's inputs, and interference (Δ)"

PARTS = 6
"""Columns of the plot over the depth."""


def analysis_page(folder: RunFolder, report: AnalysisReport) -> Page:
    """The page of ``analysis.json``."""
    said = [line[0].upper() + line[1:] + "." for line in findings(report)]
    files = ", ".join([folder.layers.name, *report.get("figures", [])])
    kinds = kind_rows(report)
    layers = layer_rows(report)
    tables = [
        _table(f"Means by kind of layer: {CAPTION}", kinds, best=len(kinds) - 1, in_summary=True),
        _table(f"Layer by layer ({len(layers)})", layers, folded=True),
    ]
    whole = Figure("Errors and interference of the stages in every layer.", LayerPlot(report))
    sections = [
        Section("What the layers say", [Words([line.replace("->", "→") for line in said], in_summary=True)]),
        Section("Errors", [_metric_figure(report), _depth_figure(report), whole, *tables]),
        Section("Files", [Words([f"{folder.path}: {files}"], in_summary=True)]),
    ]
    return build_page(folder, report, "analyze", sections, verdict=verdict(report).replace("->", "→"))


def _metric_figure(report: AnalysisReport) -> Figure:
    bars = []
    for key, record in report["records"].items():
        value = record["metrics"].get(report["metric"])
        bars.append(Bar(key.replace("->", " → "), number_text(value), abs(value or 0.0)))
    return Figure(f"{report['metric']} of the dense model, after each stage alone, and after both.", BarPlot(bars))


def _depth_figure(report: AnalysisReport) -> Figure:
    """Mean errors over the network's depth, cut into equal parts: a line for each stage and each order."""
    errors = [layer["errors"] for layer in report["layers"]]
    parts = min(PARTS, len(errors))
    means = []
    for i in range(parts):
        means.append(mean_errors(errors[i * len(errors) // parts : (i + 1) * len(errors) // parts]))
    lines: list[Line] = []
    shown: list[float] = []
    for key in errors[0]:
        values = [mean[key] for mean in means]
        best = key == order_key(report["best"])
        lines.append(Line(key.replace("->", " → "), values, best))
        shown += values
    note = scale_note(shown)
    caption = (
        f"Mean relative error in each of {parts} equal parts of the depth, from the first layers to the last{note}. "
    )
    caption += f"The thick line is {' → '.join(report['best'])}. At the right end, from top to bottom: "
    caption += ", ".join(line.label for line in sorted(lines, key=lambda line: -(line.values[-1] or 0.0))) + "."
    return Figure(caption, LinePlot(lines, [str(i + 1) for i in range(parts)]))


def _table(
    caption: str, rows: list[Row], best: int | None = None, folded: bool = False, in_summary: bool = False
) -> Table:
    head = [name.replace("->", " → ") for name in rows[0]]
    cells = []
    for row in rows:
        cells.append([value if isinstance(value, str) else number_text(value) for value in row.values()])
    return Table(caption, head, cells, best=best, folded=folded, in_summary=in_summary, titled=in_summary)


def read_analysis(folder: RunFolder) -> AnalysisReport:
    """Read ``analysis.json``."""
    needed = ("layers", "orders", "stages", "records", "metric", "higher_is_better")
    return cast(AnalysisReport, read_json(folder.analysis, *needed))


def findings(report: AnalysisReport) -> list[str]:
    """The findings, one sentence each."""
    whole = mean_errors([layer["errors"] for layer in report["layers"]])
    lines = [_order_line(report, whole)]
    for order in report["orders"]:
        key = order_key(order)
        if (delta := interference(whole, order)) is not None:
            parts = sum(whole[name] for name in order)
            share = f", {delta / parts:+.0%} of the parts' sum" if parts else ""
            lines.append(f"interference of {_arrow(order)}: {number_text(delta)}{share}")
        mixed, units = report["selectivity"][key]
        if units:
            lines.append(_selectivity_line(order, mixed, units))
    gone = [report["gone"][order_key(order)] for order in report["orders"]]
    if any(gone):
        same = len(gone) > 1 and all(names == gone[0] for names in gone)
        lines.append("both orders remove the same layers" if same else "the orders remove different layers")
    return [*lines, _additivity_line(report)]


def verdict(report: AnalysisReport) -> str:
    """The gain of the better order, in one sentence."""
    first = report["orders"][0]
    metric = report["metric"] if report["higher_is_better"] else f"-{report['metric']}"
    found = report["advantage"]
    if found is None:
        return f"Only {_arrow(first)} can run."
    if found["value"] is None:
        return f"A({_arrow(first)}) is unknown: a metric is not finite."
    between = "" if found["low"] is None else f" ({interval_text(found['low'], found['high'])})"
    words = f"{_arrow(report['best'])} is better" if _is_clear(found) else "no evidence that the order matters"
    words += ", without an interval" if found["value"] and found["low"] is None else ""
    return f"A({_arrow(first)}) = {found['value']:+.4g}{between} in {metric}: {words}."


def _order_line(report: AnalysisReport, whole: dict[str, float]) -> str:
    if len(report["orders"]) < 2:
        return f"mean error of the layers: {number_text(whole[order_key(report['orders'][0])])}"
    first, second = (whole[order_key(order)] for order in report["orders"])
    if first == second:
        return f"the layers' mean error is the same in both orders: {number_text(first)}"
    less = min(report["orders"], key=lambda order: whole[order_key(order)])
    words = f"the layers' mean error is smaller after {_arrow(less)}"
    if not _is_clear(report["advantage"]):
        return words
    return f"{words}, {'and so is' if less == report['best'] else 'unlike'} the loss in {report['metric']}"


def _selectivity_line(order: Sequence[str], mixed: int, units: int) -> str:
    if not mixed:
        return f"disjoint selectivity holds in {_arrow(order)}: no quantization unit is pruned in part"
    return (
        f"disjoint selectivity does not hold in {_arrow(order)}: {mixed / units:.1%} of {units:,} quantization units "
        "are pruned in part"
    )


def _additivity_line(report: AnalysisReport) -> str:
    found = report["additivity"]
    if found is None:
        return "independence of the layers' errors was not measured: fewer than two blocks changed"
    low, high = ADDS_UP
    words = "holds roughly" if low <= found["ratio"] <= high else "does not hold"
    return (
        f"independence of the blocks' errors {words} after {_arrow(report['best'])}: the last block's output changes "
        f"by {found['ratio']:.2f} times the sum of the changes by {found['parts']} blocks alone (mean |cosine| "
        f"{found['cosine']:.2f})"
    )


def _is_clear(advantage: DifferenceReport | None) -> bool:
    """Whether one order is better: the interval excludes 0, or without an interval the two differ."""
    if advantage is None or not advantage["value"]:
        return False
    return advantage["low"] is None or leaves_zero_out(advantage["low"], advantage["high"])


def _arrow(order: Sequence[str]) -> str:
    return " -> ".join(order)
