"""Errors and interference by layer, for the report, the figure and the CSV file of an analysis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pqqp_lightning.storage.reports import AnalysisReport

Row = dict[str, Any]
"""A row of a table, by column: the layer's name, then numbers."""


def order_key(order: Sequence[str]) -> str:
    """The key of a sequence of stages in the report."""
    return "->".join(order) or "dense"


def layer_rows(report: AnalysisReport) -> list[Row]:
    """One row per layer: its error after each stage and each order, and the interference of each order."""
    return [{"layer": layer["name"]} | _cells(layer["errors"], report) for layer in report["layers"]]


def kind_rows(report: AnalysisReport) -> list[Row]:
    """Means over layers of one kind, and over all layers. The kind is the last part of the name.

    If every layer is of its own kind, each layer gets a row.
    """
    layers = report["layers"]
    kinds = [layer["name"].rpartition(".")[2] for layer in layers]
    named = kinds if len(set(kinds)) < len(kinds) else [layer["name"] for layer in layers]
    groups: dict[str, list[dict[str, float]]] = {}
    for name, layer in zip(named, layers, strict=True):
        groups.setdefault(name, []).append(layer["errors"])
    groups[f"all {len(layers)}"] = [layer["errors"] for layer in layers]
    return [{"layers": name} | _cells(mean_errors(found), report) for name, found in groups.items()]


def interference(errors: dict[str, float], order: Sequence[str]) -> float | None:
    """Delta = e(both) - e(one) - e(other) of an order; None if a stage was not measured alone."""
    if any(name not in errors for name in order):
        return None
    return errors[order_key(order)] - sum(errors[name] for name in order)


def _cells(errors: dict[str, float], report: AnalysisReport) -> Row:
    row: Row = dict(errors)
    for order in report["orders"]:
        delta = interference(errors, order)
        if delta is not None:
            row[f"Δ {order_key(order)}"] = delta
    return row


def mean_errors(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean errors over layers, by stage and order."""
    means = {}
    for key in rows[0]:
        means[key] = sum(row[key] for row in rows) / len(rows)
    return means
