"""What a page consists of, without saying how it looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from markupsafe import Markup

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
    """

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: int | None = None
    words: Sequence[int] = (0,)
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    """A plot.

    Attributes:
        caption: what it shows, and how to read it.
        drawing: from :mod:`pqqp_lightning.report.svg_plots`.
    """

    kind: ClassVar[str] = "figure"
    caption: str
    drawing: Markup


@dataclass(frozen=True)
class Words:
    """Sentences, each on its own."""

    kind: ClassVar[str] = "words"
    sentences: Sequence[str]


@dataclass(frozen=True)
class Notes:
    """A list of what was unusual: each with where."""

    kind: ClassVar[str] = "notes"
    items: Sequence[tuple[str, str]]


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
        way_on: what to add to the command line then.
        sections: the rest.
    """

    title: str
    about: str
    verdict: str
    remarks: Sequence[str] = ()
    warning: str = ""
    way_on: str = "--ckpt_path last"
    sections: Sequence[Section] = field(default_factory=list)
