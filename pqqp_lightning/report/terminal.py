"""Prints a report in the terminal: its summary, then the verdict, which stays visible above the prompt."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table as RichTable

from pqqp_lightning.report.blocks import Notes, Page, Table, Words


def wide_console() -> Console:
    """The terminal, or 120 columns if the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 120)


def print_page(page: Page, console: Console | None = None) -> None:
    """Print the blocks of the summary, the remarks, and the verdict."""
    console = console or wide_console()
    lines: list[str] = []
    for section in page.sections:
        for block in section.blocks:
            if isinstance(block, Table) and block.in_summary:
                console.print(_table(block))
            elif isinstance(block, Notes) and block.in_summary:
                lines += [f"{where}: {note}" for where, note in block.items]
            elif isinstance(block, Words) and block.in_summary:
                lines += block.sentences
    lines += page.remarks
    if page.warning:
        lines.append(page.warning)
    for line in [*lines, page.verdict]:
        # Lines are not wrapped, so that they can be copied and searched.
        console.print(ascii_arrows(line), highlight=False, markup=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """Print one table."""
    wide_console().print(_table(table))


def ascii_arrows(text: str) -> str:
    """Replace arrows by ``->``, because a terminal or a log may lack the character."""
    return text.replace("→", "->")


def _table(table: Table) -> RichTable:
    shown = [i for i in range(len(table.head)) if i not in table.details]
    drawn = RichTable(title=ascii_arrows(table.caption) if table.titled else None, title_justify="left")
    for i in shown:
        words = i in table.words
        drawn.add_column(ascii_arrows(table.head[i]), justify="left" if words else "right", no_wrap=i in table.unbroken)
    for place, row in enumerate(table.rows):
        cells = [ascii_arrows(row[i]) for i in shown]
        drawn.add_row(*cells, style="bold" if place == table.best else None)
    return drawn
