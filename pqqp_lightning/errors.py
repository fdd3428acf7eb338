"""What a user can put right: every problem found, each with where, what, the value and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RecipeError(Exception):
    """One or more problems in what the user asked for.

    The command line prints each problem on a line of its own and exits with code 2, without a traceback. Code that
    can find several problems collects them and raises once.

    Args:
        problems: one message, or all of them.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def suggest(name: str, known: Iterable[str]) -> str:
    """``" Did you mean 'GPTQ'?"`` for a near miss, else the list of what is known; with a leading space."""
    known = sorted(set(known))
    return near_miss(name, known) or (f" Known: {', '.join(known)}." if known else "")


def near_miss(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``" Did you mean 'GPTQ'?"`` for a near miss, else nothing; ``cutoff`` is difflib's."""
    lowered = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=cutoff)
    return f" Did you mean '{lowered[near[0]]}'?" if near else ""


def shorten(names: Iterable[str], most: int = 3) -> str:
    """``"12 layers (a, b, c, ...)"``: how far a problem reaches, without a page of names."""
    names = list(names)
    listed = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} layer{'s' if len(names) != 1 else ''} ({listed})"
