"""The page of a run: one order of stages."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import cast

from pqqp_lightning.errors import RecipeError
from pqqp_lightning.report.blocks import Block, Notes, Page, Section, Table, Words
from pqqp_lightning.report.coverage import EXPLANATION, coverage_notes, shows_whole_model, size_cells, size_head
from pqqp_lightning.report.formatting import human_bytes, metric_names, number_text, stage_label
from pqqp_lightning.report.sections import build_page, size_figure, walk_blocks
from pqqp_lightning.storage.files import read_json
from pqqp_lightning.storage.reports import FitReport, Record
from pqqp_lightning.storage.run_folder import RunFolder

COMMANDS = {"order": "search for the best order", "sweep": "sweep", "analyze": "analysis"}
"""What the other commands do, which write their report only at the end."""

WARNINGS = {
    "running": "This run is not finished. The report shows the stages so far. Resume with --ckpt_path last.",
    "failed": "This run failed. The report shows the stages before the failure. Resume with --ckpt_path last.",
}
"""By status; an unknown status counts as running."""


def fit_page(folder: RunFolder, report: FitReport) -> Page:
    """The page of ``report.json``."""
    records: list[Record] = report["stages"]
    sections = []
    if records:
        sections.append(Section("Stages", _stage_blocks(records)))
    if len(records) > 1:
        names = [record["name"] for record in records]
        walks: list[Block] = []
        for metric in metric_names(records):
            walks += walk_blocks(metric, [(" → ".join(names), records)], names)
        sections.append(Section("From stage to stage", walks))
    if records:
        sections.append(Section("Sizes", _size_blocks(folder, report)))
    remarks = []
    if len(records) > 1 and all(record["constraints_verified"] for record in records):
        remarks.append("Masks and grids were verified exactly after each stage: no stage undid an earlier one.")
    return build_page(
        folder,
        report,
        "fit",
        sections,
        verdict=fit_verdict(records, so_far=report["status"] != "finished"),
        remarks=remarks,
        warning="" if report["status"] == "finished" else WARNINGS.get(report["status"], WARNINGS["running"]),
    )


def fit_verdict(records: Sequence[Record], so_far: bool = False) -> str:
    """How much smaller the model is, and how the metrics changed."""
    if not records:
        return "Nothing was measured."
    dense, last = records[0], records[-1]
    if len(records) == 1:
        metrics = [f"{name} {number_text(value)}" for name, value in dense["metrics"].items()]
        return ", ".join([f"The dense model: {human_bytes(dense['size_bytes'])}", *metrics]) + "."
    metrics = [
        f"{name} from {number_text(dense['metrics'].get(name))} to {number_text(last['metrics'].get(name))}"
        for name in metric_names([dense, last])
    ]
    smaller = last["compression_rate"] >= 1.005
    rate = f"{last['compression_rate']:.2f}x smaller" if smaller else f"not smaller ({last['compression_rate']:.2f}x)"
    words = ", ".join([f"So far {rate}" if so_far else rate, *metrics]) + "."
    return words[0].upper() + words[1:]


def stage_notes(record: Record) -> list[str]:
    """A stage's notes, and its metrics before and after finetuning."""
    before = record.get("metrics_before_finetuning") or {}
    trained = [
        f"{name} {number_text(value)} before finetuning, {number_text(record['metrics'].get(name))} after."
        for name, value in before.items()
    ]
    return [*record["notes"], *trained]


def _stage_blocks(records: Sequence[Record]) -> list[Block]:
    metrics = metric_names(records)
    whole_model = shows_whole_model(records)
    rows = []
    notes = coverage_notes(records)
    for record in records:
        values = [number_text(record["metrics"].get(name)) for name in metrics]
        rows.append([stage_label(record), *values, *size_cells(record, whole_model), f"{record['elapsed_s']:.1f}"])
        notes += [(record["name"], note) for note in stage_notes(record)]
    head = ["stage", *metrics, *size_head(whole_model), "seconds"]
    blocks: list[Block] = [Table("After each stage", head, rows, in_summary=True)]
    if whole_model:
        blocks.append(Words([EXPLANATION]))
    if notes:
        blocks.append(Notes(notes, in_summary=True))
    return blocks


def _size_blocks(folder: RunFolder, report: FitReport) -> list[Block]:
    records = report["stages"]
    checkpoint = report.get("checkpoint")
    layers = report.get("layers")
    blocks: list[Block] = [size_figure(records, file_bytes=checkpoint["file_bytes"] if checkpoint else None)]
    if checkpoint:
        where = folder.path / checkpoint["path"]
        on_disk = human_bytes(checkpoint["file_bytes"])
        counted = human_bytes(records[-1]["size_bytes"])
        loading = f"Load it with pqqp_lightning.load({str(folder.path)!r})."
        lines = [f"{where}: {on_disk} on disk ({counted} counted). {loading}"]
        run = shlex.quote(str(folder.path))
        if folder.tokenizer.is_dir():
            lines.append(f'Try it: pqqp-lightning generate {run} --prompt "Once upon a time"')
        elif folder.preprocessing.is_file():
            lines.append(f"Try it: pqqp-lightning classify {run} IMAGES")
        if folder.samples.is_file():  # a language model, which exports write
            out = shlex.quote(f"{folder.path.name}-hf")
            lines.append(f"For other programs: pqqp-lightning export {run} --to hf --out {out} (--help lists more).")
        elif folder.inputs.is_file():
            out = shlex.quote(f"{folder.path.name}.onnx")
            lines.append(f"For other programs: pqqp-lightning export {run} --to onnx --out {out} (--help lists more).")
        blocks.append(Words(lines, in_summary=True))
    if layers:
        rows = []
        for layer in layers:
            shape = " x ".join(map(str, layer["shape"]))
            size = human_bytes(layer["size_bytes"])
            rows.append([layer["name"], shape, str(layer["bits"]), f"{layer['zeros']:,}", size])
        head = ["layer", "shape", "bits", "zeros", "size"]
        blocks.append(Table(f"Layer by layer ({len(layers)})", head, rows, folded=True))
    return blocks


def read_report(folder: RunFolder) -> FitReport:
    """The run's ``report.json``.

    Raises:
        RecipeError: it is missing or damaged.
    """
    path = folder.path
    if not path.is_dir():
        raise RecipeError(f"{path}: no such folder. Name a run folder, such as runs/quickstart.")
    command = read_json(folder.run).get("command") if folder.run.is_file() else None
    if command in COMMANDS:
        raise RecipeError(f"{path}: the {COMMANDS[command]} is not finished. Resume it with --ckpt_path last.")
    if not folder.report.is_file():
        raise RecipeError(f"{path}: has no {folder.report.name}. Name a run folder, such as runs/quickstart.")
    return cast(FitReport, read_json(folder.report, "status", "stages"))
