"""The page of a sweep over knobs and orders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as TerminalTable

from pqqp_lightning.algorithms.rank_statistics import Ratio
from pqqp_lightning.report.blocks import Block, Figure, Notes, Page, Section, Table, Words
from pqqp_lightning.report.formatting import interval_text, number_text, wide_console
from pqqp_lightning.report.sections import Report, about, recipe_of, repeat_section, scale_note
from pqqp_lightning.report.svg_plots import Dot, draw_dots
from pqqp_lightning.storage.files import read_json, write_csv

SWEEP, POINTS, CURVE = "sweep.json", "sweep.csv", "curve.csv"


Row = dict[str, Any]


STOPPED = "The sweep ended before all was measured: here is what there is."


def sweep_page(folder: Path, report: Report) -> Page:
    """The page of ``sweep.json``."""
    report = {"recipe": recipe_of(folder)} | report
    verdict, *remarks = report.get("hypothesis", {}).get("verdict", []) or [f"{len(report['points'])} points measured."]
    sections = [
        Section("What the order gains", _advantage_blocks(report)),
        Section("Points", _point_blocks(report)),
        Section("Quantization alone", _curve_blocks(report)),
        Section("Notes", _note_blocks(report)),
        repeat_section(folder, report, "sweep"),
    ]
    return Page(
        title=folder.resolve().name,
        about=about(report),
        verdict=verdict,
        remarks=[*remarks, *report["notes"]],
        warning=STOPPED if report["status"] == "stopped" else "",
        sections=[section for section in sections if section.blocks],
    )


def _advantage_blocks(report: Report) -> list[Block]:
    dots = [_dot(point) for point in report["points"] if "pair" in point and point["pair"]["advantage"]]
    if not dots:
        return []
    first, second = report["quantizing"], report["pruning"]
    metric = report["metric"] if report["higher_is_better"] else f"-{report['metric']}"
    caption = (
        f"{report['hypothesis']['advantage']}: what {first} before {second} gains over the other order, in "
        f"{metric}{scale_note(v for dot in dots for v in (dot.value, dot.low, dot.high))}; above 0, {first} "
        "first is better. Bars are 95% intervals on the same samples: where one holds 0, there is no evidence that the "
        "order matters."
    )
    blocks: list[Block] = [Figure(caption, draw_dots(dots))]
    if figures := report.get("figures"):
        blocks.append(
            Words([f"The same over G and C*, and the curve, as pictures: {', '.join(figures)} in the folder."])
        )
    return blocks


def _dot(point: dict[str, Any]) -> Dot:
    advantage = point["pair"]["advantage"]
    low, high = advantage["low"], advantage["high"]
    detail = interval_text(low, high)
    marks = "; ".join(point_marks(point))
    return Dot(point_name(point), number_text(advantage["value"]), detail, advantage["value"], low, high, remark=marks)


def _point_blocks(report: Report) -> list[Block]:
    caption, head, rows = point_cells(report)
    return [Table(caption, head, rows, words=() if "hypothesis" in report else range(len(head)))]


def _curve_blocks(report: Report) -> list[Block]:
    blocks: list[Block] = []
    for curve in report.get("curves", []):
        of = f" with {curve['label']}" if curve["label"] else ""
        rows = [
            [
                ", ".join(f"{knob} {value}" for knob, value in point["knobs"].items()) or "dense",
                f"{point['rate']:.2f}x",
                number_text(point["metrics"].get(report["metric"])),
            ]
            for point in curve["points"]
        ]
        blocks.append(Table(f"{report['quantizing']} alone{of}", ["knobs", "nominal C", report["metric"]], rows))
    return blocks


def _note_blocks(report: Report) -> list[Block]:
    items = [(point_name(point), mark) for point in report["points"] for mark in point_marks(point)]
    items += refusals(report)
    return [Notes(items)] if items else []


def read_sweep_report(folder: Path) -> Report:
    """The sweep's ``sweep.json``.

    Raises:
        RecipeError: it is damaged.
    """
    return read_json(folder / SWEEP, "points", "alone", "metric", "higher_is_better", "stages", "notes")


def write_tables(folder: Path, report: Report) -> None:
    """Write ``sweep.csv``, and ``curve.csv`` where quantization alone was measured."""
    write_csv(folder / POINTS, [point_row(point, report) for point in report["points"]])
    if report.get("curves"):
        write_csv(folder / CURVE, curve_rows(report))


def point_row(point: Row, report: Report) -> Row:
    """Everything about one point, by column; M is the metric with the sign that makes more of it better."""
    row = _knobs(point, report)
    scores = _alone_scores(report)
    for name, step in point["steps"].items():
        row[f"M({name})"] = scores.get(step)
    for names in _orders(report):
        found = next((o["record"] for o in point["orders"] if o["order"] == names), None)
        shown = "->".join(names)
        row[f"M({shown})"] = _score(found, report)
        row[f"size_bytes({shown})"] = None if found is None else found["size_bytes"]
    if "pair" in point:
        row |= _pair_columns(point["pair"], report)
    row["marks"] = "; ".join(point_marks(point))
    return row


def curve_rows(report: Report) -> list[Row]:
    """Quantization alone, one row a rate; the dense model comes first."""
    knobs = list(dict.fromkeys(knob for curve in report["curves"] for pt in curve["points"] for knob in pt["knobs"]))
    return [
        {"curve": curve["label"]}
        | {knob: point["knobs"].get(knob) for knob in knobs}
        | {"C": point["rate"], "M": point["score"]}
        | point["metrics"]
        for curve in report["curves"]
        for point in curve["points"]
    ]


def point_marks(point: Row) -> list[str]:
    """Why its orders cannot be compared, and which cannot run."""
    marks = [f"{' -> '.join(order['order'])}: {mark}" for order in point["orders"] for mark in order["marks"]]
    return marks + [f"{' -> '.join(refused['order'])} cannot run" for refused in point["refused"]]


def ratio_of(pair: Row) -> Ratio:
    """C*_P, or on which side of the curve it lies."""
    return Ratio(pair["equivalent_ratio"], pair["beyond"], pair["limit"])


def print_sweep_report(folder: Path, console: Console | None = None) -> None:
    """Print the table of points, what is worth noting, and the verdict."""
    report = read_sweep_report(folder)
    console = console or wide_console()
    caption, head, rows = point_cells(report)
    table = TerminalTable(title=caption, title_justify="left")
    for name in head:
        table.add_column(name, justify="right" if "hypothesis" in report else "left", no_wrap=name == "A")
    for cells in rows:
        table.add_row(*cells)
    console.print(table)
    lines = [f"{point_name(point)}: {mark}" for point in report["points"] for mark in point_marks(point)]
    lines += [f"{order} cannot run: {problem}" for order, problem in refusals(report)]
    lines += report["notes"]
    if report["status"] == "stopped":
        lines.append("The sweep is not finished: give the same command again, and it goes on from here.")
    files = [name for name in (POINTS, CURVE, *report.get("figures", [])) if (folder / name).is_file()]
    lines.append(f"{folder}: {', '.join(files)}")
    for line in [*lines, *report.get("hypothesis", {}).get("verdict", [])]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def point_cells(report: Report) -> tuple[str, list[str], list[list[str]]]:
    """The table of points for people: its caption, its head, and a row a point."""
    return _pair_cells(report) if "hypothesis" in report else _order_cells(report)


def point_name(point: Row) -> str:
    """``"prune[sparsity=0.5], quantize[bits=4]"``."""
    return ", ".join(point["steps"].values())


def refusals(report: Report) -> list[tuple[str, str]]:
    """Every order that cannot run somewhere, and why, once."""
    refused = [(r["order"], p) for point in report["points"] for r in point["refused"] for p in r["problems"]]
    return list(dict.fromkeys((" -> ".join(order), problem) for order, problem in refused))


def _pair_cells(report: Report) -> tuple[str, list[str], list[list[str]]]:
    p, q = report["pruning"], report["quantizing"]
    knobs = list(_knobs(report["points"][0], report))
    metric = report["metric"] if report["higher_is_better"] else f"-{report['metric']}"
    what = f"A = A({q}->{p}) and G = G({q}, {p}) in {metric}; C*-C = C*_{p} - C_{q}"
    head = [*_short(knobs), p, q, f"{p} -> {q}", f"{q} -> {p}", "A", "G", "C*-C"]
    sign, rows = 1 if report["higher_is_better"] else -1, []
    for point in report["points"]:
        row, pair = point_row(point, report), point["pair"]
        shown = [row.get(f"M({name})") for name in (p, q, f"{p}->{q}", f"{q}->{p}")]
        values = [number_text(None if m is None else sign * m) for m in shown]
        found = [_advantage_text(pair["advantage"]), _signed(pair["gap"]), _difference_text(pair)]
        rows.append([*(str(row[name]) for name in knobs), *values, *found])
    return f"{report['metric']} alone and in both orders; {what}", head, rows


def _order_cells(report: Report) -> tuple[str, list[str], list[list[str]]]:
    """The best and the worst order of every point, where there is no pair to be analysed."""
    knobs, metric, rows = list(_knobs(report["points"][0], report)), report["metric"], []
    for point in report["points"]:
        ends = [point["orders"][i] for i in (0, -1)] if point["orders"] else []
        cells = [c for o in ends for c in (" -> ".join(o["order"]), number_text(o["record"]["metrics"].get(metric)))]
        rows.append([*(str(v) for v in _knobs(point, report).values()), *(cells or ["-"] * 4)])
    caption = f"{metric} of the best and of the worst order at every point"
    return caption, [*_short(knobs), "best order", metric, "worst order", metric], rows


def _pair_columns(pair: Row, report: Report) -> Row:
    p, q = report["pruning"], report["quantizing"]
    advantage = pair["advantage"] or {"value": None, "low": None, "high": None}
    return {
        f"A({q}->{p})": advantage["value"],
        "A low": advantage["low"],
        "A high": advantage["high"],
        f"G({q},{p})": pair["gap"],
        f"C_{p}": pair["rate_pruned"],
        f"C_{q}": pair["rate_quantized"],
        f"C*_{p}": pair["equivalent_ratio"],
        f"C*_{p} beyond the curve": pair["beyond"],
        "end of the curve": pair["limit"],
        f"C*_{p} - C_{q}": pair["ratio_difference"],
    }


def _knobs(point: Row, report: Report) -> Row:
    return {f"{name}.{knob}": v for name in report["stages"] for knob, v in point["knobs"][name].items()}


def _short(knobs: Sequence[str]) -> list[str]:
    """Names of knobs without their stages, where that is enough to tell them apart."""
    alone = [knob.partition(".")[2] for knob in knobs]
    return [name if alone.count(name) == 1 else knob for name, knob in zip(alone, knobs, strict=True)]


def _alone_scores(report: Report) -> dict[str, float | None]:
    return {entry["step"]: _score(entry["record"], report) for entry in report["alone"]}


def _score(record: Row | None, report: Report) -> float | None:
    """M, where it is finite."""
    value = None if record is None else record["metrics"].get(report["metric"])
    return None if value is None else value if report["higher_is_better"] else -value


def _orders(report: Report) -> list[list[str]]:
    """Every order that some point was measured in."""
    found = {tuple(order["order"]) for point in report["points"] for order in point["orders"]}
    return [list(order) for order in sorted(found)]


def _advantage_text(advantage: Row | None) -> str:
    if advantage is None or advantage["value"] is None:
        return "-"
    low, high = advantage["low"], advantage["high"]
    return f"{advantage['value']:+z.3g}" + ("" if low is None else f" ({low:z.3g} to {high:z.3g})")  # z: no "-0"


def _difference_text(pair: Row) -> str:
    """C*_P - C_Q, or what is known of it: ``">+5.33"``."""
    return "-" if pair["rate_quantized"] is None else ratio_of(pair).words(pair["rate_quantized"], "+.2f")


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3g}"
