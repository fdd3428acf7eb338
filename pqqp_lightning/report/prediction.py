"""The page of an order that was predicted without measuring it."""

from __future__ import annotations

from typing import cast

from pqqp_lightning.report.blocks import Figure, Page, Section, Table
from pqqp_lightning.report.formatting import number_text
from pqqp_lightning.report.plots import Bar, BarPlot
from pqqp_lightning.report.sections import build_page
from pqqp_lightning.storage.files import read_json
from pqqp_lightning.storage.reports import PredictionReport
from pqqp_lightning.storage.run_folder import RunFolder


def prediction_page(folder: RunFolder, report: PredictionReport) -> Page:
    """The page of ``prediction.json``."""
    bars = []
    rows = []
    for name in report["predicted"]:
        value = report["intensity"][name]
        bars.append(Bar(name, number_text(value), value or 0.0))
        rows.append([name, number_text(value)])
    caption = f"Intensity: the mean relative error of {report['layers']} layers' outputs on {report['samples']} "
    caption += "calibration samples."
    table = Table("Weakest first", ["stage", "intensity"], rows, in_summary=True)
    why = "the weakest stage first"
    if not report["exactly"]:
        why = "of the orders that can run, it is nearest to the weakest stage first"
    return build_page(
        folder,
        report,
        "order",
        [Section("Intensities", [Figure(caption, BarPlot(bars)), table])],
        verdict=f"{' → '.join(report['predicted'])} is predicted to be best: {why}. Nothing was evaluated.",
        remarks=_remarks(report),
    )


def read_prediction(folder: RunFolder) -> PredictionReport:
    """Read ``prediction.json``."""
    return cast(PredictionReport, read_json(folder.prediction, "predicted", "intensity", "refused"))


def _remarks(report: PredictionReport) -> list[str]:
    """Orders that cannot run, limits of the prediction, earlier measurements, and how to measure it."""
    lines = [f"{' -> '.join(r['order'])} cannot run: {'; '.join(r['problems'])}" for r in report["refused"]]
    for name, gone in report.get("gone", {}).items():
        if gone:
            lines.append(
                f"{name} removes {gone} of {report['layers']} layers, each of which counts with error 1. Compared with "
                "stages that change every layer, this may overestimate its intensity."
            )
    if measured := report["measured"]:
        behind = measured["behind"].get(" -> ".join(report["predicted"]))
        if measured["best"] == report["predicted"]:
            lines.append(f"An earlier search measured it as the best. {measured['verdict']}")
        elif behind is not None:
            by = number_text(behind["value"])
            lines.append(f"An earlier search measured it behind the best by {by}. {measured['verdict']}")
    return [*lines, f"To measure it, run the same recipe with fit --stage_order [{','.join(report['predicted'])}]."]
