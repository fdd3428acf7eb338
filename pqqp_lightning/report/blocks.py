"""The content of a report, independent of its form.

A report is built once from the records. The terminal, HTML and Markdown renderers draw it; the terminal shows only
blocks with ``in_summary``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from pqqp_lightning.report.plots import Plot

ARROW = " → "


@dataclass(frozen=True)
class Table:
    """Rows of words and numbers.

    Attributes:
        head: names of the columns; may be empty.
        rows: one text per column.
        best: index of the row to highlight.
        words: indices of the columns that hold words instead of numbers.
        folded: hidden until the reader opens it.
        in_summary: shown in the terminal.
        details: indices of the columns that the terminal leaves out.
        titled: the terminal prints the caption, too.
        unbroken: indices of the columns that the terminal does not wrap.
    """

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: int | None = None
    words: Sequence[int] = (0,)
    folded: bool = False
    in_summary: bool = False
    details: Sequence[int] = ()
    titled: bool = False
    unbroken: Sequence[int] = ()


@dataclass(frozen=True)
class Figure:
    """A plot.

    Attributes:
        caption: what it shows, and how to read it.
        plot: its content.
    """

    kind: ClassVar[str] = "figure"
    caption: str
    plot: Plot


@dataclass(frozen=True)
class Words:
    """Sentences, each on its own line.

    Attributes:
        in_summary: shown in the terminal.
    """

    kind: ClassVar[str] = "words"
    sentences: Sequence[str]
    in_summary: bool = False


@dataclass(frozen=True)
class Notes:
    """A list of unusual events.

    Attributes:
        items: (where, what).
        in_summary: shown in the terminal.
    """

    kind: ClassVar[str] = "notes"
    items: Sequence[tuple[str, str]]
    in_summary: bool = False


@dataclass(frozen=True)
class Code:
    """Text to copy verbatim.

    Attributes:
        language: for syntax highlighting.
        folded: hidden until the reader opens it.
    """

    kind: ClassVar[str] = "code"
    caption: str
    text: str
    language: str = ""
    folded: bool = False


Block = Table | Figure | Words | Notes | Code


@dataclass(frozen=True)
class Section:
    """A headline and its blocks."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: the run's name.
        about: model and data, in one line.
        verdict: the result, in one sentence.
        remarks: conditions of the verdict.
        warning: why the run is incomplete, and how to resume it; empty if it is complete.
    """

    title: str
    about: str
    verdict: str
    remarks: Sequence[str] = ()
    warning: str = ""
    sections: Sequence[Section] = field(default_factory=list)
