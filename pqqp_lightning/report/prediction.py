"""The page of an order that was predicted without measuring it."""

from __future__ import annotations

from typing import cast

from pqqp_lightning.report.blocks import Figure, Page, Section, Table
from pqqp_lightning.report.formatting import number_text
from pqqp_lightning.report.plots import Bar, BarPlot
from pqqp_lightning.report.sections import about, recipe_of, repeat_section
from pqqp_lightning.storage.files import read_json
from pqqp_lightning.storage.reports import PredictionReport
from pqqp_lightning.storage.run_folder import RunFolder


def prediction_page(folder: RunFolder, report: PredictionReport) -> Page:
    """The page of ``prediction.json``."""
    report = {**report, "recipe": report.get("recipe", recipe_of(folder))}
    bars = [Bar(name, number_text(value), value or 0.0) for name, value in intensity_rows(report)]
    words = caption(report)
    rows = [[name, number_text(value)] for name, value in intensity_rows(report)]
    table = Table("Weakest first", ["stage", "intensity"], rows, in_summary=True)
    return Page(
        title=folder.path.resolve().name,
        about=about(report),
        verdict=prediction_sentence(report).replace("->", "→"),
        remarks=prediction_lines(report),
        sections=[
            Section("Intensities", [Figure(f"{words[0].upper()}{words[1:]}.", BarPlot(bars)), table]),
            repeat_section(folder, report, "order"),
        ],
    )


def read_prediction(folder: RunFolder) -> PredictionReport:
    """The search's ``prediction.json``.

    Raises:
        RecipeError: it is damaged.
    """
    return cast(PredictionReport, read_json(folder.prediction, "predicted", "intensity", "refused"))


def intensity_rows(report: PredictionReport) -> list[tuple[str, float | None]]:
    """The stages and their intensities in the predicted order."""
    return [(name, report["intensity"][name]) for name in report["predicted"]]


def prediction_sentence(report: PredictionReport) -> str:
    """The predicted order, and the reason."""
    why = (
        "the weakest stage first"
        if report["exactly"]
        else "of the orders that can run, it is nearest to the weakest stage first"
    )
    return f"{' -> '.join(report['predicted'])} is predicted to be best: {why}. Nothing was evaluated."


def prediction_lines(report: PredictionReport) -> list[str]:
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


def caption(report: PredictionReport) -> str:
    """The definition of the intensity."""
    layers, samples = report["layers"], report["samples"]
    return f"intensity: the mean relative error of {layers} layers' outputs on {samples} calibration samples"
