"""The page of a search for the best order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

from pqqp_lightning.algorithms.rank_statistics import leaves_zero_out
from pqqp_lightning.report.blocks import Block, Figure, Notes, Page, Section, Table, Words
from pqqp_lightning.report.coverage import EXPLANATION, coverage_notes, shows_whole_model, size_cells, size_head
from pqqp_lightning.report.fit import stage_notes
from pqqp_lightning.report.formatting import (
    bounds,
    difference_text,
    human_bytes,
    interval_text,
    metric_names,
    number_text,
)
from pqqp_lightning.report.plots import Dot, DotPlot
from pqqp_lightning.report.sections import (
    Walk,
    build_page,
    dots_note,
    names_text,
    size_figure,
    walk_blocks,
)
from pqqp_lightning.storage.files import read_json
from pqqp_lightning.storage.reports import MarkedOrder, OrderEntry, OrderReport
from pqqp_lightning.storage.run_folder import RunFolder


def order_page(folder: RunFolder, report: OrderReport) -> Page:
    """The page of ``order.json``."""
    orders: list[OrderEntry] = report["orders"]
    verdict, *remarks = _verdict(report)
    walks: list[Walk] = [(names_text(order["order"]), order["stages"]) for order in orders]
    longest = max(len(records) for _, records in walks)
    columns = ["dense", *(f"stage {i}" for i in range(1, longest))]
    sections = [
        Section("Orders", _order_blocks(report)),
        Section("Pairs", _pair_blocks(report)),
        Section("From stage to stage", walk_blocks(report["metric"], walks, columns, _best_index(report))),
        Section("Sizes", _size_blocks(folder, report)),
        Section("Orders that cannot run", _refused_blocks(report)),
        Section("Notes", _note_blocks(orders)),
    ]
    return build_page(folder, report, "order", sections, verdict=verdict, remarks=[*remarks, *report.get("notes", [])])


def _order_blocks(report: OrderReport) -> list[Block]:
    metric = report["metric"]
    dots = []
    for order in report["orders"]:
        value = order["metrics"].get(metric)
        low, high = bounds(order.get("interval"))
        best = order["order"] == report["best"]
        marks = "; ".join(order.get("marks") or [])
        dots.append(Dot(names_text(order["order"]), value, low, high, best, marks))
    better = "more" if report["higher_is_better"] else "less"
    caption = f"{metric} of each order{dots_note(dots)}: {better} is better."
    if any(dot.low is not None for dot in dots):
        caption += " Bars are 95% intervals of each order alone."
    if any(dot.remark for dot in dots):
        caption += " Hollow dots cannot be compared with the others; the reason is below their names."
    return [Figure(caption, DotPlot(dots)), *_behind_figure(report), _order_table(report), *_coverage_blocks(report)]


def _coverage_blocks(report: OrderReport) -> list[Block]:
    """What the stages leave of the model in the best order, and which columns are of the whole model."""
    blocks: list[Block] = []
    if shows_whole_model([order["stages"][-1] for order in report["orders"]]):
        blocks.append(Words([EXPLANATION]))
    if notes := coverage_notes(report["orders"][_best_index(report)]["stages"]):
        blocks.append(Notes(notes, in_summary=True))
    return blocks


def _behind_figure(report: OrderReport) -> list[Block]:
    """How far each order is behind the best: the difference may be clear although the orders' own intervals overlap."""
    if not any(order.get("behind") for order in report["orders"]):
        return []
    dots = []
    for order in report["orders"]:
        behind = order.get("behind")
        low, high = bounds((behind["low"], behind["high"])) if behind else (None, None)
        best = order["order"] == report["best"]
        value = behind["value"] if behind else None
        if best:
            value = 0.0
        marks = "; ".join(order.get("marks") or [])
        dots.append(Dot(names_text(order["order"]), value, low, high, best, marks, "best" if best else ""))
    caption = f"How far each order is behind the best, in {report['metric']}. Bars are 95% intervals of the difference "
    caption += "on the same samples: if a bar contains 0, there is no evidence that the two orders differ."
    return [Figure(caption, DotPlot(dots))]


def _order_table(report: OrderReport) -> Table:
    orders = report["orders"]
    metrics = metric_names(orders)
    intervals = any(bounds(order.get("interval"))[0] is not None for order in orders)
    compared = any(order.get("behind") for order in orders)
    marked = any(order.get("marks") for order in orders)
    whole_model = shows_whole_model([order["stages"][-1] for order in orders])
    of_which = f" of {report['metric']}" if len(metrics) > 1 else ""
    head: list[str] = []
    rows = []
    for order in orders:
        best = " (best)" if order["order"] == report["best"] else ""
        cells = [("order", f"{names_text(order['order'])}{best}")]  # (column, text)
        cells += [(name, number_text(order["metrics"].get(name))) for name in metrics]
        if intervals:
            low, high = bounds(order.get("interval"))
            cells.append((f"95% interval{of_which}", interval_text(low, high) or "-"))
        if compared:
            cells.append(("behind the best", difference_text(order.get("behind"))))
        cells += zip(size_head(whole_model), size_cells(order["stages"][-1], whole_model), strict=True)
        cells.append(("seconds", f"{sum(stage['elapsed_s'] for stage in order['stages']):.1f}"))
        if marked:
            cells.append(("remark", "; ".join(order.get("marks") or [])))
        head = [name for name, _ in cells]
        rows.append([text for _, text in cells])
    details = [i for i, name in enumerate(head) if name in ("behind the best", "seconds", "remark")]
    words = (0, len(head) - 1) if marked else (0,)
    return Table("Every order, best first", head, rows, _best_index(report), words, in_summary=True, details=details)


def _pair_blocks(report: OrderReport) -> list[Block]:
    pairs = advantages(report)
    if not pairs:
        return []
    metric = report["metric"]
    intervals = any(pair.low is not None for pair in pairs)
    rows = []
    for pair in pairs:
        row = [f"A({pair.first} → {pair.second})", "-" if pair.value is None else f"{pair.value:+.4g}"]
        if intervals:
            row.append("-" if pair.low is None else f"{pair.low:+.4g} to {pair.high:+.4g}")
        rows.append([*row, pair.reading()])
    explained = (
        f"A(f1 → f2) says how much better {metric} is with f1 directly before f2 than with f2 directly before f1, "
    )
    explained += "both applied to the dense model."
    head = ["pair", f"A in {metric}", *(["95% interval"] if intervals else []), "meaning"]
    return [Words([explained]), Table("Each pair of stages", head, rows, words=(0, len(head) - 1), in_summary=True)]


def _size_blocks(folder: RunFolder, report: OrderReport) -> list[Block]:
    best = report["orders"][_best_index(report)]
    on_disk = folder.model_bytes()
    if on_disk is None:
        return [size_figure(best["stages"], " of the best order")]
    size = f"{human_bytes(on_disk)} on disk ({human_bytes(best['size_bytes'])} counted)"
    words = f"{folder.model}: the best order's model, {size}. "
    words += f"Load it with pqqp_lightning.load({str(folder.path)!r})."
    return [size_figure(best["stages"], " of the best order", on_disk), Words([words], in_summary=True)]


def _refused_blocks(report: OrderReport) -> list[Block]:
    """The orders that cannot run, grouped by reason."""
    refused = sorted(report["refused"], key=lambda r: r["problems"])
    items = []
    for problems, same in groupby(refused, key=lambda r: r["problems"]):
        orders = "; ".join([names_text(r["order"]) for r in same])
        items.append((orders, f"cannot run: {' '.join(problems)}"))
    return [Notes(items, in_summary=True)] if items else []


def _note_blocks(orders: list[OrderEntry]) -> list[Block]:
    """Each note of a stage once, with the stages before it in the orders that have it."""
    places: dict[tuple[str, str], list[str]] = {}
    for order in orders:
        for i, record in enumerate(order["stages"]):
            applied = names_text(order["order"][:i]) or record["name"]
            for note in stage_notes(record):
                where = places.setdefault((record["name"], note), [])
                if applied not in where:
                    where.append(applied)
    items = []
    for (_, note), where in places.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        items.append((f"{where[0]}{more}", note))
    return [Notes(items)] if items else []


def _best_index(report: OrderReport) -> int:
    return next(i for i, order in enumerate(report["orders"]) if order["order"] == report["best"])


def marked_lines(orders: Sequence[MarkedOrder | OrderEntry]) -> list[str]:
    """A line for each marked order: why it cannot be compared."""
    return [f"{' -> '.join(order['order'])}: {'; '.join(order['marks'])}" for order in orders if order.get("marks")]


def hypothesis_sentence(report: OrderReport) -> str:
    """The result of the order from the weakest stage to the strongest; empty if it is unknown."""
    if not (asked := report.get("hypothesis")):
        return ""
    words = "Weakest first, strongest last"
    words = f"{words if asked.get('exactly', True) else f'The measured order nearest to {words.lower()}'} "
    words += f"({' -> '.join(asked['order'])})"
    equal = f" {' and '.join(asked['equal'])} are equally strong alone." if asked.get("equal") else ""
    if asked["order"] == report["best"]:
        return f"{words} is the best.{equal}"
    if asked["behind"]["value"] is None:
        return f"{words} has no finite {report['metric']}.{equal}"
    return f"{words} is behind the best by {difference_text(asked['behind'])} in {report['metric']}.{equal}"


def read_order_report(folder: RunFolder) -> OrderReport:
    """Read ``order.json``."""
    needed = ("orders", "best", "metric", "higher_is_better", "advantage", "refused")
    return cast(OrderReport, read_json(folder.order, *needed))


@dataclass(frozen=True)
class Advantage:
    """A(first→second): how much better the metric is with ``first`` just before ``second``.

    Attributes:
        value: None if a metric was not finite.
        low: lower end of its interval, if there is one.
        high: upper end.
    """

    first: str
    second: str
    value: float | None
    low: float | None
    high: float | None

    def reading(self) -> str:
        """What the number means."""
        if self.value is None:
            return "unknown: a metric is not finite"
        if self.low is None:
            return "no difference" if self.value == 0 else f"{self.first} first is better, without an interval"
        clear = leaves_zero_out(self.low, self.high)
        return f"{self.first} first is better" if clear else "no evidence that the order matters"


def _verdict(report: OrderReport) -> list[str]:
    """The verdict, and remarks on it."""
    orders = report["orders"]
    sentences = [report["verdict"]]
    if repeats := report.get("repeats"):
        sentences.append(repeats["verdict"])
    if hypothesis := hypothesis_sentence(report):
        sentences.append(hypothesis)
    sentences += [f"Left out: {line}" for line in marked_lines(report.get("left_out", []))]
    sentences += marked_lines(orders)
    measured = f"{len(orders)} order{'s' if len(orders) != 1 else ''}"
    if report.get("strategy"):
        measured = f"{report['strategy'].capitalize()} search: {measured}"
    if report["refused"]:
        measured += f", {len(report['refused'])} cannot run"
    dense = orders[0]["stages"][0]["metrics"].get(report["metric"])
    if dense is not None:
        measured += f"; the dense model's {report['metric']} is {number_text(dense)}"
    return [*(sentence.replace("->", "→") for sentence in sentences), f"{measured}."]


def advantages(report: OrderReport) -> list[Advantage]:
    """Each pair once, in the direction whose advantage is not negative."""
    found: list[Advantage] = []
    for pair, entry in report["advantage"].items():
        first, _, second = pair.partition("->")
        value = entry["value"]
        low, high = bounds((entry["low"], entry["high"]))
        opposite_found = any((a.first, a.second) == (second, first) for a in found)
        if not opposite_found and (value is None or value >= 0):
            found.append(Advantage(first, second, value, low, high))
    return found
