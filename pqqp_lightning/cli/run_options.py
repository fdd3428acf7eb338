"""The options of a command that takes a run folder, read from the signature of the function that it calls.

The function's first parameter is ``run``, the first word without an option. A parameter without a default that takes
several values gets the other words without an option. The rest are options.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import docstring_parser

from pqqp_lightning.cli.settings import COMMAND_LINE, word_pairs
from pqqp_lightning.errors import Problem, RecipeError, near_miss
from pqqp_lightning.export.options import BOOLEANS

NUMBERS = {int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class RunOptions:
    """The command line of one command.

    Attributes:
        command: its name.
        function: what it calls.
        usage: the command line in short.
        example: a whole command line.
        when_missing: what to do if an option that has no default is not given, by its name; by default the usage.
    """

    command: str
    function: Callable[..., Any]
    usage: str
    example: str
    when_missing: Mapping[str, str] = field(default_factory=dict)

    def call(self, arguments: Sequence[str]) -> Any:
        """Call the function as the command line says.

        Raises:
            RecipeError: with every problem of the command line, or the function's, with its source.
        """
        options = self._read(arguments)
        try:
            return self.function(**options)
        except RecipeError as error:
            raise RecipeError(with_command_line(error.problems)) from error

    def help(self, *more: str) -> str:
        """The function's summary, the lines of ``more``, and every option from the docstring."""
        documented = docstring_parser.parse(inspect.getdoc(self.function) or "")
        meaning = {entry.arg_name: " ".join((entry.description or "").split()) for entry in documented.params}
        parameters = {name: p for name, p in self._parameters().items() if name != self._rest}
        width = max(map(len, parameters)) + 1
        lines = [f"usage: {self.usage}", "", documented.short_description or "", *more, "", "options:"]
        for name, parameter in parameters.items():
            default = "" if parameter.default in (parameter.empty, None) else f" [{str(parameter.default).lower()}]"
            lines.append(f"  --{name:<{width}} {meaning[name]}{default}")
        return "\n".join([*lines, "", f"example: {self.example}", ""])

    @property
    def _rest(self) -> str | None:
        """The parameter that gets the further words without an option."""
        hints = typing.get_type_hints(self.function)
        several = [name for name in self._parameters() if typing.get_origin(hints[name]) is Sequence]
        return several[0] if several else None

    def _parameters(self) -> dict[str, inspect.Parameter]:
        return {name: p for name, p in inspect.signature(self.function).parameters.items() if name != "run"}

    def _read(self, arguments: Sequence[str]) -> dict[str, Any]:
        options: dict[str, Any] = {}
        problems = []
        for name, value in self._pairs(arguments):
            if name == "" and "run" not in options:
                options["run"] = value
            elif name == "" and self._rest is not None:
                options.setdefault(self._rest, []).append(value)
            elif problem := self._wrong_word(name, value):
                problems.append(problem)
            else:
                options[name] = self._converted(name, value)
        if "run" not in options:
            problems.append(command_problem(f"{self.command} needs a run folder", f"Run {self.usage}."))
        for name, parameter in self._parameters().items():
            if parameter.default is parameter.empty and name not in options:
                what = name if name == self._rest else f"--{name}"
                way_out = self.when_missing.get(name, f"Run {self.usage}.")
                problems.append(command_problem(f"{self.command} needs {what}", way_out))
        if problems:
            raise RecipeError(problems)
        return options

    def _pairs(self, arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
        """The options with their values; ``--packed RUN`` is a switch and a word, as long as there is no run."""
        has_run = False
        for name, value in word_pairs(arguments):
            if name in self._parameters() and self._is_flag(name) and not has_run and value not in (None, *BOOLEANS):
                yield name, None
                name = ""
            yield name, value
            has_run = has_run or name == ""

    def _wrong_word(self, name: str, value: str | None) -> Problem | None:
        """The problem of an option and its value, or of a word without an option."""
        if name == "":
            return command_problem(f"Unexpected argument '{value}'", "Options start with --.")
        parameters = {known: p for known, p in self._parameters().items() if known != self._rest}
        if name not in parameters:
            known = [f"--{known}" for known in parameters]
            near = near_miss(f"--{name}", known).strip()
            return command_problem(f"Unknown option '--{name}'", near or f"Known: {', '.join(known)}.")
        kind = self._kind(name)
        if value is None and not self._is_flag(name):
            return Problem(name, text="has no value", way_out=f"Write --{name} VALUE.", source=COMMAND_LINE)
        if kind is bool and value is not None and value not in BOOLEANS:
            text = "is neither true nor false"
            return Problem(name, value, text, f"Write --{name} true.", source=COMMAND_LINE)
        if kind in NUMBERS:
            try:
                kind(value)
            except ValueError:
                default = parameters[name].default
                return Problem(
                    name, value, f"is not {NUMBERS[kind]}", f"Write --{name} {default}.", source=COMMAND_LINE
                )
        return None

    def _converted(self, name: str, value: str | None) -> Any:
        kind = self._kind(name)
        if kind is bool:
            return True if value is None else BOOLEANS[value]
        return kind(value) if kind in NUMBERS else value

    def _kind(self, name: str) -> Any:
        return typing.get_type_hints(self.function)[name]

    def _is_flag(self, name: str) -> bool:
        """Whether ``--name`` alone is enough: it switches on what is off by default."""
        return self._kind(name) is bool and self._parameters()[name].default is False


def command_problem(sentence: str, way_out: str) -> Problem:
    """The problem of a command line as a whole."""
    return Problem(text=sentence, way_out=way_out, source=COMMAND_LINE, complete=True)


def with_command_line(problems: Sequence[Problem]) -> list[Problem]:
    """The problems of a function's arguments, with the command line as where they were given."""
    return [replace(p, source=COMMAND_LINE) if p.key and not p.source else p for p in problems]
