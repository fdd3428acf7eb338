"""``pqqp-lightning methods``: every installed stage with its arguments and its source."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import docstring_parser
from rich.table import Table

from pqqp_lightning.report.terminal import wide_console
from pqqp_lightning.stages.arguments import arguments_of, documentation
from pqqp_lightning.stages.stage import Stage


def print_methods(stages: Mapping[str, type[Stage]]) -> None:
    """Print a table for each stage: its summary and source, then argument, default and meaning."""
    console = wide_console()
    for name, cls in stages.items():
        documented = documentation(cls)
        summary = (docstring_parser.parse(inspect.getdoc(cls) or "").short_description or "").replace("\n", " ")
        console.print(f"\n[bold]{name}[/bold]  {cls.__module__}", highlight=False)
        console.print(summary, highlight=False, markup=False)
        if cls.source:
            console.print(f"Source: {cls.source}", highlight=False, markup=False)
        table = Table(show_edge=False, pad_edge=False)
        for column in ("argument", "default", "meaning"):
            table.add_column(column)
        for argument, parameter in arguments_of(cls).items():
            default = "" if parameter.default is parameter.empty else repr(parameter.default)
            table.add_row(argument, default, documented.get(argument, ""))
        console.print(table)


def summarize(stages: Mapping[str, type[Stage]]) -> str:
    """A text for ``--help``: each method with its own arguments, and the arguments that all share."""
    shared = arguments_of(Stage)
    methods = []
    for name, cls in stages.items():
        own = [argument for argument in arguments_of(cls) if argument not in shared]
        methods.append(f"{name} ({', '.join(own)})" if own else name)
    words = f"Methods and their arguments: {'; '.join(methods)}. Shared arguments: {', '.join(shared)}."
    return f"{words} More: pqqp-lightning methods."
