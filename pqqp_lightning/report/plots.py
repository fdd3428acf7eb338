"""The content of figures as plain data, which :mod:`pqqp_lightning.report.figures` draws."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from pqqp_lightning.storage.reports import AnalysisReport, SearchReport, SweepReport

LARGEST = 1e300
"""Larger values do not fit on an axis."""
MOST_NAMED = 6
"""With more columns than this, a line plot numbers its columns."""
MANY_TIMES = 20
"""An axis is logarithmic if the largest value is at least this many times the smallest."""


@dataclass(frozen=True)
class Dot:
    """A value with its interval; a row of a :class:`DotPlot`.

    Attributes:
        label: the row's name.
        value: the dot's place; None draws no dot.
        low: lower end of the interval.
        high: upper end of the interval.
        best: highlight it.
        remark: why it cannot be compared with the others; its dot is hollow.
        text: printed instead of the value.
    """

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    best: bool = False
    remark: str = ""
    text: str = ""


@dataclass(frozen=True)
class DotPlot:
    """One row per dot, on a common axis."""

    dots: Sequence[Dot]


@dataclass(frozen=True)
class Line:
    """A line of a :class:`LinePlot`.

    Attributes:
        label: its name.
        values: one a column.
        best: highlight it.
    """

    label: str
    values: Sequence[float | None]
    best: bool = False


@dataclass(frozen=True)
class LinePlot:
    """Lines from column to column; the best line is on top and shows its values."""

    lines: Sequence[Line]
    columns: Sequence[str]


@dataclass(frozen=True)
class Bar:
    """An amount; a row of a :class:`BarPlot`.

    Attributes:
        label: the row's name.
        text: the amount as text.
        amount: its length.
        other: draw it in another colour, as another kind of amount.
    """

    label: str
    text: str
    amount: float
    other: bool = False


@dataclass(frozen=True)
class BarPlot:
    """One row per bar, all from zero."""

    bars: Sequence[Bar]


@dataclass(frozen=True)
class CurvePlot:
    """Quantization alone over C, and each pruning's C* on it."""

    report: SweepReport


@dataclass(frozen=True)
class AdvantagePlot:
    """The gain of an order against how much weaker one stage is than the other."""

    report: SweepReport


@dataclass(frozen=True)
class LayerPlot:
    """Errors and interference, layer by layer."""

    report: AnalysisReport


@dataclass(frozen=True)
class FrontPlot:
    """A search's pipelines over their size, with the front."""

    report: SearchReport


Plot = DotPlot | LinePlot | BarPlot | CurvePlot | AdvantagePlot | LayerPlot | FrontPlot


def is_number(value: float | None) -> TypeGuard[float]:
    """Whether a value can be drawn: a perplexity that overflows float64 cannot."""
    return value is not None and abs(value) < LARGEST


def is_logarithmic(values: Iterable[float | None]) -> bool:
    """Whether an axis over these values is logarithmic."""
    known = [value for value in values if is_number(value)]
    return bool(known) and min(known) > 0 and max(known) / min(known) >= MANY_TIMES
