"""The page of a search for the best pipeline."""

from __future__ import annotations

from typing import cast

from pqqp_lightning.report.blocks import Block, Figure, Page, Section, Table, Words
from pqqp_lightning.report.formatting import bounds, difference_text, human_bytes, interval_text, number_text
from pqqp_lightning.report.plots import Bar, BarPlot, FrontPlot
from pqqp_lightning.report.search_numbers import pipeline_name
from pqqp_lightning.report.sections import build_page
from pqqp_lightning.storage.files import read_json
from pqqp_lightning.storage.reports import PipelineEntry, SearchReport
from pqqp_lightning.storage.run_folder import RunFolder


def search_page(folder: RunFolder, report: SearchReport) -> Page:
    """The page of ``search.json``."""
    files = [path for path in (folder.best_recipe, folder.pipelines, folder.search) if path.is_file()]
    names = ", ".join([*(path.name for path in files), *report.get("figures", [])])
    shown: list[str] = [f"{folder.path}: {names}"]
    if folder.best_recipe.is_file():
        shown.append(f"pqqp-lightning fit --config {folder.best_recipe} runs the best pipeline again.")
    sections = [
        Section("The front", _front_blocks(report)),
        Section("Which arguments mattered", _importance_blocks(report)),
        Section("Every pipeline", [_trial_table(report)]),
        Section("Files", [Words(shown, in_summary=True)]),
    ]
    remarks = [_space_words(report), *report["notes"]]
    verdict = report["verdict"].replace("->", "→")
    return build_page(folder, report, "search", sections, verdict=verdict, remarks=remarks)


def read_search_report(folder: RunFolder) -> SearchReport:
    """Read ``search.json``."""
    return cast(SearchReport, read_json(folder.search, "trials", "front", "best", "metric", "verdict", "budget"))


def _front_blocks(report: SearchReport) -> list[Block]:
    caption = (
        f"{report['metric']} over the counted size. The front is what no other pipeline beats in both; bars are 95% "
        "intervals of each pipeline alone."
    )
    by_number = {entry["number"]: entry for entry in report["trials"]}
    front = [by_number[number] for number in report["front"]]
    table = _table("The front, the smallest first", front, report, in_summary=True)
    return [Figure(caption, FrontPlot(report)), table]


def _trial_table(report: SearchReport) -> Table:
    return _table("Every pipeline, in the order in which they were chosen", report["trials"], report, folded=True)


def _table(
    caption: str, entries: list[PipelineEntry], report: SearchReport, *, in_summary: bool = False, folded: bool = False
) -> Table:
    metric = report["metric"]
    further = [name for name in report["objectives"] if name not in (metric, "size")]
    head = ["pipeline", metric, "95% interval", "behind the best", *further, "bits/weight", "size", "C", "remark"]
    rows = []
    best = None
    for i, entry in enumerate(entries):
        if entry["number"] == report["best"]:
            best = i
        cells = [pipeline_name(entry)]
        record = entry["record"]
        if record is None:
            rows.append([*cells, "-", "-", difference_text(entry["behind"]), *("-" for _ in further), "-",
                         human_bytes(entry["expected_bytes"]), "-", entry["stopped"]])  # fmt: skip
            continue
        low, high = bounds(entry["interval"])
        cells += [number_text(record["metrics"].get(metric)), interval_text(low, high) or "-"]
        cells += [difference_text(entry["behind"]), *(number_text(entry["values"].get(name)) for name in further)]
        cells += [f"{record['bits_per_weight']:.2f}", human_bytes(record["size_bytes"])]
        cells += [f"{record['compression_rate']:.2f}x", "" if entry["fits"] else "over the budget"]
        rows.append(cells)
    details = [i for i, name in enumerate(head) if name in ("95% interval", "behind the best", "remark")]
    words = (0, len(head) - 1)
    return Table(caption, head, rows, best, words, folded=folded, in_summary=in_summary, details=details)


def _importance_blocks(report: SearchReport) -> list[Block]:
    if not report["importance"]:
        return []
    ordered = sorted(report["importance"].items(), key=lambda item: -item[1])
    bars = [Bar(name, f"{share:.0%}", share) for name, share in ordered]
    caption = (
        f"The share of each choice in the differences of {report['metric']} between the pipelines (fANOVA, Hutter et "
        "al. 2014, on ranks)."
    )
    return [Figure(caption, BarPlot(bars))]


def _space_words(report: SearchReport) -> str:
    budget = report["budget"]
    could = f"{report['fitting']} pipelines of the space can run"
    if budget["name"]:
        could += f" and fit {budget['name']}={budget['value']}; {report['over']} are too large"
    if report["refused"]:
        could += f"; {report['refused']} cannot run"
    dense = report["dense"]
    words = f"{could}. {report['sampler']} chose {len(report['trials'])}; "
    value = number_text(dense["metrics"].get(report["metric"]))
    return f"{words}the dense model's {report['metric']} is {value} at {human_bytes(dense['size_bytes'])}."
