"""What a report consists of, without saying how it looks.

A report is built once from the records; the terminal, HTML and Markdown each draw it. The terminal shows the blocks
with ``in_summary``.
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
        caption: what it shows.
        head: the columns' names, if they need any.
        rows: one text a column.
        best: the row that stands out, if any.
        words: the places of the columns that hold words instead of numbers.
        folded: whether one opens it to see it.
        in_summary: whether the terminal shows it.
        details: the places of the columns that the terminal leaves out.
        titled: whether the terminal shows the caption above it.
        unbroken: the places of the columns that the terminal keeps on one line.
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
        plot: the numbers, see :mod:`pqqp_lightning.report.plots`.
    """

    kind: ClassVar[str] = "figure"
    caption: str
    plot: Plot


@dataclass(frozen=True)
class Words:
    """Sentences, each on its own line.

    Attributes:
        sentences: plain text.
        in_summary: whether the terminal shows them.
    """

    kind: ClassVar[str] = "words"
    sentences: Sequence[str]
    in_summary: bool = False


@dataclass(frozen=True)
class Notes:
    """A list of what was unusual.

    Attributes:
        items: where, and what.
        in_summary: whether the terminal shows it.
    """

    kind: ClassVar[str] = "notes"
    items: Sequence[tuple[str, str]]
    in_summary: bool = False


@dataclass(frozen=True)
class Code:
    """Text to copy as it is.

    Attributes:
        caption: what it is.
        text: the lines.
        language: for those who colour it.
        folded: whether one opens it to see it.
    """

    kind: ClassVar[str] = "code"
    caption: str
    text: str
    language: str = ""
    folded: bool = False


Block = Table | Figure | Words | Notes | Code


@dataclass(frozen=True)
class Section:
    """A headline and what stands below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: the run's name.
        about: what was run, in a line.
        verdict: what came out, in a sentence.
        remarks: what one must know to read the verdict.
        warning: why this is not the end, if it is not.
        way_on: what to add to the command line then, if anything.
        sections: the rest.
    """

    title: str
    about: str
    verdict: str
    remarks: Sequence[str] = ()
    warning: str = ""
    way_on: str = "--ckpt_path last"
    sections: Sequence[Section] = field(default_factory=list)
