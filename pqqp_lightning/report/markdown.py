"""Writes a page as Markdown, to paste into other documents. The tables hold the numbers of the plots."""

from __future__ import annotations

import re

from pqqp_lightning.report.blocks import Block, Code, Notes, Page, Table, Words

SPECIAL = re.compile(r"([\\`*\[\]|~#]|(?<!\w)_|_(?!\w))")


def to_markdown(page: Page) -> str:
    """The whole page."""
    parts = [f"# {escape(page.title)}", escape(page.about), f"**{escape(page.verdict)}**"]
    if page.warning:
        parts.append(escape(page.warning))
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
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Words):
        return "\n\n".join(escape(sentence) for sentence in block.sentences)
    if isinstance(block, Notes):
        return "\n".join(f"- {escape(where)}: {escape(note)}" for where, note in block.items)
    if isinstance(block, Code):
        # The fence must be longer than any run of backticks in the text.
        longest = max((len(run) for run in re.findall("`+", block.text)), default=0)
        fence = "`" * max(3, 1 + longest)
        return _captioned(block, f"{fence}{block.language}\n{block.text}\n{fence}")
    return ""  # a figure


def _table(table: Table) -> str:
    head = table.head or [""] * len(table.rows[0])
    rule = ["---" if i in table.words else "---:" for i in range(len(head))]
    rows: list[list[str]] = [[escape(cell) for cell in head], rule]
    for place, row in enumerate(table.rows):
        cells = [escape(cell) for cell in row]
        if place == table.best:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        rows.append(cells)
    return _captioned(table, "\n".join(f"| {' | '.join(row)} |" for row in rows))


def _captioned(block: Table | Code, text: str) -> str:
    caption = escape(block.caption)
    if block.folded:
        return f"<details><summary>{caption}</summary>\n\n{text}\n\n</details>"
    return f"{caption}:\n\n{text}"
