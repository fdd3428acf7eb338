"""Plots as inline SVG: from numbers to markup.

Horizontal places are percentages and vertical ones pixels, so that a drawing is as wide as the page allows while its
text keeps its size. Labels are text of the page, which wraps. Classes stand for colours, which the page's style chooses
in light and in dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from pqqp_lightning.report.svg_scale import Scale, is_number

WALK_HEIGHT = 240
MOST_NAMED = 6
"""With more columns than this, a column has a number instead of its name."""

Point = tuple[str, float]


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


def draw_dots(dots: Sequence[Dot]) -> Markup:
    """One row a dot on a common axis, which is written below."""
    scale = Scale([v for dot in dots for v in (dot.value, dot.low, dot.high)])
    ticks = [] if scale.empty else scale.ticks()
    grid = Markup("").join(_line("grid", at, at) for at, _ in ticks)
    rows = [_row(dot.label, dot.text, grid + _dot(dot, scale), dot.best, dot.remark, dot.detail) for dot in dots]
    words = [
        Markup('<text class="tick" x="{}" y="14" text-anchor="middle">{}</text>').format(_percent(at), text)
        for at, text in ticks
    ]
    axis = Markup('<li class="axis" aria-hidden="true"><svg class="strip" height="20">{}</svg></li>')
    return _rows([*rows, axis.format(Markup("").join(words))])


def draw_bars(bars: Sequence[Bar]) -> Markup:
    """One row a bar, all from zero."""
    most = max((bar.amount for bar in bars), default=0) or 1
    drawn = '<rect class="{}" x="0" y="50%" height="16" rx="2" width="{}" transform="translate(0 -8)"/>'
    return _rows(
        _row(
            bar.label, bar.text, Markup(drawn).format("bar other" if bar.other else "bar", _percent(bar.amount / most))
        )
        for bar in bars
    )


def draw_walk(lines: Sequence[Line], columns: Sequence[str], label: str) -> Markup:
    """Lines from column to column; the best ones on top, with their values.

    Args:
        lines: to draw.
        columns: their names.
        label: what the whole says, for those who cannot see it.
    """
    scale = Scale([v for line in lines for v in line.values])
    ticks = [] if scale.empty else scale.ticks()
    grid = [
        Markup(
            '<line class="grid" x1="0" x2="100%" y1="{0}" y2="{0}"/><text class="tick" x="-8" y="{1}">{2}</text>'
        ).format(_height(at), _height(at) + 4, text)
        for at, text in ticks
    ]
    drawn = [_walked(line, scale, len(columns)) for line in sorted(lines, key=lambda line: line.best)]
    names = [
        Markup('<span title="{}">{}</span>').format(name, name if len(columns) <= MOST_NAMED else i)
        for i, name in enumerate(columns)
    ]
    return Markup(
        '<div class="walk"><svg class="lines" height="{}" role="img" aria-label="{}">{}{}</svg>'
        '<div class="columns" style="grid-template-columns: repeat({}, minmax(0, 1fr))">{}</div></div>'
    ).format(WALK_HEIGHT, label, _join(grid), _join(drawn), len(columns), _join(names))


def _walked(line: Line, scale: Scale, columns: int) -> Markup:
    """A line's segments and points; a gap where a value is missing."""
    at: list[Point | None] = [
        (_percent((i + 0.5) / columns), _height(scale.place(v))) if is_number(v) else None
        for i, v in enumerate(line.values)
    ]
    parts = [
        Markup('<line x1="{}" y1="{}" x2="{}" y2="{}"/>').format(*a, *b)
        for a, b in pairwise(at)
        if a is not None and b is not None
    ]
    parts += [Markup('<circle cx="{}" cy="{}" r="{}"/>').format(*a, 4 if line.best else 3) for a in at if a is not None]
    if line.best:
        parts += [
            _value(a, a[1] + _beside(at, i), text, at_the_edge=i == columns - 1 >= MOST_NAMED + 2)
            for i, (a, text) in enumerate(zip(at, line.texts, strict=True))
            if a is not None and (columns <= MOST_NAMED or i in (0, columns - 1))
        ]
    words = f"{line.label}: {', '.join(line.texts)}"
    return Markup('<g class="{}"><title>{}</title>{}</g>').format(
        "line best" if line.best else "line", words, _join(parts)
    )


def _value(point: Point, y: float, text: str, at_the_edge: bool) -> Markup:
    """A point's value; at the right edge it ends there instead of leaving the page."""
    x, anchor = ("100%", "end") if at_the_edge else (point[0], "middle")
    return Markup('<text class="value" x="{}" y="{}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _beside(at: Sequence[Point | None], i: int) -> int:
    """Where a point's value is written: below it in a valley, else above."""
    here, neighbours = at[i], [p for p in (*at[max(0, i - 1) : i], *at[i + 1 : i + 2]) if p is not None]
    valley = here is not None and neighbours and all(p[1] < here[1] for p in neighbours)
    return 20 if valley else -10


def _dot(dot: Dot, scale: Scale) -> Markup:
    parts = []
    if is_number(dot.low) and is_number(dot.high):
        parts.append(_line("interval", scale.place(dot.low), scale.place(dot.high), "50%", "50%"))
    if is_number(dot.value):
        kind = "dot hollow" if dot.remark else "dot"
        parts.append(
            Markup('<circle class="{}" cx="{}" cy="50%" r="5"/>').format(kind, _percent(scale.place(dot.value)))
        )
    return _join(parts)


def _row(label: str, text: str, drawing: Markup, best: bool = False, remark: str = "", detail: str = "") -> Markup:
    return Markup(
        '<li class="{}"><span class="label">{}{}</span><span class="amount">{}{}</span>'
        '<svg class="strip" height="28" aria-hidden="true">{}</svg></li>'
    ).format("best" if best else "", label, _small(remark), text, _small(detail), drawing)


def _small(text: str) -> Markup:
    return Markup(" <small>{}</small>").format(text) if text else Markup("")


def _rows(rows: object) -> Markup:
    return Markup('<ul class="rows">{}</ul>').format(_join(rows))


def _line(kind: str, x1: float, x2: float, y1: str = "0", y2: str = "100%") -> Markup:
    return Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(kind, _percent(x1), _percent(x2), y1, y2)


def _height(at: float) -> float:
    return round(WALK_HEIGHT * (1 - at), 1)


def _percent(at: float) -> str:
    return f"{100 * at:.2f}%"


def _join(parts: object) -> Markup:
    return Markup("").join(parts)  # type: ignore[arg-type]
