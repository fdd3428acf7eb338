"""The page of an order that was predicted and not measured."""

from __future__ import annotations

from pathlib import Path

from pqqp_lightning.page.blocks import Figure, Page, Section
from pqqp_lightning.page.plots import Bar, draw_bars
from pqqp_lightning.page.sections import Report, about, recipe_of, repeat_section
from pqqp_lightning.prediction_report import caption, intensity_rows, prediction_lines, prediction_sentence
from pqqp_lightning.report import number_text


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
