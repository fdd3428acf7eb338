"""A sweep's points as rows, names and marks, for its tables and figures."""

from __future__ import annotations

from typing import Any

from pqqp_lightning.algorithms.rank_statistics import Ratio
from pqqp_lightning.storage.files import write_csv
from pqqp_lightning.storage.reports import PairReport, PointReport, Record, SweepReport
from pqqp_lightning.storage.run_folder import RunFolder

Row = dict[str, Any]
"""A row of a CSV file, by column."""


def has_curve(report: SweepReport) -> bool:
    """Whether quantization alone was measured at two or more rates."""
    return any(len(curve["points"]) > 1 for curve in report.get("curves", []))


def has_advantage(report: SweepReport) -> bool:
    """Whether both orders were measured at any point."""
    return any(advantage_of(point) is not None for point in report["points"])


def write_tables(folder: RunFolder, report: SweepReport) -> None:
    """Write ``sweep.csv``, and ``curve.csv`` if quantization alone was measured."""
    write_csv(folder.points, [point_row(point, report) for point in report["points"]])
    if report.get("curves"):
        write_csv(folder.curve, curve_rows(report))


def point_row(point: PointReport, report: SweepReport) -> Row:
    """All numbers of one point, by column; M is the metric, negated if lower is better."""
    row = arguments_of(point, report)
    scores = {entry["step"]: _score(entry["record"], report) for entry in report["alone"]}
    for name, step in point["steps"].items():
        row[f"M({name})"] = scores.get(step)
    for names in _orders(report):
        found = next((o["record"] for o in point["orders"] if o["order"] == names), None)
        shown = "->".join(names)
        row[f"M({shown})"] = _score(found, report)
        row[f"size_bytes({shown})"] = None if found is None else found["size_bytes"]
    if "pair" in point:
        row |= _pair_columns(point["pair"], report)
    row["marks"] = "; ".join(point_marks(point))
    return row


def curve_rows(report: SweepReport) -> list[Row]:
    """Quantization alone, one row per rate; the dense model comes first."""
    names: dict[str, None] = {}  # of all points, since a point may lack some
    for curve in report["curves"]:
        for point in curve["points"]:
            names.update(dict.fromkeys(point["knobs"]))
    rows = []
    for curve in report["curves"]:
        for point in curve["points"]:
            arguments = {name: point["knobs"].get(name) for name in names}
            numbers = {"C": point["rate"], "M": point["score"]}
            rows.append({"curve": curve["label"], **arguments, **numbers, **point["metrics"]})
    return rows


def point_marks(point: PointReport) -> list[str]:
    """Why orders of a point cannot be compared, and which cannot run."""
    marks = []
    for order in point["orders"]:
        marks += [f"{' -> '.join(order['order'])}: {mark}" for mark in order["marks"]]
    return marks + [f"{' -> '.join(refused['order'])} cannot run" for refused in point["refused"]]


def ratio_of(pair: PairReport) -> Ratio:
    """C*_P, or the end of the curve that it lies beyond."""
    return Ratio(pair["equivalent_ratio"], pair["beyond"], pair["limit"])


def point_name(point: PointReport) -> str:
    """``"prune[sparsity=0.5], quantize[bits=4]"``."""
    return ", ".join(point["steps"].values())


def refusals(report: SweepReport) -> list[tuple[str, str]]:
    """Every (order, problem) that some point reports, without repetition."""
    found: dict[tuple[str, str], None] = {}
    for point in report["points"]:
        for refused in point["refused"]:
            order = " -> ".join(refused["order"])
            found.update(dict.fromkeys((order, problem) for problem in refused["problems"]))
    return list(found)


def _pair_columns(pair: PairReport, report: SweepReport) -> Row:
    p, q = report["pruning"], report["quantizing"]
    advantage = pair["advantage"] or {"value": None, "low": None, "high": None}
    return {
        f"A({q}->{p})": advantage["value"],
        "A low": advantage["low"],
        "A high": advantage["high"],
        f"G({q},{p})": pair["gap"],
        f"C_{p}": pair["rate_pruned"],
        f"C_{q}": pair["rate_quantized"],
        f"C*_{p}": pair["equivalent_ratio"],
        f"C*_{p} beyond the curve": pair["beyond"],
        "end of the curve": pair["limit"],
        f"C*_{p} - C_{q}": pair["ratio_difference"],
    }


def arguments_of(point: PointReport, report: SweepReport) -> Row:
    """The values that the grid varies, as ``{"prune.sparsity": 0.5}``."""
    row = {}
    for name in report["stages"]:
        row.update({f"{name}.{argument}": value for argument, value in point["knobs"][name].items()})
    return row


def _score(record: Record | None, report: SweepReport) -> float | None:
    """M; None if it is not finite."""
    value = None if record is None else record["metrics"].get(report["metric"])
    if value is None or report["higher_is_better"]:
        return value
    return -value


def _orders(report: SweepReport) -> list[list[str]]:
    """Every order that was measured at some point."""
    found: set[tuple[str, ...]] = set()
    for point in report["points"]:
        found.update(tuple(order["order"]) for order in point["orders"])
    return [list(order) for order in sorted(found)]


def advantage_of(point: PointReport) -> float | None:
    """A of a point; None if it was not measured or is not finite."""
    advantage = point["pair"]["advantage"] if "pair" in point else None
    return None if advantage is None else advantage["value"]
