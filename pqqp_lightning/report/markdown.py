"""Writes a page as Markdown, to paste into other documents. The tables hold the numbers of the plots."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from pqqp_lightning.report.blocks import Block, Code, Figure, Notes, Page, Table, Words

SPECIAL = re.compile(r"([\\`*\[\]|~#]|(?<!\w)_|_(?!\w))")


def to_markdown(page: Page) -> str:
    """The whole page."""
    parts = [f"# {escape(page.title)}", escape(page.about), f"**{escape(page.verdict)}**"]
    if page.warning:
        way_on = f" Resume with `{page.way_on}`." if page.way_on else ""
        parts.append(f"{escape(page.warning)}{way_on}")
    parts += [escape(words) for words in page.remarks]
    for section in page.sections:
        if texts := [text for block in section.blocks if (text := _block(block))]:
            parts += [f"## {escape(section.title)}", *texts]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """Put ``text`` on one line and escape what Markdown or HTML would interpret."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return SPECIAL.sub(r"\\\1", plain)


def _block(block: Block) -> str:
    write: dict[type, Callable[[Any], str]] = {Table: _table, Words: _words, Notes: _notes, Code: _code}
    return "" if isinstance(block, Figure) else write[type(block)](block)


def _table(table: Table) -> str:
    head = table.head or [""] * len(table.rows[0])
    rule = ["---" if i in table.words else "---:" for i in range(len(head))]
    rows = [[escape(cell) for cell in row] for row in (head, *table.rows)]
    if table.best is not None:
        rows[table.best + 1] = [f"**{cell}**" if cell else "" for cell in rows[table.best + 1]]
    lines = [_row(rows[0]), _row(rule), *(_row(row) for row in rows[1:])]
    return _captioned(table, "\n".join(lines))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _words(words: Words) -> str:
    return "\n\n".join(escape(sentence) for sentence in words.sentences)


def _notes(notes: Notes) -> str:
    return "\n".join(f"- {escape(where)}: {escape(note)}" for where, note in notes.items)


def _code(code: Code) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", code.text)), default=0))
    return _captioned(code, f"{fence}{code.language}\n{code.text}\n{fence}")


def _captioned(block: Table | Code, text: str) -> str:
    caption = escape(block.caption)
    if block.folded:
        return f"<details><summary>{caption}</summary>\n\n{text}\n\n</details>"
    return f"{caption}:\n\n{text}"
