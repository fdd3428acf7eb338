"""The page of an analysis of two stages, layer by layer."""

from __future__ import annotations

from pathlib import Path

from pqqp_lightning.analysis_report import CAPTION, findings, kind_rows, layer_rows, order_key, verdict
from pqqp_lightning.page.blocks import Block, Figure, Page, Section, Table, Words
from pqqp_lightning.page.plots import Bar, Line, draw_bars, draw_walk
from pqqp_lightning.page.sections import Report, about, recipe_of, repeat_section, scale_note
from pqqp_lightning.report import number_text

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
