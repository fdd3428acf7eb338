"""The page of a search for the best order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from pqqp_lightning.checkpoint import checkpoint_bytes
from pqqp_lightning.page.blocks import Block, Figure, Notes, Page, Section, Table, Words
from pqqp_lightning.page.fit import stage_notes
from pqqp_lightning.page.order_verdict import advantages, order_verdict
from pqqp_lightning.page.plots import Dot, draw_dots
from pqqp_lightning.page.sections import (
    Report,
    Walk,
    about,
    names_text,
    recipe_of,
    repeat_section,
    scale_note,
    size_figure,
    walk_blocks,
)
from pqqp_lightning.report import (
    SIZE_COLUMNS,
    bounds,
    difference_text,
    human_bytes,
    interval_text,
    metric_names,
    number_text,
    size_columns,
)

Order = dict[str, Any]


def order_page(folder: Path, report: Report) -> Page:
    """The page of ``order.json``."""
    orders: list[Order] = report["orders"]
    report = {"recipe": recipe_of(folder)} | report
    verdict, *remarks = order_verdict(report)
    sections = [
        Section("Orders", _order_blocks(report)),
        Section("Pairs", _pair_blocks(report)),
        Section("From stage to stage", _walk_blocks(report)),
        Section("Sizes", _size_blocks(folder, report)),
        Section("Orders that cannot run", _refused_blocks(report)),
        Section("Notes", _note_blocks(orders)),
        repeat_section(folder, report, "order"),
    ]
    return Page(
        title=folder.resolve().name,
        about=about(report),
        verdict=verdict,
        remarks=[*remarks, *report.get("notes", [])],
        sections=[section for section in sections if section.blocks],
    )


def _order_blocks(report: Report) -> list[Block]:
    metric = report["metric"]
    dots = [_dot(order, report) for order in report["orders"]]
    better = "more" if report["higher_is_better"] else "less"
    caption = f"{metric} of each order{scale_note(v for dot in dots for v in (dot.value, dot.low, dot.high))}: "
    caption += f"{better} is better."
    if any(dot.low is not None for dot in dots):
        caption += " Bars are each order's own 95% interval."
    if any(dot.remark for dot in dots):
        caption += " Hollow dots differ from the best order in more than the order, as is said below their names."
    return [Figure(caption, draw_dots(dots)), *_behind_figure(report), _order_table(report)]


def _behind_figure(report: Report) -> list[Block]:
    """How far each order is behind the best: their own intervals may overlap although the difference is clear."""
    if not any(order.get("behind") for order in report["orders"]):
        return []
    dots = [_behind_dot(order, order["order"] == report["best"]) for order in report["orders"]]
    caption = (
        f"How far each order is behind the best, in {report['metric']}. Bars are 95% intervals of the difference on "
    )
    caption += "the same samples: where one holds 0, there is no evidence that the two orders differ."
    return [Figure(caption, draw_dots(dots))]


def _behind_dot(order: Order, best: bool) -> Dot:
    behind = order.get("behind") or {}
    value = 0.0 if best else behind.get("value")
    low, high = bounds((behind.get("low"), behind.get("high")))
    detail = interval_text(low, high)
    marks = "; ".join(order.get("marks") or [])
    return Dot(
        names_text(order["order"]), "best" if best else number_text(value), detail, value, low, high, best, marks
    )


def _dot(order: Order, report: Report) -> Dot:
    value = order["metrics"].get(report["metric"])
    low, high = bounds(order.get("interval"))
    return Dot(
        names_text(order["order"]),
        number_text(value),
        interval_text(low, high),
        value,
        low,
        high,
        order["order"] == report["best"],
        "; ".join(order.get("marks") or []),
    )


def _order_table(report: Report) -> Table:
    orders = report["orders"]
    metrics = metric_names(orders)
    intervals = any(bounds(order.get("interval"))[0] is not None for order in orders)
    compared = any(order.get("behind") for order in orders)
    marked = any(order.get("marks") for order in orders)
    rows = []
    for order in orders:
        low, high = bounds(order.get("interval"))
        stages = order["stages"]
        rows.append(
            [
                names_text(order["order"]) + (" (best)" if order["order"] == report["best"] else ""),
                *(number_text(order["metrics"].get(name)) for name in metrics),
                *([f"{number_text(low)} to {number_text(high)}"] if intervals else []),
                *([difference_text(order.get("behind"))] if compared else []),
                *size_columns(stages[-1]),
                f"{sum(stage['elapsed_s'] for stage in stages):.1f}",
                *(["; ".join(order.get("marks") or [])] if marked else []),
            ]
        )
    of_which = f" of {report['metric']}" if len(metrics) > 1 else ""
    interval = [f"95% interval{of_which}"] if intervals else []
    behind = ["behind the best"] if compared else []
    head = ["order", *metrics, *interval, *behind, *SIZE_COLUMNS, "seconds", *(["remark"] if marked else [])]
    best = next(i for i, order in enumerate(orders) if order["order"] == report["best"])
    return Table("Every order, best first", head, rows, best, words=(0, len(head) - 1) if marked else (0,))


def _pair_blocks(report: Report) -> list[Block]:
    pairs = advantages(report)
    if not pairs:
        return []
    metric = report["metric"]
    intervals = any(pair.low is not None for pair in pairs)
    rows = [
        [
            f"A({pair.first} → {pair.second})",
            "-" if pair.value is None else f"{pair.value:+.4g}",
            *([f"{pair.low:+.4g} to {pair.high:+.4g}" if pair.low is not None else "-"] if intervals else []),
            pair.reading(),
        ]
        for pair in pairs
    ]
    explained = f"A(f1 → f2) is by how much {metric} is better where f1 comes just before f2 than the other way round, "
    explained += "both applied to the dense model."
    head = ["pair", f"A in {metric}", *(["95% interval"] if intervals else []), "says"]
    return [Words([explained]), Table("Each pair of stages", head, rows, words=(0, len(head) - 1))]


def _walk_blocks(report: Report) -> list[Block]:
    walks: list[Walk] = [(names_text(o["order"]), o["stages"]) for o in report["orders"]]
    longest = max(len(records) for _, records in walks)
    columns = ["dense", *(f"stage {i}" for i in range(1, longest))]
    best = next(i for i, order in enumerate(report["orders"]) if order["order"] == report["best"])
    return walk_blocks(report["metric"], walks, columns, best)


def _size_blocks(folder: Path, report: Report) -> list[Block]:
    best = next(order for order in report["orders"] if order["order"] == report["best"])
    model = folder / "model"
    if not model.is_dir():
        return [size_figure(best["stages"], " of the best order")]
    on_disk, counted = checkpoint_bytes(model), best["size_bytes"]
    words = f"{model}: the best order's, {human_bytes(on_disk)} on disk ({human_bytes(counted)} counted). "
    words += f"Load it with pqqp_lightning.load({str(folder)!r})."
    return [size_figure(best["stages"], " of the best order", on_disk), Words([words])]


def _refused_blocks(report: Report) -> list[Block]:
    """Orders under the reason that they share."""
    refused = sorted(report["refused"], key=lambda r: r["problems"])
    items = [
        ("; ".join(names_text(r["order"]) for r in same), " ".join(problems))
        for problems, same in groupby(refused, key=lambda r: r["problems"])
    ]
    return [Notes(items)] if items else []


def _note_blocks(orders: list[Order]) -> list[Block]:
    """Each note of a stage once, with the orders' beginnings where it was made."""
    places: dict[tuple[str, str], list[str]] = {}
    for beginning, name, note in _noted(orders):
        where = places.setdefault((name, note), [])
        if beginning not in where:
            where.append(beginning)
    items = []
    for (_, note), where in places.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        items.append((f"{where[0]}{more}", note))
    return [Notes(items)] if items else []


def _noted(orders: list[Order]) -> Iterator[tuple[str, str, str]]:
    for order in orders:
        for i, record in enumerate(order["stages"]):
            beginning = names_text(order["order"][:i]) or record["name"]
            for note in stage_notes(record):
                yield beginning, record["name"], note
