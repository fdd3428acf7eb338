"""A search's pipelines as rows and points, for its tables and its figure."""

from __future__ import annotations

from typing import Any

from pqqp_lightning.report.blocks import ARROW
from pqqp_lightning.report.formatting import bounds
from pqqp_lightning.storage.files import write_csv
from pqqp_lightning.storage.reports import PipelineEntry, SearchReport
from pqqp_lightning.storage.run_folder import RunFolder


def write_pipelines(folder: RunFolder, report: SearchReport) -> None:
    """Write ``search.csv``."""
    write_csv(folder.pipelines, [pipeline_row(entry, report) for entry in report["trials"]])


def pipeline_row(entry: PipelineEntry, report: SearchReport) -> dict[str, Any]:
    """All numbers of one pipeline, by column."""
    row: dict[str, Any] = {"number": entry["number"], "order": " -> ".join(entry["order"])}
    for name, values in report["space"].items():
        for argument in values if isinstance(values, dict) else ():
            if argument in entry["arguments"].get(name, {}):
                row[f"{name}.{argument}"] = entry["arguments"][name][argument]
    record = entry["record"]
    if record is not None:
        row |= {name: value for name, value in record["metrics"].items()}
        row |= {name: record[name] for name in ("size_bytes", "compression_rate", "bits_per_weight", "sparsity")}  # type: ignore[literal-required]
        row |= {name: value for name, value in entry["values"].items() if name not in row and name != "size"}
    low, high = bounds(entry["interval"])
    row |= {f"{report['metric']} low": low, f"{report['metric']} high": high}
    behind = entry["behind"] or {"value": None, "low": None, "high": None}
    row |= {"behind": behind["value"], "behind low": behind["low"], "behind high": behind["high"]}
    row |= {"expected_bytes": entry["expected_bytes"], "exact": entry["exact"], "fits": entry["fits"]}
    row |= {"on the front": entry["number"] in report["front"], "best": entry["number"] == report["best"]}
    return row | {"stopped": entry["stopped"], "applications": entry["applications"]}


def pipeline_name(entry: PipelineEntry) -> str:
    """``"prune (sparsity=0.5) → quantize (bits=4)"``: brackets would be markup in the terminal."""
    words = []
    for name in entry["order"]:
        arguments = ", ".join(f"{argument}={value}" for argument, value in entry["arguments"][name].items())
        words.append(f"{name} ({arguments})" if arguments else name)
    return ARROW.join(words)
