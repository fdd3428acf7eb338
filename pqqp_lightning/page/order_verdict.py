"""What a search for the best order found, in sentences that claim no more than its intervals do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    orders, best, metric = report["orders"], report["best"], report["metric"]
    if not orders or not best:
        return ["No order is finished yet."]
    own = next((order for order in orders if order["order"] == best), orders[0])
    if said := report.get("verdict"):
        verdict = [said.replace("->", "→")]
    elif lead := report.get("lead"):
        verdict = _with_lead(report, lead)
    else:
        verdict = [f"The best order is {names_text(best)}, with {_metric(own, metric)}."]
        others = [order for order in orders if order is not own]
        if others:
            following = f"Next comes {names_text(others[0]['order'])}, with {_metric(others[0], metric)}."
            verdict.append(f"{following} The difference has no interval: it may be noise.")
        else:
            verdict.append("It is the only one: there is nothing to compare it with.")
    return [*verdict, *_hypothesis(report), _measured(report)]


def difference_text(difference: dict[str, float | None] | None) -> str:
    """``"2.10 (0.50 to 3.40)"``, without an interval where there is none, ``-`` where there is no difference."""
    value = (difference or {}).get("value")
    low, high = bounds(((difference or {}).get("low"), (difference or {}).get("high")))
    if low is None or low == high:
        return number_text(value)
    return f"{number_text(value)} ({number_text(low)} to {number_text(high)})"


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


def _with_lead(report: Report, lead: dict[str, Any]) -> list[str]:
    best, over, metric = names_text(report["best"]), names_text(lead["over"]), report["metric"]
    low, high = bounds((lead.get("low"), lead.get("high")))
    by = f"{best} leads {over} by {number_text(lead['value'])} in {metric}"
    if low is None or high is None:
        return [f"The best order is {best}.", f"{by}, without an interval: it may be noise."]
    interval = f"95% interval {number_text(low)} to {number_text(high)}"
    if low > 0:
        return [
            f"The best order is {best}: it leads the next by {number_text(lead['value'])} in {metric} ({interval}).",
            f"The next is {over}.",
        ]
    if matters := _evidence(report):
        return [
            f"No evidence which order is best, but the order matters: {matters}.",
            f"{by} ({interval}, which holds 0).",
        ]
    return ["No evidence that the order matters here.", f"{by} ({interval}, which holds 0)."]


def _hypothesis(report: Report) -> list[str]:
    """How the order from the weakest stage to the strongest did, if that was asked."""
    if not (asked := report.get("hypothesis")):
        return []
    words = f"Weakest first, strongest last ({names_text(asked['order'])})"
    if asked["order"] == report["best"]:
        return [f"{words} is the best."]
    return [f"{words} is behind the best by {difference_text(asked['behind'])} in {report['metric']}."]


def _evidence(report: Report) -> str:
    """What shows that the order matters although the best one's lead does not; empty if nothing does."""
    if clear := next((a for a in advantages(report) if a.is_clear), None):
        return f"{clear.first} is better before {clear.second} than after it"
    intervals = {names_text(o["order"]): bounds(o.get("interval")) for o in report["orders"] if not o.get("marks")}
    best = intervals.pop(names_text(report["best"]), None)
    apart = [name for name, other in intervals.items() if best and _are_apart(best, other)]
    return f"the interval of {apart[-1]} is apart from the best one's" if apart else ""


def _are_apart(a: Bounds, b: Bounds) -> bool:
    return a[0] is not None and b[0] is not None and (a[1] < b[0] or b[1] < a[0])


def _measured(report: Report) -> str:
    orders, refused = report["orders"], report["refused"]
    count = f"{len(orders)} order{'s' if len(orders) != 1 else ''}"
    words = f"{report['strategy'].capitalize()} search: {count}" if report.get("strategy") else count.capitalize()
    dense = orders[0]["stages"][0]["metrics"].get(report["metric"]) if orders[0]["stages"] else None
    words += f", {len(refused)} cannot run" if refused else ""
    return words + (f"; the dense model's {report['metric']} is {number_text(dense)}." if dense is not None else ".")


def _metric(order: dict[str, Any], metric: str) -> str:
    return f"{metric} {number_text(order['metrics'].get(metric))}"
