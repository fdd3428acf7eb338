"""What the report and the figure of an analysis share: errors and interference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pqqp_lightning.storage.reports import AnalysisReport

Row = dict[str, Any]
"""A row of a table: the layer's name, and numbers by column."""


def order_key(order: Sequence[str]) -> str:
    """The name of a sequence of stages in the report."""
    return "->".join(order) or "dense"


def layer_rows(report: AnalysisReport) -> list[Row]:
    """One row a layer: the error of its outputs after each stage and each order, and the interference of each order."""
    return [{"layer": layer["name"]} | _cells(layer["errors"], report) for layer in report["layers"]]


def kind_rows(report: AnalysisReport) -> list[Row]:
    """The means over layers of one kind (the last part of their names), and over all; over blocks if all differ."""
    layers = report["layers"]
    kinds = [layer["name"].rpartition(".")[2] for layer in layers]
    named = kinds if len(set(kinds)) < len(kinds) else [layer["name"] for layer in layers]
    groups: dict[str, list[dict[str, float]]] = {}
    for name, layer in zip(named, layers, strict=True):
        groups.setdefault(name, []).append(layer["errors"])
    groups[f"all {len(layers)}"] = [layer["errors"] for layer in layers]
    return [{"layers": name} | _cells(mean_errors(found), report) for name, found in groups.items()]


def interference(errors: dict[str, float], order: Sequence[str]) -> float | None:
    """Delta = e(both) - e(one) - e(other) of an order; None where a stage was not measured alone."""
    parts = [errors.get(name) for name in order]
    return None if None in parts else errors[order_key(order)] - sum(part for part in parts if part is not None)


def _cells(errors: dict[str, float], report: AnalysisReport) -> dict[str, Any]:
    deltas = {f"Δ {order_key(order)}": interference(errors, order) for order in report["orders"]}
    return dict(errors) | {name: delta for name, delta in deltas.items() if delta is not None}


def mean_errors(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over layers, by stage and order."""
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
