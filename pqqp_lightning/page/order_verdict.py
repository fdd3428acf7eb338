"""What a search for the best order found, in sentences that claim no more than its intervals do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pqqp_lightning.page.sections import Report, names_text
from pqqp_lightning.report import number_text

Bounds = tuple[float, float] | tuple[None, None]


@dataclass(frozen=True)
class Advantage:
    """A(first→second): how much better the metric is with ``first`` just before ``second``.

    Attributes:
        first: a stage.
        second: another.
        value: None where a metric was not finite.
        low: where its interval begins, if there is one.
        high: where its interval ends.
    """

    first: str
    second: str
    value: float | None
    low: float | None
    high: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def reading(self) -> str:
        """The number in words."""
        if self.value is None:
            return "unknown: a metric is not finite"
        if self.low is None:
            return "no difference" if self.value == 0 else f"{self.first} first is better"
        return f"{self.first} first is better" if self.is_clear else "no evidence that the order matters"


def order_verdict(report: Report) -> list[str]:
    """The verdict, and what one must know to read it."""
    if not report["orders"] or not report["best"]:
        return ["No order is finished yet."]
    repeats = [report["repeats"]["verdict"].replace("->", "→")] if report.get("repeats") else []
    return [report["verdict"].replace("->", "→"), *repeats, *_hypothesis(report), _measured(report)]


def difference_text(difference: dict[str, float | None] | None) -> str:
    """``"2.10 (0.50 to 3.40)"``, without an interval where there is none, ``-`` where there is no difference."""
    value = (difference or {}).get("value")
    low, high = bounds(((difference or {}).get("low"), (difference or {}).get("high")))
    if low is None or low == high:
        return number_text(value)
    return f"{number_text(value)} ({interval_text(low, high)})"


def interval_text(low: float | None, high: float | None) -> str:
    """``"0.50 to 3.40"``; empty where there is no interval."""
    return "" if low is None else f"{number_text(low)} to {number_text(high)}"


def advantages(report: Report) -> list[Advantage]:
    """Each pair once, in the direction in which its advantage is not negative."""
    found: list[Advantage] = []
    for pair, entry in report["advantage"].items():
        first, _, second = pair.partition("->")
        value, (low, high) = entry["value"], bounds((entry["low"], entry["high"]))
        if not any((a.first, a.second) == (second, first) for a in found) and (value is None or value >= 0):
            found.append(Advantage(first, second, value, low, high))
    return found


def bounds(interval: Sequence[float | None] | None) -> Bounds:
    """An interval's ends; None twice unless both are there."""
    low, high = interval or (None, None)
    return (None, None) if low is None or high is None else (low, high)


def _hypothesis(report: Report) -> list[str]:
    """How the order from the weakest stage to the strongest did, if that was asked."""
    if not (asked := report.get("hypothesis")):
        return []
    words = f"Weakest first, strongest last ({names_text(asked['order'])})"
    if asked["order"] == report["best"]:
        return [f"{words} is the best."]
    return [f"{words} is behind the best by {difference_text(asked['behind'])} in {report['metric']}."]


def _measured(report: Report) -> str:
    orders, refused = report["orders"], report["refused"]
    count = f"{len(orders)} order{'s' if len(orders) != 1 else ''}"
    words = f"{report['strategy'].capitalize()} search: {count}" if report.get("strategy") else count.capitalize()
    dense = orders[0]["stages"][0]["metrics"].get(report["metric"]) if orders[0]["stages"] else None
    words += f", {len(refused)} cannot run" if refused else ""
    return words + (f"; the dense model's {report['metric']} is {number_text(dense)}." if dense is not None else ".")
