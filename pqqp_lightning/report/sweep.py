"""The page of a sweep over arguments and orders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from pqqp_lightning.report.blocks import Block, Figure, Notes, Page, Section, Table, Words
from pqqp_lightning.report.coverage import coverage_notes
from pqqp_lightning.report.formatting import number_text
from pqqp_lightning.report.plots import AdvantagePlot, CurvePlot, Dot, DotPlot
from pqqp_lightning.report.sections import build_page, dots_note
from pqqp_lightning.report.sweep_numbers import (
    arguments_of,
    has_advantage,
    has_curve,
    point_marks,
    point_name,
    point_row,
    ratio_of,
    refusals,
)
from pqqp_lightning.storage.files import read_json
from pqqp_lightning.storage.reports import DifferenceReport, SweepReport
from pqqp_lightning.storage.run_folder import RunFolder

STOPPED = "The sweep is not finished. Run the same command again to resume it."


def sweep_page(folder: RunFolder, report: SweepReport) -> Page:
    """The page of ``sweep.json``."""
    sentences = report["hypothesis"]["verdict"] if "hypothesis" in report else []
    verdict, *remarks = sentences or [f"{len(report['points'])} points measured."]
    files = [path.name for path in (folder.points, folder.curve) if path.is_file()]
    files += report.get("figures", [])
    sections = [
        Section("What the order gains", _advantage_blocks(report)),
        Section("Points", [_point_table(report)]),
        Section("Quantization alone", _curve_blocks(report)),
        Section("Notes", _note_blocks(report)),
        Section("Files", [Words([f"{folder.path}: {', '.join(files)}"], in_summary=True)]),
    ]
    warning = STOPPED if report["status"] == "stopped" else ""
    remarks += report["notes"]
    return build_page(folder, report, "sweep", sections, verdict=verdict, remarks=remarks, warning=warning)


def _advantage_blocks(report: SweepReport) -> list[Block]:
    dots = []
    for point in report["points"]:
        if "pair" in point and (advantage := point["pair"]["advantage"]):
            value, low, high = advantage["value"], advantage["low"], advantage["high"]
            marks = "; ".join(point_marks(point))
            dots.append(Dot(point_name(point), value, low, high, remark=marks))
    if not dots:
        return []
    first, second = report["quantizing"], report["pruning"]
    metric = report["metric"] if report["higher_is_better"] else f"-{report['metric']}"
    caption = (
        f"{report['hypothesis']['advantage']}: how much {first} before {second} gains over the other order, in "
        f"{metric}{dots_note(dots)}; above 0, {first} "
        "first is better. Bars are 95% intervals on the same samples: if a bar contains 0, there is no evidence that "
        "the order matters."
    )
    blocks: list[Block] = [Figure(caption, DotPlot(dots))]
    if has_advantage(report):
        over = f"The same over how much weaker {first} is than {second}: in the metric, and in compression."
        blocks.append(Figure(over, AdvantagePlot(report)))
    return blocks


def _point_table(report: SweepReport) -> Table:
    has_pair = "hypothesis" in report
    caption, head, rows = _pair_cells(report) if has_pair else _order_cells(report)
    words = () if has_pair else range(len(head))
    unbroken = [i for i, name in enumerate(head) if name == "A"]
    return Table(caption, head, rows, words=words, in_summary=True, titled=True, unbroken=unbroken)


def _curve_blocks(report: SweepReport) -> list[Block]:
    blocks: list[Block] = []
    if has_curve(report):
        caption = f"{report['quantizing']} alone, and the C* at which it matches the score of each {report['pruning']}."
        blocks.append(Figure(caption, CurvePlot(report)))
    for curve in report.get("curves", []):
        of = f" with {curve['label']}" if curve["label"] else ""
        rows = []
        for point in curve["points"]:
            arguments = ", ".join([f"{name} {value}" for name, value in point["knobs"].items()])
            value = number_text(point["metrics"].get(report["metric"]))
            rows.append([arguments or "dense", f"{point['rate']:.2f}x", value])
        blocks.append(Table(f"{report['quantizing']} alone{of}", ["arguments", "nominal C", report["metric"]], rows))
    return blocks


def _note_blocks(report: SweepReport) -> list[Block]:
    items = []
    for point in report["points"]:
        items += [(point_name(point), mark) for mark in point_marks(point)]
    items += [(order, f"cannot run: {problem}") for order, problem in refusals(report)]
    items += coverage_notes([alone["record"] for alone in report["alone"]])
    return [Notes(items, in_summary=True)] if items else []


def read_sweep_report(folder: RunFolder) -> SweepReport:
    """Read ``sweep.json``."""
    needed = ("points", "alone", "metric", "higher_is_better", "stages", "notes")
    return cast(SweepReport, read_json(folder.sweep, *needed))


def _pair_cells(report: SweepReport) -> tuple[str, list[str], list[list[str]]]:
    """The table of a sweep with a pair to analyse: caption, head, and one row per point."""
    p, q = report["pruning"], report["quantizing"]
    varied = list(arguments_of(report["points"][0], report))
    metric = report["metric"] if report["higher_is_better"] else f"-{report['metric']}"
    what = f"A = A({q}->{p}) and G = G({q}, {p}) in {metric}; C*-C = C*_{p} - C_{q}"
    orders = [[p, q, *report.get("last", [])], [q, p, *report.get("last", [])]]
    head = [*_short(varied), p, q, *(" -> ".join(order) for order in orders), "A", "G", "C*-C"]
    sign = 1 if report["higher_is_better"] else -1
    rows = []
    for point in report["points"]:
        row = point_row(point, report)
        pair = point["pair"]
        shown = [row.get(f"M({name})") for name in (p, q, *("->".join(order) for order in orders))]
        values = [number_text(None if m is None else sign * m) for m in shown]
        gap = "-" if pair["gap"] is None else f"{pair['gap']:+.3g}"
        difference = "-"  # C*_P - C_Q, or its known bound, such as ">+5.33"
        if pair["rate_quantized"] is not None:
            difference = ratio_of(pair).words(pair["rate_quantized"], "+.2f")
        found = [_advantage_text(pair["advantage"]), gap, difference]
        rows.append([*(str(row[name]) for name in varied), *values, *found])
    return f"{report['metric']} alone and in both orders; {what}", head, rows


def _order_cells(report: SweepReport) -> tuple[str, list[str], list[list[str]]]:
    """The best and the worst order of every point, for sweeps without a pair to analyse."""
    varied = list(arguments_of(report["points"][0], report))
    metric = report["metric"]
    rows = []
    for point in report["points"]:
        row = [str(value) for value in arguments_of(point, report).values()]
        for i in (0, -1):
            if point["orders"]:
                order = point["orders"][i]
                row += [" -> ".join(order["order"]), number_text(order["record"]["metrics"].get(metric))]
            else:
                row += ["-", "-"]
        rows.append(row)
    caption = f"{metric} of the best and of the worst order at every point"
    return caption, [*_short(varied), "best order", metric, "worst order", metric], rows


def _short(varied: Sequence[str]) -> list[str]:
    """Names of arguments, without their stages if they stay unique."""
    alone = [argument.partition(".")[2] for argument in varied]
    return [name if alone.count(name) == 1 else argument for name, argument in zip(alone, varied, strict=True)]


def _advantage_text(advantage: DifferenceReport | None) -> str:
    if advantage is None or advantage["value"] is None:
        return "-"
    low, high = advantage["low"], advantage["high"]
    return f"{advantage['value']:+z.3g}" + ("" if low is None else f" ({low:z.3g} to {high:z.3g})")  # z: no "-0"
