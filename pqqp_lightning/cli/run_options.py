"""The options of a command that takes a run folder, read from the signature of the function that it calls.

The function's first parameter is ``run``, the first word without an option. A parameter without a default that takes
several values gets the other words without an option. The rest are options, and ``**options`` are those of a target.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import docstring_parser

from pqqp_lightning.cli.settings import COMMAND_LINE, word_pairs
from pqqp_lightning.errors import Problem, RecipeError, near_miss
from pqqp_lightning.export.options import BOOLEANS, options_of, owners_of
from pqqp_lightning.export.target import Target
from pqqp_lightning.storage.run_folder import check_run_folder

NUMBERS = {int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class RunOptions:
    """The command line of one command.

    Attributes:
        command: its name.
        function: what it calls.
        show: prints what the function returned.
        check: what the function refuses of its arguments, before any work.
        usage: the command line in short.
        example: a whole command line.
        when_missing: what to do if an option that has no default is not given, by its name; by default the usage.
        targets: what ``--to`` chooses from, by name. Each may have options of its own, which the function gets as text.
        failures: what the function raises if its result is not good: the words are printed, and the exit code is 1.
    """

    command: str
    function: Callable[..., Any]
    show: Callable[[Any], None]
    check: Callable[..., list[Problem]]
    usage: str
    example: str
    when_missing: Mapping[str, Callable[[], str]] = field(default_factory=dict)
    targets: Callable[[], Mapping[str, type[Target]]] = dict
    failures: tuple[type[Exception], ...] = ()

    def run(self, arguments: Sequence[str]) -> None:
        """Call the function as the command line says and show what it returned, or print the help that is asked for.

        Raises:
            RecipeError: with every problem of the command line, or the function's, with its source.
        """
        if any(name in ("h", "help") for name, _ in word_pairs(arguments)):
            print(self.help(), end="")
            return
        options = self._read(arguments)
        try:
            done = self.function(**options)
        except RecipeError as error:
            raise RecipeError(_with_command_line(error.problems)) from error
        except self.failures as error:
            print(error, file=sys.stderr)
            sys.exit(1)
        self.show(done)

    def help(self) -> str:
        """The function's summary, every target with its options, and every option, from their docstrings."""
        documented = docstring_parser.parse(inspect.getdoc(self.function) or "")
        meaning = {entry.arg_name: " ".join((entry.description or "").split()) for entry in documented.params}
        lines = [f"usage: {self.usage}", "", documented.short_description or "", *self._help_of_targets()]
        lines += ["", "options:"]
        parameters = {name: p for name, p in self._parameters().items() if name != self._rest}
        width = max(map(len, parameters)) + 1
        for name, parameter in parameters.items():
            lines.append(f"  --{name:<{width}} {meaning[name]}{_shown_default(parameter.default)}")
        return "\n".join([*lines, "", f"example: {self.example}", ""])

    def _help_of_targets(self) -> list[str]:
        targets = self.targets()
        if not targets:
            return []
        lines = ["", "targets:"]
        for name, target in targets.items():
            lines.append(f"  {name:<20} {target.summary}")
            for option in options_of(target).values():
                lines.append(f"    --{option.name:<16} {option.meaning}{_shown_default(option.default)}")
        return lines

    @property
    def _rest(self) -> str | None:
        """The parameter that gets the further words without an option."""
        hints = typing.get_type_hints(self.function)
        several = [name for name in self._parameters() if typing.get_origin(hints[name]) is Sequence]
        return several[0] if several else None

    def _parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters that have a name on the command line."""
        return {
            name: parameter
            for name, parameter in inspect.signature(self.function).parameters.items()
            if name != "run" and parameter.kind is not parameter.VAR_KEYWORD
        }

    def _read(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The arguments of the function.

        Raises:
            RecipeError: an option is unknown, has no value or the wrong one, or is missing.
        """
        options: dict[str, Any] = {}
        problems = []
        for name, value in self._pairs(arguments):
            if name == "" and "run" not in options:
                options["run"] = value
            elif name == "" and self._rest is not None:
                options.setdefault(self._rest, []).append(value)
            elif problem := self._wrong_word(name, value):
                problems.append(problem)
            elif name in options:
                problems.append(Problem(name, value, "is given twice", "Write it once.", source=COMMAND_LINE))
            else:
                options[name] = self._converted(name, value)
        if "run" not in options:
            problems.append(_command_problem(f"{self.command} needs a run folder", f"Run {self.usage}."))
        problems += self._missing({*options, *(name for name, _ in word_pairs(arguments))})
        if problems:
            raise RecipeError([*problems, *self._further_problems(options)])
        return options

    def _further_problems(self, options: dict[str, Any]) -> list[Problem]:
        """What the function would refuse next, with the defaults in place of wrong options."""
        if "run" not in options:
            return []
        required = {name for name, p in self._parameters().items() if p.default is p.empty}
        if required <= set(options):
            return _with_command_line(self.check(**options))
        return _with_command_line(check_run_folder(Path(options["run"])))

    def _missing(self, given: set[str]) -> list[Problem]:
        """The problem of each option that has no default and is not given."""
        problems = []
        for name, parameter in self._parameters().items():
            if parameter.default is parameter.empty and name not in given:
                what = name if name == self._rest else f"--{name}"
                way_out = self.when_missing[name]() if name in self.when_missing else f"Run {self.usage}."
                problems.append(_command_problem(f"{self.command} needs {what}", way_out))
        return problems

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
            return _command_problem(f"Unexpected argument '{value}'", "Options start with --.")
        parameters = {known: p for known, p in self._parameters().items() if known != self._rest}
        if name not in parameters and not owners_of(name, self.targets()):
            known = [*parameters]
            for target in self.targets().values():
                known += options_of(target)
            near = near_miss(f"--{name}", [f"--{option}" for option in known]).strip()
            way_out = near or f"Known: {', '.join(f'--{option}' for option in known)}."
            return _command_problem(f"Unknown option '--{name}'", way_out)
        if value is None and not self._is_flag(name):
            return Problem(name, text="has no value", way_out=f"Write --{name} VALUE.", source=COMMAND_LINE)
        return self._wrong_value(name, value)

    def _wrong_value(self, name: str, value: str | None) -> Problem | None:
        """The problem if a value is not of the option's type; a target reads those of its own options."""
        kind = self._kind(name)
        if kind is bool and value is not None and value not in BOOLEANS:
            text = "is neither true nor false"
            return Problem(name, value, text, f"Write --{name} true.", source=COMMAND_LINE)
        if kind in NUMBERS:
            try:
                kind(value)
            except ValueError:
                way_out = f"Write --{name} {self._parameters()[name].default}."
                return Problem(name, value, f"is not {NUMBERS[kind]}", way_out, source=COMMAND_LINE)
        return None

    def _converted(self, name: str, value: str | None) -> Any:
        kind = self._kind(name)
        if kind is bool:
            return True if value is None else BOOLEANS[value]
        return kind(value) if kind in NUMBERS else value

    def _kind(self, name: str) -> Any:
        """The type of an option; None for one of a target."""
        return typing.get_type_hints(self.function)[name] if name in self._parameters() else None

    def _is_flag(self, name: str) -> bool:
        """Whether ``--name`` alone is enough: it switches on what is off by default."""
        return self._kind(name) is bool and self._parameters()[name].default is False


def _shown_default(value: Any) -> str:
    """A default in brackets, for the help; nothing if there is none to show."""
    return "" if value in (inspect.Parameter.empty, None) else f" [{str(value).lower()}]"


def _command_problem(sentence: str, way_out: str) -> Problem:
    """The problem of a command line as a whole."""
    return Problem(text=sentence, way_out=way_out, source=COMMAND_LINE, complete=True)


def _with_command_line(problems: Sequence[Problem]) -> list[Problem]:
    """The problems of a function's arguments, with the command line as where they were given."""
    return [replace(p, source=COMMAND_LINE) if p.key and not p.source else p for p in problems]
