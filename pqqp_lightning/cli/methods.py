"""``pqqp-lightning methods``: every installed stage with its knobs and its source."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import docstring_parser
from rich.console import Console
from rich.table import Table

from pqqp_lightning.report.terminal import wide_console
from pqqp_lightning.stages.knobs import documentation, knobs
from pqqp_lightning.stages.stage import Stage


def print_methods(stages: Mapping[str, type[Stage]], console: Console | None = None) -> None:
    """Print a table for each stage: its summary and source, then knob, default and meaning."""
    console = console or wide_console()
    for name, cls in stages.items():
        documented = documentation(cls)
        summary = (docstring_parser.parse(inspect.getdoc(cls) or "").short_description or "").replace("\n", " ")
        console.print(f"\n[bold]{name}[/bold]  {cls.__module__}", highlight=False)
        console.print(summary, highlight=False, markup=False)
        if cls.source:
            console.print(f"Source: {cls.source}", highlight=False, markup=False)
        table = Table(show_edge=False, pad_edge=False)
        for column in ("knob", "default", "meaning"):
            table.add_column(column)
        for knob, parameter in knobs(cls).items():
            default = "" if parameter.default is parameter.empty else repr(parameter.default)
            table.add_row(knob, default, documented.get(knob, ""))
        console.print(table)


def summarize(stages: Mapping[str, type[Stage]]) -> str:
    """The methods with their own knobs, and the knobs that they share, in two sentences."""
    shared = knobs(Stage)
    own = {name: [knob for knob in knobs(cls) if knob not in shared] for name, cls in stages.items()}
    methods = "; ".join(f"{name} ({', '.join(names)})" if names else name for name, names in own.items())
    return f"Methods and their knobs: {methods}. Shared knobs: {', '.join(shared)}. More: pqqp-lightning methods."
