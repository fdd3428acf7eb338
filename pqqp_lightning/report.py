"""The table at the end of a run, drawn from its records alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pqqp_lightning.errors import RecipeError
from pqqp_lightning.record import REPORT, RUN, Record
from pqqp_lightning.storage import read_json

Bounds = tuple[float, float] | tuple[None, None]
SIZE_COLUMNS = ("zeros", "bits/weight", "nominal C", "size", "C")

SEARCHES = {"order": "search for the best order", "sweep": "sweep", "analyze": "analysis"}


def stage_table(records: Sequence[Record], title: str | None = None) -> Table:
    """One row a stage: metrics, zeros, bits per weight, nominal C, counted size and rate, seconds."""
    metrics = metric_names(records)
    table = Table(title=title, title_justify="left")
    table.add_column("stage")
    for name in [*metrics, *SIZE_COLUMNS, "seconds"]:
        table.add_column(name, justify="right")
    for record in records:
        values = [number_text(record["metrics"].get(name)) for name in metrics]
        table.add_row(
            stage_label(record),
            *values,
            *size_columns(record),
            f"{record['elapsed_s']:.1f}",
        )
    return table


def print_report(folder: Path, console: Console | None = None) -> None:
    """Print the table, the notes and where things are, from ``report.json``."""
    report = read_report(folder)
    console = console or wide_console()
    console.print(stage_table(report["stages"]))
    for record in report["stages"]:
        for note in record["notes"]:
            console.print(f"{record['name']}: {note}", highlight=False, markup=False, soft_wrap=True)
    if checkpoint := report.get("checkpoint"):
        counted = report["stages"][-1]["size_bytes"]
        console.print(
            f"{folder / checkpoint['path']}: {human_bytes(checkpoint['file_bytes'])} on disk "
            f"({human_bytes(counted)} counted). Load it with pqqp_lightning.load('{folder}').",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    if report["status"] != "finished":
        console.print("The run is not finished: go on with --ckpt_path last.", highlight=False)


def print_order_report(folder: Path, console: Console | None = None) -> None:
    """Print the verdict, every order with its interval and sizes, best first, and A(f1->f2) of each pair."""
    report = read_order_report(folder)
    console = console or wide_console()
    console.print(_order_table(report))
    lines = marked_lines(report["orders"])
    lines += [f"left out: {line}" for line in marked_lines(report.get("left_out", []))]
    lines += [f"{' -> '.join(r['order'])} cannot run: {'; '.join(r['problems'])}" for r in report["refused"]]
    lines += report.get("notes", [])
    metric = report["metric"] if report["higher_is_better"] else f"-{report['metric']}"
    for pair, advantage in report["advantage"].items():
        if advantage["value"] is not None and advantage["value"] >= 0:
            lines.append(f"A({pair}) = {advantage['value']:+.4g}{_range(advantage)} in {metric}")
    if sentence := hypothesis_sentence(report):
        lines.append(sentence)
    if repeats := report.get("repeats"):
        lines.append(repeats["verdict"])
    if (folder / "model").is_dir():
        lines.append(f"{folder / 'model'}: the best order's. Load it with pqqp_lightning.load('{folder}').")
    if "verdict" in report:
        lines.append(report["verdict"])
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _order_table(report: dict[str, Any]) -> Table:
    metrics = metric_names(report["orders"])
    table = Table()
    table.add_column("order")
    for name in [*metrics, "95% interval", *SIZE_COLUMNS]:
        table.add_column(name, justify="right")
    for order in report["orders"]:
        best, interval = order["order"] == report["best"], order.get("interval")
        table.add_row(
            " -> ".join(order["order"]) + (" (best)" if best else ""),
            *[number_text(order["metrics"].get(name)) for name in metrics],
            " to ".join(map(number_text, interval)) if interval else "-",
            *size_columns(order["stages"][-1]),
            style="bold" if best else None,
        )
    return table


def marked_lines(orders: Sequence[dict[str, Any]]) -> list[str]:
    """Of those orders that are marked: why they cannot be compared."""
    return [f"{' -> '.join(order['order'])}: {'; '.join(order['marks'])}" for order in orders if order.get("marks")]


def hypothesis_sentence(report: dict[str, Any]) -> str:
    """How the order from the weakest stage to the strongest did; empty if that was not asked."""
    if not (asked := report.get("hypothesis")):
        return ""
    words = "Weakest first, strongest last"
    words = f"{words if asked.get('exactly', True) else f'As near as was measured to {words.lower()}'} "
    words += f"({' -> '.join(asked['order'])})"
    equal = f" {' and '.join(asked['equal'])} are equally strong alone." if asked.get("equal") else ""
    if asked["order"] == report["best"]:
        return f"{words} is the best.{equal}"
    if asked["behind"]["value"] is None:
        return f"{words} has no finite {report['metric']}.{equal}"
    return f"{words} is behind the best by {difference_text(asked['behind'])} in {report['metric']}.{equal}"


def _range(difference: dict[str, float | None]) -> str:
    low, high = difference["low"], difference["high"]
    return "" if low is None or high is None or low == high else f" ({low:.4g} to {high:.4g})"


def read_report(folder: Path) -> dict[str, Any]:
    """The run's ``report.json``.

    Raises:
        RecipeError: there is none, or it is damaged.
    """
    path = folder / REPORT
    if not folder.is_dir():
        raise RecipeError(f"{folder}: there is no such folder. Name the folder of a run, such as runs/quickstart.")
    command = read_json(folder / RUN).get("command") if (folder / RUN).is_file() else None
    if command in SEARCHES:
        raise RecipeError(f"{folder}: the {SEARCHES[command]} is not finished. Go on with --ckpt_path last.")
    if not path.is_file():
        raise RecipeError(f"{folder}: holds no {REPORT}. Name the folder of a run, such as runs/quickstart.")
    return read_json(path, "status", "stages")


def read_order_report(folder: Path) -> dict[str, Any]:
    """The search's ``order.json``.

    Raises:
        RecipeError: it is damaged.
    """
    return read_json(folder / "order.json", "orders", "best", "metric", "higher_is_better", "advantage", "refused")


def difference_text(difference: dict[str, float | None] | None) -> str:
    """``"2.10 (0.50 to 3.40)"``, without an interval where there is none, ``-`` where there is no difference."""
    value = (difference or {}).get("value")
    low, high = bounds(((difference or {}).get("low"), (difference or {}).get("high")))
    if low is None or low == high:
        return number_text(value)
    return f"{number_text(value)} ({interval_text(low, high)})"


def interval_text(low: float | None, high: float | None) -> str:
    """``"0.50 to 3.40"``; empty where there is no interval."""
    return "" if low is None else f"{number_text(low)} to {number_text(high)}"


def bounds(interval: Sequence[float | None] | None) -> Bounds:
    """An interval's ends; None twice unless both are there."""
    low, high = interval or (None, None)
    return (None, None) if low is None or high is None else (low, high)


def metric_names(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Every metric of records or orders, in order of appearance."""
    return list(dict.fromkeys(name for record in measured for name in record["metrics"]))


def wide_console() -> Console:
    """The terminal, or 120 columns where the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 120)


def human_bytes(count: float) -> str:
    """``"61.2 MB"`` (decimal units)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def stage_label(record: Record) -> str:
    """Its name, and its method where that says more."""
    method = record["method"]
    return record["name"] if not method or method.lower() == record["name"] else f"{record['name']} ({method})"


def size_columns(record: Record) -> list[str]:
    """Zeros, bits per weight, nominal C, counted size and rate, as ``SIZE_COLUMNS`` names them."""
    return [
        f"{100 * record['sparsity']:.1f}%",
        f"{record['bits_per_weight']:.2f}",
        f"{record['nominal_rate']:.2f}x",
        human_bytes(record["size_bytes"]),
        f"{record['compression_rate']:.2f}x",
    ]


def number_text(value: float | None) -> str:
    """A metric; ``-`` where there is no finite value."""
    if value is None:
        return "-"
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.3g}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
