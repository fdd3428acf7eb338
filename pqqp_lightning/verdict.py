"""Which order is best, by how much, and how sure that is: scores and paired intervals of what a tree has measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from lightning.pytorch import LightningModule

from pqqp_lightning.errors import RecipeError, suggest
from pqqp_lightning.metrics.samples import CONFIDENCE, interval
from pqqp_lightning.prefix_tree import Order, PrefixTree, prefixes
from pqqp_lightning.record import Record, hardware, package_versions
from pqqp_lightning.strategies import nearest_order

LOWER_IS_BETTER = ("perplexity", "loss", "error", "mse", "mae", "rmse")
HIGHER_IS_BETTER = ("top1", "top5", "accuracy", "acc", "f1", "auroc", "precision", "recall", "r2")
LARGER = 1.01
"""An order is marked that ends more than 1% larger than the smallest."""


@dataclass(frozen=True)
class Difference:
    """M of one node minus that of another, with its paired bootstrap interval where there is one."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def is_clear(self) -> bool:
        """Whether the interval holds no 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def plain(self) -> dict[str, float | None]:
        """For the report."""
        return {"value": self.value, "low": self.low, "high": self.high}


class Judge:
    """Scores nodes of ``tree`` by ``metric``."""

    def __init__(self, tree: PrefixTree, metric: str, higher: bool) -> None:
        self.tree, self.metric, self.higher = tree, metric, higher

    def score(self, order: Order) -> float:
        """M: higher is better; minus infinity where the metric is not finite. Measures what is not measured yet."""
        value = self.tree.measure(order).record["metrics"][self.metric]
        if value is None:
            return float("-inf")
        return value if self.higher else -value

    def better(self, a: Order, b: Order) -> bool:
        """Whether ``a`` scores higher than ``b``."""
        return self.score(a) > self.score(b)

    def intensities(self, names: Sequence[str]) -> dict[str, float]:
        """M of the dense model minus M after each stage alone, for those that were measured alone."""
        known = self.tree.results()
        return {name: self.score(()) - self.score((name,)) for name in names if (name,) in known}

    def difference(self, a: Order, b: Order, confidence: float = CONFIDENCE) -> Difference:
        """M(a) - M(b)."""
        first, second = self.score(a), self.score(b)
        if max(abs(first), abs(second)) == float("inf"):
            return Difference(None)
        x, y = self.tree.samples(a, self.metric), self.tree.samples(b, self.metric)
        if x is None or y is None:
            return Difference(first - second)
        low, high = interval(x, y, sign=1.0 if self.higher else -1.0, confidence=confidence)
        return Difference(first - second, low, high)

    def interval(self, order: Order) -> list[float] | None:
        """The metric's own interval."""
        samples = self.tree.samples(order, self.metric)
        return None if samples is None else list(interval(samples))

    def decide(self, measured: Sequence[Order], comparable_only: bool = False) -> Verdict:
        """The verdict on the orders that were measured.

        Raises:
            RecipeError: none of them is comparable.
        """
        marks = self.marks(measured)
        left = [order for order in measured if not (comparable_only and marks[order])]
        if not left:
            raise RecipeError("comparable_only: every order is marked. Leave it out, and read the marks.")
        ranked = sorted(left, key=self.score, reverse=True)
        others = ranked[1:]
        confidence = 1 - (1 - CONFIDENCE) / max(1, len(others))  # all comparisons together hold with 95%
        return Verdict(self, ranked, marks, {order: self.difference(ranked[0], order, confidence) for order in others})

    def marks(self, measured: Sequence[Order]) -> dict[Order, list[str]]:
        """Why an order cannot be compared with the others, in a few words."""
        records = {order: self.tree.measure(order).record for order in measured}
        least = min(record["size_bytes"] for record in records.values())
        found: dict[Order, list[str]] = {}
        for order, record in records.items():
            found[order] = []
            if record["size_bytes"] > LARGER * least:
                found[order].append(f"{record['size_bytes'] / least:.2f} times as large as the smallest")
            if any(note.startswith("undone") for p in prefixes(order) for note in self.tree.measure(p).record["notes"]):
                found[order].append("lost a constraint")
        return found


@dataclass(frozen=True)
class Verdict:
    """What a search found.

    Attributes:
        judge: has measured.
        ranked: the orders, best first.
        marks: why some cannot be compared.
        leads: M of the best minus that of each other one; their intervals hold together with 95%.
    """

    judge: Judge
    ranked: list[Order]
    marks: dict[Order, list[str]]
    leads: dict[Order, Difference]

    @property
    def best(self) -> Order:
        """The order with the highest M."""
        return self.ranked[0]

    def sentence(self) -> str:
        """The verdict for people."""
        return self._lead() + self._caveat()

    def _caveat(self) -> str:
        """Why the best order's lead is not the order's alone, where others stand without a mark."""
        if not (marks := self.marks[self.best]) or all(self.marks[order] for order in self.ranked):
            return ""
        return f" But it cannot be compared: {'; '.join(marks)}. --comparable_only true leaves such orders out."

    def _lead(self) -> str:
        best, metric = " -> ".join(self.best), self.judge.metric
        value = self.judge.tree.measure(self.best).record["metrics"][metric]
        shown = f"{best} ({metric} {number_words(value)})"
        if not self.leads:
            return f"{shown} is the only order that was measured."
        if any(lead.low is None for lead in self.leads.values()):
            return f"{shown} is best; its lead has no interval, since the metric does not add up over samples."
        tied = [order for order, lead in self.leads.items() if not lead.is_clear]
        if len(tied) == len(self.leads):
            return (
                f"No evidence that the order matters here: {shown} is best, but its lead over no other order is clear."
            )
        first = next(order for order in self.ranked[1:] if order not in tied)
        lead = self.leads[first]
        value, low, high = map(number_words, (lead.value, lead.low, lead.high))
        ahead = f"ahead of {' -> '.join(first)} by {value} ({low} to {high})"
        also = f"; no evidence that it beats {_listed(tied)}" if tied else ""
        return f"{shown} is best, {ahead}{also}."

    def report(self) -> dict[str, Any]:
        """Plain data for ``order.json``."""
        judge, dense = self.judge, self.judge.tree.measure(()).record
        second = self.ranked[1] if self.leads else None
        return {
            "versions": package_versions(),
            "hardware": hardware(),
            "metric": judge.metric,
            "higher_is_better": judge.higher,
            "verdict": self.sentence(),
            "orders": [self._entry(order, dense) for order in self.ranked],
            "best": list(self.best),
            "lead": None if second is None else {"over": list(second), **self.leads[second].plain()},
            "advantage": self._advantages(),
            "intensity": judge.intensities(sorted({name for order in self.ranked for name in order})),
            "hypothesis": self._hypothesis(),
        }

    def _entry(self, order: Order, dense: Record) -> dict[str, Any]:
        records = [self.judge.tree.measure(prefix).record for prefix in prefixes(order)]
        return {
            "order": list(order),
            "stages": [dense, *records],
            "metrics": records[-1]["metrics"],
            "interval": self.judge.interval(order),
            "behind": self.leads[order].plain() if order in self.leads else None,
            "size_bytes": records[-1]["size_bytes"],
            "marks": self.marks[order],
        }

    def _advantages(self) -> dict[str, dict[str, float | None]]:
        """A(f1->f2) = M(f2(f1(model))) - M(f1(f2(model))) of each pair, from the orders that begin with it."""
        known, found = self.judge.tree.results(), {}
        for first, second in permutations(sorted({name for order in self.ranked for name in order}), 2):
            if (first, second) in known and (second, first) in known:
                found[f"{first}->{second}"] = self.judge.difference((first, second), (second, first)).plain()
        return found

    def _hypothesis(self) -> dict[str, Any] | None:
        """The order from the weakest stage to the strongest, and how far it is from the best one."""
        names = self.best
        intensity = self.judge.intensities(names)
        if len(intensity) < len(names):
            return None
        wanted = tuple(sorted(names, key=lambda name: intensity[name]))
        order = nearest_order(wanted, self.ranked)
        behind = Difference(0.0, 0.0, 0.0) if order == self.best else self.leads[order]
        return {"order": list(order), "exactly": order == wanted, "behind": behind.plain()}


def deciding_metric(
    module: LightningModule, metrics: dict[str, float | None], metric: str | None, higher: bool | None
) -> tuple[str, bool]:
    """The metric that decides, and whether more of it is better.

    Args:
        module: may say both (``primary_metric``, ``higher_is_better``).
        metrics: what is measured.
        metric: what the user wants.
        higher: what the user says.

    Raises:
        RecipeError: it is not measured, or its direction is not known.
    """
    own = getattr(module, "primary_metric", None)
    chosen = metric or own or next(iter(metrics), "")
    if chosen not in metrics:
        raise RecipeError(f"metric='{chosen}' is not measured.{suggest(chosen, metrics)}")
    if higher is None and chosen == own:
        higher = getattr(module, "higher_is_better", None)
    word = chosen.lower()
    if higher is None and any(w in word for w in LOWER_IS_BETTER):
        higher = False
    if higher is None and any(w in word for w in HIGHER_IS_BETTER):
        higher = True
    if higher is None:
        raise RecipeError(f"metric='{chosen}': is more of it better? Say --higher_is_better true or false.")
    return chosen, higher


def number_words(value: float | None) -> str:
    """A metric's value in a sentence."""
    return "-" if value is None else f"{value:.4g}"


def _listed(orders: Sequence[Order]) -> str:
    shown = [" -> ".join(order) for order in orders[:3]]
    return ", ".join(shown) + (f" and {len(orders) - 3} more" if len(orders) > 3 else "")
