"""What figures show, as plain data: :mod:`pqqp_lightning.report.figures` draws it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from pqqp_lightning.storage.reports import AnalysisReport, SweepReport

LARGEST = 1e300
"""Larger values cannot be placed on an axis."""
MOST_NAMED = 6
"""With more columns than this, a line plot numbers its columns."""
MANY_TIMES = 20
"""An axis is logarithmic if the largest value is at least so many times the smallest."""


@dataclass(frozen=True)
class Dot:
    """A value with its interval, in a row of its own.

    Attributes:
        label: the row's name.
        text: the value in words.
        detail: its interval in words.
        value: where the dot is, if anywhere.
        low: where its interval begins.
        high: where its interval ends.
        best: whether it stands out.
        remark: what sets it apart from the others: its dot is hollow.
    """

    label: str
    text: str
    detail: str
    value: float | None
    low: float | None = None
    high: float | None = None
    best: bool = False
    remark: str = ""


@dataclass(frozen=True)
class DotPlot:
    """One row a dot on a common axis."""

    dots: Sequence[Dot]


@dataclass(frozen=True)
class Line:
    """Values from column to column.

    Attributes:
        label: its name.
        values: one a column.
        texts: the same in words.
        best: whether it stands out.
    """

    label: str
    values: Sequence[float | None]
    texts: Sequence[str]
    best: bool = False


@dataclass(frozen=True)
class LinePlot:
    """Lines from column to column; the best ones on top, with their values."""

    lines: Sequence[Line]
    columns: Sequence[str]


@dataclass(frozen=True)
class Bar:
    """An amount in a row of its own.

    Attributes:
        label: the row's name.
        text: the amount in words.
        amount: its length.
        other: whether it is of another kind than the rest.
    """

    label: str
    text: str
    amount: float
    other: bool = False


@dataclass(frozen=True)
class BarPlot:
    """One row a bar, all from zero."""

    bars: Sequence[Bar]


@dataclass(frozen=True)
class CurvePlot:
    """Quantization alone over C, and each pruning's C* on it."""

    report: SweepReport


@dataclass(frozen=True)
class AdvantagePlot:
    """What an order gains over how much weaker one stage is than the other."""

    report: SweepReport


@dataclass(frozen=True)
class LayerPlot:
    """Errors and interference, layer by layer."""

    report: AnalysisReport


Plot = DotPlot | LinePlot | BarPlot | CurvePlot | AdvantagePlot | LayerPlot


def is_number(value: float | None) -> TypeGuard[float]:
    """Whether there is a value to draw: a perplexity that overflows float64 cannot be placed."""
    return value is not None and abs(value) < LARGEST


def is_logarithmic(values: Iterable[float | None]) -> bool:
    """Whether an axis over these values is logarithmic."""
    known = [value for value in values if is_number(value)]
    return bool(known) and min(known) > 0 and max(known) / min(known) >= MANY_TIMES
