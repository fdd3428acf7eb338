"""What a search for the best order found, in sentences that claim no more than its intervals do."""

from __future__ import annotations

from dataclasses import dataclass

from pqqp_lightning.hypothesis import leaves_zero_out
from pqqp_lightning.page.sections import Report
from pqqp_lightning.report import bounds, hypothesis_sentence, marked_lines, number_text


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

    def reading(self) -> str:
        """The number in words."""
        if self.value is None:
            return "unknown: a metric is not finite"
        if self.low is None:
            return "no difference" if self.value == 0 else f"{self.first} first is better, without an interval"
        clear = leaves_zero_out(self.low, self.high)
        return f"{self.first} first is better" if clear else "no evidence that the order matters"


def order_verdict(report: Report) -> list[str]:
    """The verdict, and what one must know to read it."""
    repeats = (report.get("repeats") or {}).get("verdict", "")
    left_out = [f"Left out: {line}" for line in marked_lines(report.get("left_out", []))]
    sentences = [report["verdict"], repeats, hypothesis_sentence(report), *left_out]
    return [*(sentence.replace("->", "→") for sentence in sentences if sentence), _measured(report)]


def advantages(report: Report) -> list[Advantage]:
    """Each pair once, in the direction in which its advantage is not negative."""
    found: list[Advantage] = []
    for pair, entry in report["advantage"].items():
        first, _, second = pair.partition("->")
        value, (low, high) = entry["value"], bounds((entry["low"], entry["high"]))
        if not any((a.first, a.second) == (second, first) for a in found) and (value is None or value >= 0):
            found.append(Advantage(first, second, value, low, high))
    return found


def _measured(report: Report) -> str:
    orders, refused = report["orders"], report["refused"]
    count = f"{len(orders)} order{'s' if len(orders) != 1 else ''}"
    words = f"{report['strategy'].capitalize()} search: {count}" if report.get("strategy") else count.capitalize()
    dense = orders[0]["stages"][0]["metrics"].get(report["metric"])
    words += f", {len(refused)} cannot run" if refused else ""
    return words + (f"; the dense model's {report['metric']} is {number_text(dense)}." if dense is not None else ".")
