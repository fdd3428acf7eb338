"""The page of a sweep over knobs and orders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pqqp_lightning.page.blocks import Block, Figure, Notes, Page, Section, Table, Words
from pqqp_lightning.page.plots import Dot, draw_dots
from pqqp_lightning.page.sections import Report, about, recipe_of, repeat_section, scale_note
from pqqp_lightning.report import interval_text, number_text
from pqqp_lightning.sweep_report import point_cells, point_marks, point_name, refusals

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
