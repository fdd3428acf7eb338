"""What a user can put right. A problem is data until it is shown; the command line words it once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any


class _NotGiven:
    def __repr__(self) -> str:
        return "NOT_GIVEN"

    def __reduce__(self) -> str:
        return "NOT_GIVEN"  # a copy or a pickle is the same object: it is compared by identity


NOT_GIVEN: Any = _NotGiven()
"""The value of a problem that is not about the value of a setting."""


@dataclass(frozen=True)
class Problem:
    """One thing that the user must put right.

    Attributes:
        key: dotted path of the setting, as in ``stages.quantize.group_size``. A stage gives the path from itself
            (``group_size``); the engine puts the stage in front (:meth:`within`). Empty where no setting is to blame.
        value: what the setting holds, as the message shall show it; NOT_GIVEN where the value is not the point.
        text: what is wrong and how far it reaches. It continues the sentence that the setting begins:
            "does not divide in_features=576 of 12 layers (...)". No full stop at its end.
        complete: whether ``text`` is a whole sentence, as in "Unknown argument 'bitz'", before which the argument and
            its value are not repeated.
        way_out: what to do instead, whole sentences.
        section: the part of ``key`` that names a section or a stage; shown apart from the argument.
        owner: the class that the section names (``GPTQ``).
        source: the file, "command line" or environment variable that set it; the command line adds it.
    """

    key: str = ""
    value: Any = field(default=NOT_GIVEN, hash=False)  # lists have no hash
    text: str = ""
    way_out: str = ""
    section: str = ""
    owner: str = ""
    source: str = ""
    complete: bool = False

    def within(self, section: str, owner: str = "") -> Problem:
        """The same problem, its key taken from inside ``section``, whose class is ``owner``."""
        return replace(self, key=f"{section}.{self.key}".rstrip("."), section=section, owner=owner)

    @property
    def argument(self) -> str:
        """The key as seen from its section; empty where the problem is the whole section's."""
        return self.key.removeprefix(self.section).lstrip(".")

    def __str__(self) -> str:
        """``recipe.yaml: stages.quantize (GPTQ): group_size=100 does not divide ... Use 32, 64, 96 or 192.``"""
        argument = self.argument
        place = f"{self.section} ({self.owner})" if self.owner else self.section
        given = "" if self.value is NOT_GIVEN else f"={self.value!r}" if argument else f"{self.value!r}"
        sentence = self.text if self.complete else f"{argument}{given} {self.text}".strip()
        plain = not (argument or place or self.way_out)  # whoever gave text alone has worded it
        ending = "" if plain or sentence.endswith((".", "?", "!")) else "."
        parts = [part for part in (self.source, place, f"{sentence}{ending} {self.way_out}".strip()) if part]
        return ": ".join(parts)


class RecipeError(Exception):
    """One or more problems in what the user asked for.

    The command line prints each problem on a line of its own and exits with code 2, without a traceback. Code that
    can find several problems collects them and raises once.

    Args:
        problems: one problem, or all of them; those that read the same are kept once. Plain text is a problem of no
            setting.
    """

    def __init__(self, problems: str | Problem | Iterable[str | Problem]) -> None:
        several = [problems] if isinstance(problems, str | Problem) else problems
        worded = [Problem(text=problem) if isinstance(problem, str) else problem for problem in several]
        self.problems: list[Problem] = list({str(problem): problem for problem in worded}.values())
        super().__init__("\n".join(str(problem) for problem in self.problems))


def suggest(name: str, known: Iterable[str]) -> str:
    """``" Did you mean 'GPTQ'?"`` for a near miss, else the list of what is known; with a leading space."""
    known = sorted(set(known))
    return near_miss(name, known) or (f" Known: {', '.join(known)}." if known else "")


def near_miss(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``" Did you mean 'GPTQ'?"`` for a near miss, else nothing; ``cutoff`` is difflib's."""
    lowered = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=cutoff)
    return f" Did you mean '{lowered[near[0]]}'?" if near else ""


def shorten(names: Iterable[str], most: int = 3, what: str = "layer") -> str:
    """``"12 layers (a, b, c, ...)"``: how far a problem reaches, without a page of names; ``what`` is one of them."""
    names = list(names)
    listed = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} {what}{'s' if len(names) != 1 else ''} ({listed})"
