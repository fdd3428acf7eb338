"""The page of an analysis of two stages, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as TerminalTable

from pqqp_lightning.algorithms.rank_statistics import leaves_zero_out
from pqqp_lightning.report.blocks import Block, Figure, Page, Section, Table, Words
from pqqp_lightning.report.formatting import number_text, wide_console
from pqqp_lightning.report.sections import Report, about, recipe_of, repeat_section, scale_note
from pqqp_lightning.report.svg_plots import Bar, Line, draw_bars, draw_walk
from pqqp_lightning.storage.files import read_json

ANALYSIS, LAYERS, PICTURE = "analysis.json", "layers.csv", "layers.png"

ADDS_UP = (0.8, 1.25)
"""Errors are said to add up where the whole is so many times their sum."""


Row = dict[str, Any]

CAPTION = "relative squared error of the layers' outputs on the dense model's inputs, and interference (Δ)"


PARTS = 6
"""Columns of the plot over the depth."""


def analysis_page(folder: Path, report: Report) -> Page:
    """The page of ``analysis.json``."""
    report = {"recipe": recipe_of(folder)} | report
    sections = [
        Section("What the layers say", [Words([line[0].upper() + line[1:] + "." for line in findings(report)])]),
        Section("Errors", [_metric_figure(report), _depth_figure(report), *_tables(report)]),
        repeat_section(folder, report, "analyze"),
    ]
    return Page(
        title=folder.resolve().name, about=about(report), verdict=verdict(report).replace("->", "→"), sections=sections
    )


def _metric_figure(report: Report) -> Figure:
    values = {key: record["metrics"].get(report["metric"]) for key, record in report["records"].items()}
    bars = [Bar(key.replace("->", " → "), number_text(value), abs(value or 0.0)) for key, value in values.items()]
    return Figure(f"{report['metric']} of the dense model, after each stage alone, and after both.", draw_bars(bars))


def _depth_figure(report: Report) -> Figure:
    """Mean errors in equal parts of the network's depth: a line for each stage and each order."""
    layers, keys = report["layers"], list(report["layers"][0]["errors"])
    parts = min(PARTS, len(layers))
    cut = [layers[i * len(layers) // parts : (i + 1) * len(layers) // parts] for i in range(parts)]
    lines = []
    for key in keys:
        values = [sum(layer["errors"][key] for layer in part) / len(part) for part in cut]
        best = key == order_key(report["best"])
        lines.append(Line(key.replace("->", " → "), values, [number_text(value) for value in values], best))
    note = scale_note(value for line in lines for value in line.values)
    caption = (
        f"Relative error from the first layers to the last, the mean over each of {parts} parts of the depth{note}."
    )
    caption += f" The thick line is {' → '.join(report['best'])}; from above to below at the right: "
    caption += ", ".join(line.label for line in sorted(lines, key=lambda line: -(line.values[-1] or 0.0))) + "."
    return Figure(caption, draw_walk(lines, [str(i + 1) for i in range(parts)], caption))


def _tables(report: Report) -> list[Block]:
    kinds, layers = kind_rows(report), layer_rows(report)
    return [
        _table(f"Means by kind of layer: {CAPTION}", kinds, best=len(kinds) - 1),
        _table(f"Layer by layer ({len(layers)})", layers, folded=True),
    ]


def _table(caption: str, rows: list[dict[str, object]], best: int | None = None, folded: bool = False) -> Table:
    head = [name.replace("->", " → ") for name in rows[0]]
    cells = [[v if isinstance(v, str) else number_text(v) for v in row.values()] for row in rows]  # type: ignore[arg-type]
    return Table(caption, head, cells, best=best, folded=folded)


def order_key(order: Sequence[str]) -> str:
    """The name of a sequence of stages in the report."""
    return "->".join(order) or "dense"


def read_analysis(folder: Path) -> Report:
    """The run's ``analysis.json``.

    Raises:
        RecipeError: it is damaged.
    """
    return read_json(folder / ANALYSIS, "layers", "orders", "stages", "records", "metric", "higher_is_better")


def layer_rows(report: Report) -> list[Row]:
    """One row a layer: the error of its outputs after each stage and each order, and the interference of each order."""
    return [{"layer": layer["name"]} | _cells(layer["errors"], report) for layer in report["layers"]]


def kind_rows(report: Report) -> list[Row]:
    """The means over layers of one kind (the last part of their names), and over all; over blocks if all differ."""
    layers = report["layers"]
    kinds = [layer["name"].rpartition(".")[2] for layer in layers]
    named = kinds if len(set(kinds)) < len(kinds) else [layer["name"] for layer in layers]
    groups: dict[str, list[Row]] = {}
    for name, layer in zip(named, layers, strict=True):
        groups.setdefault(name, []).append(layer["errors"])
    groups[f"all {len(layers)}"] = [layer["errors"] for layer in layers]
    return [{"layers": name} | _cells(_mean(found), report) for name, found in groups.items()]


def interference(errors: dict[str, float], order: Sequence[str]) -> float | None:
    """Delta = e(both) - e(one) - e(other) of an order; None where a stage was not measured alone."""
    parts = [errors.get(name) for name in order]
    return None if None in parts else errors[order_key(order)] - sum(part for part in parts if part is not None)


def findings(report: Report) -> list[str]:
    """What the numbers say, a sentence each."""
    whole = _mean([layer["errors"] for layer in report["layers"]])
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
    return [*lines, *_gone_lines(report), _additivity_line(report)]


def verdict(report: Report) -> str:
    """What the order gains, in a sentence."""
    first = report["orders"][0]
    metric = report["metric"] if report["higher_is_better"] else f"-{report['metric']}"
    found = report["advantage"]
    if found is None:
        return f"Only {_arrow(first)} can run."
    if found["value"] is None:
        return f"A({_arrow(first)}) is unknown: a metric is not finite."
    between = "" if found["low"] is None else f" ({number_text(found['low'])} to {number_text(found['high'])})"
    words = f"{_arrow(report['best'])} is better" if _is_clear(found) else "no evidence that the order matters"
    words += ", without an interval" if found["value"] and found["low"] is None else ""
    return f"A({_arrow(first)}) = {found['value']:+.4g}{between} in {metric}: {words}."


def print_analysis(folder: Path, console: Console | None = None) -> None:
    """Print the means by kind of layer, and what they say."""
    report = read_analysis(folder)
    console = console or wide_console()
    rows = kind_rows(report)
    table = TerminalTable(title=CAPTION, title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("->", " -> "), justify="left" if name == "layers" else "right")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else number_text(cell) for cell in row.values()))
    console.print(table)
    files = ", ".join([LAYERS, *report.get("figures", [])])
    for line in [*findings(report), f"{folder}: {files}", verdict(report)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _cells(errors: dict[str, float], report: Report) -> Row:
    deltas = {f"Δ {order_key(order)}": interference(errors, order) for order in report["orders"]}
    return dict(errors) | {name: delta for name, delta in deltas.items() if delta is not None}


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def _order_line(report: Report, whole: dict[str, float]) -> str:
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


def _gone_lines(report: Report) -> list[str]:
    gone = [report["gone"][order_key(order)] for order in report["orders"]]
    if not any(gone):
        return []
    same = all(names == gone[0] for names in gone)
    return ["both orders remove the same layers" if same and len(gone) > 1 else "the orders remove different layers"]


def _additivity_line(report: Report) -> str:
    found = report["additivity"]
    if found is None:
        return "independence of the layers' errors was not measured: fewer than two blocks changed"
    low, high = ADDS_UP
    words = "holds roughly" if low <= found["ratio"] <= high else "does not hold"
    return (
        f"independence of the blocks' errors {words} after {_arrow(report['best'])}: the last block's output moves "
        f"{found['ratio']:.2f} times the sum of what {found['parts']} blocks move it alone (mean |cosine| "
        f"{found['cosine']:.2f})"
    )


def _is_clear(advantage: Row | None) -> bool:
    """Whether one order is better: its interval leaves 0 out, or there is none and the two differ."""
    if advantage is None or not advantage["value"]:
        return False
    return advantage["low"] is None or leaves_zero_out(advantage["low"], advantage["high"])


def _arrow(order: Sequence[str]) -> str:
    return " -> ".join(order)
