"""The page of an order that was predicted and not measured."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from pqqp_lightning.report.blocks import Figure, Page, Section
from pqqp_lightning.report.formatting import number_text, wide_console
from pqqp_lightning.report.sections import Report, about, recipe_of, repeat_section
from pqqp_lightning.report.svg_plots import Bar, draw_bars
from pqqp_lightning.storage.files import read_json

PREDICTION = "prediction.json"


def prediction_page(folder: Path, report: Report) -> Page:
    """The page of ``prediction.json``."""
    report = {"recipe": recipe_of(folder)} | report
    bars = [Bar(name, number_text(value), value or 0.0) for name, value in intensity_rows(report)]
    words = caption(report)
    return Page(
        title=folder.resolve().name,
        about=about(report),
        verdict=prediction_sentence(report).replace("->", "→"),
        remarks=prediction_lines(report),
        sections=[
            Section("Intensities", [Figure(f"{words[0].upper()}{words[1:]}.", draw_bars(bars))]),
            repeat_section(folder, report, "order"),
        ],
    )


def read_prediction(folder: Path) -> Report:
    """The search's ``prediction.json``.

    Raises:
        RecipeError: it is damaged.
    """
    return read_json(folder / PREDICTION, "predicted", "intensity", "refused")


def intensity_rows(report: Report) -> list[tuple[str, float | None]]:
    """The stages and their intensities in the predicted order."""
    return [(name, report["intensity"][name]) for name in report["predicted"]]


def prediction_sentence(report: Report) -> str:
    """The predicted order, and what it rests on."""
    why = "the weakest stage first" if report["exactly"] else "as near to the weakest stage first as can run"
    return f"{' -> '.join(report['predicted'])} is predicted to be best: {why}. Nothing was evaluated."


def prediction_lines(report: Report) -> list[str]:
    """What else there is to know."""
    lines = [f"{' -> '.join(r['order'])} cannot run: {'; '.join(r['problems'])}" for r in report["refused"]]
    for name, gone in report.get("gone", {}).items():
        if gone:
            lines.append(
                f"{name} removes {gone} of {report['layers']} layers, each of which counts as wholly wrong: it may be "
                "weaker than that, beside stages that change every layer."
            )
    if measured := report["measured"]:
        behind = measured["behind"].get(" -> ".join(report["predicted"]))
        if measured["best"] == report["predicted"]:
            lines.append(f"Measured before: it is. {measured['verdict']}")
        elif behind is not None:
            lines.append(f"Measured before: it is behind by {number_text(behind['value'])}. {measured['verdict']}")
    return [*lines, f"Measure it: the same recipe with fit --stage_order [{','.join(report['predicted'])}]."]


def print_prediction(folder: Path, console: Console | None = None) -> None:
    """Print the intensities, and the order that follows from them."""
    report = read_prediction(folder)
    console = console or wide_console()
    table = Table()
    table.add_column("stage")
    table.add_column("intensity", justify="right")
    for name, value in intensity_rows(report):
        table.add_row(name, number_text(value))
    console.print(table)
    for line in [caption(report), *prediction_lines(report), prediction_sentence(report)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def caption(report: Report) -> str:
    """What an intensity is."""
    layers, samples = report["layers"], report["samples"]
    return f"intensity: the mean relative error of {layers} layers' outputs on {samples} calibration samples"
