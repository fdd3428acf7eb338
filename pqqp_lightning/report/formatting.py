"""Formats numbers and names for readers."""

from __future__ import annotations

from collections.abc import Sequence

from pqqp_lightning.storage.reports import DifferenceReport, OrderEntry, Record

Bounds = tuple[float, float] | tuple[None, None]
SIZE_COLUMNS = ("zeros", "bits/weight", "nominal C", "size", "C")


def difference_text(difference: DifferenceReport | None) -> str:
    """``"2.10 (0.50 to 3.40)"``; only the value without an interval, and ``-`` without a difference."""
    if difference is None:
        return number_text(None)
    low, high = bounds((difference["low"], difference["high"]))
    if low is None or low == high:
        return number_text(difference["value"])
    return f"{number_text(difference['value'])} ({interval_text(low, high)})"


def interval_text(low: float | None, high: float | None) -> str:
    """``"0.50 to 3.40"``; empty without an interval."""
    return "" if low is None else f"{number_text(low)} to {number_text(high)}"


def bounds(interval: Sequence[float | None] | None) -> Bounds:
    """The ends of an interval; (None, None) unless both are known."""
    low, high = interval or (None, None)
    return (None, None) if low is None or high is None else (low, high)


def metric_names(measured: Sequence[Record | OrderEntry]) -> list[str]:
    """Every metric of records or orders, in order of appearance."""
    names: dict[str, None] = {}
    for record in measured:
        names.update(dict.fromkeys(record["metrics"]))
    return list(names)


def human_bytes(count: float) -> str:
    """``"61.2 MB"`` (decimal units)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def stage_label(record: Record) -> str:
    """The stage's name, followed by its method if the two differ."""
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
    """A metric's value; ``-`` if it is not finite."""
    if value is None:
        return "-"
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.3g}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
