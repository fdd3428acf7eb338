"""Sections and figures that several pages share."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from pqqp_lightning.report.blocks import ARROW, Block, Code, Figure, Page, Section, Table, Words
from pqqp_lightning.report.formatting import human_bytes, number_text, stage_label
from pqqp_lightning.report.plots import MOST_NAMED, Bar, BarPlot, Dot, Line, LinePlot, is_logarithmic
from pqqp_lightning.storage.reports import Origin, Record
from pqqp_lightning.storage.run_folder import RunFolder

Walk = tuple[str, Sequence[Record]]
"""A line's name, and the records of its stages, dense first."""


def walk_blocks(metric: str, walks: Sequence[Walk], columns: Sequence[str], best: int = 0) -> list[Block]:
    """The metric from stage to stage: a figure with a line for each of ``walks``, and a folded table."""
    lines: list[Line] = []
    rows: list[list[str]] = []
    shown: list[float | None] = []
    for i, (name, records) in enumerate(walks):
        values = [record["metrics"].get(metric) for record in records]
        lines.append(Line(name, values, i == best))
        missing = ["-"] * (len(columns) - len(values))
        rows.append([name, *[number_text(value) for value in values], *missing])
        shown += values
    caption = f"{metric} after each stage{scale_note(shown)}."
    if len(walks) > 1:
        caption += f" The thick line is the best order, {walks[best][0]}."
    if len(columns) > MOST_NAMED:
        caption += " 0 is the dense model; the other numbers count the stages."
    figure = Figure(caption, LinePlot(lines, columns))
    if len(walks) == 1:  # the table of stages has the same numbers
        return [figure]
    return [figure, Table(f"{metric} after each stage, as a table", ["order", *columns], rows, best, folded=True)]


def size_figure(records: Sequence[Record], whose: str = "", file_bytes: int | None = None) -> Figure:
    """Counted bytes after each stage, and the bytes on disk if known."""
    bars = [
        Bar(stage_label(r), f"{human_bytes(r['size_bytes'])} ({r['compression_rate']:.2f}x)", r["size_bytes"])
        for r in records
    ]
    caption = f"Counted bytes of the stored model after each stage{whose}."
    if file_bytes is not None:
        bars.append(Bar("files on disk", human_bytes(file_bytes), file_bytes, other=True))
    return Figure(caption, BarPlot(bars))


def _repeat_section(folder: RunFolder, report: Origin, command: str) -> Section:
    """The recipe, the command line, and everything else that the numbers depend on."""
    recipe = folder.recipe
    # A run from Python has no recipe.yaml, but its report may name the stages and data.
    blocks: list[Block] = []
    if recipe.is_file():
        again = [command, "--config", str(recipe), "--run_dir", f"{folder.path}-again"]
        blocks.append(Code("The command line", f"pqqp-lightning {shlex.join(again)}", "sh"))
        text = recipe.read_text(encoding="utf-8", errors="replace")
        blocks.append(Code("recipe.yaml with all defaults", text.rstrip("\n"), "yaml", folded=True))
    else:
        blocks.append(Words(["The run was started from Python, without a recipe.yaml. Its stages and data are:"]))
        if identity := report.get("recipe"):
            text = yaml.safe_dump(identity, sort_keys=False, allow_unicode=True).rstrip("\n")
            blocks.append(Code("What was run", text, "yaml"))
    facts: dict[str, Any] = {"seed": report.get("seed"), **report.get("hardware", {}), **report.get("versions", {})}
    rows = [[name, str(value)] for name, value in facts.items() if value is not None]
    return Section("Run it again", [*blocks, Table("Seed, hardware and versions", (), rows, words=(0, 1))])


def build_page(
    folder: RunFolder,
    report: Origin,
    command: str,
    sections: Sequence[Section],
    *,
    verdict: str,
    remarks: Sequence[str] = (),
    warning: str = "",
) -> Page:
    """A page with the run's name, model and data above ``sections``, and how to repeat the run below.

    Args:
        folder: of the run.
        report: of the run.
        command: that made it.
        sections: empty ones are left out.
        verdict: see :class:`~pqqp_lightning.report.blocks.Page`, like the other arguments.
        remarks: conditions of the verdict.
        warning: why the run is incomplete, and how to resume it.
    """
    recipe: Any = report.get("recipe")
    if "recipe" not in report and folder.recipe.is_file():
        try:
            recipe = yaml.safe_load(folder.recipe.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            recipe = None  # the page can do without the names
    parts = [_named((recipe or {}).get(key)) for key in ("model", "data")]
    return Page(
        title=folder.path.resolve().name,
        about=", ".join(part for part in parts if part),
        verdict=verdict,
        remarks=remarks,
        warning=warning,
        sections=[*(section for section in sections if section.blocks), _repeat_section(folder, report, command)],
    )


def names_text(names: Iterable[str]) -> str:
    """``"prune → quantize"``."""
    return ARROW.join(names)


def dots_note(dots: Sequence[Dot]) -> str:
    """The :func:`scale_note` of a plot of dots with intervals."""
    shown: list[float | None] = []
    for dot in dots:
        shown += (dot.value, dot.low, dot.high)
    return scale_note(shown)


def scale_note(values: Iterable[float | None]) -> str:
    """A note on the axis' scale for the caption; empty if it is linear."""
    return " (logarithmic scale)" if is_logarithmic(values) else ""


def _named(section: Any) -> str:
    """The recipe's model or data in a few words, such as ``"CausalLM smollm2-135m"``."""
    if not isinstance(section, dict):
        return str(section or "").rpartition(".")[2]
    name = str(section.get("class_path", "")).rpartition(".")[2]
    arguments = section.get("init_args") or {}
    which = next((v for k in ("model", "source") if isinstance(v := arguments.get(k), str)), "")
    return f"{name} {which}".strip()
