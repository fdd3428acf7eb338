"""Which order is best, by how much, and how sure that is: scores and paired intervals of what a tree has measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from lightning.pytorch import LightningModule

from pqqp_lightning.algorithms.rank_statistics import leaves_zero_out
from pqqp_lightning.errors import RecipeError, suggest
from pqqp_lightning.metrics.samples import CONFIDENCE, interval, joint_confidence
from pqqp_lightning.storage.records import finite_or_none, hardware, package_versions
from pqqp_lightning.storage.reports import DifferenceReport, OrderEntry, Record
from pqqp_lightning.trials.prefix_tree import Order, PrefixTree, prefixes
from pqqp_lightning.trials.strategies import nearest_order

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
        return leaves_zero_out(self.low, self.high)

    def plain(self) -> DifferenceReport:
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
        found = interval(x, y, sign=1.0 if self.higher else -1.0, confidence=confidence)
        return Difference(first - second, *(found or ()))

    def interval(self, order: Order) -> list[float] | None:
        """The metric's own interval."""
        samples = self.tree.samples(order, self.metric)
        found = interval(samples) if samples is not None else None
        return list(found) if found else None

    def decide(self, measured: Sequence[Order], comparable_only: bool = False) -> Verdict:
        """The verdict on the orders that were measured; with ``comparable_only`` on those without a mark, if any."""
        marks = self.marks(measured)
        left = [order for order in measured if not (comparable_only and marks[order])] or list(measured)
        ranked = sorted(left, key=self.score, reverse=True)
        confidence = self._joint_confidence(ranked)
        leads = {order: self.difference(ranked[0], order, confidence) for order in ranked[1:]}
        return Verdict(self, ranked, marks, leads, [order for order in measured if order not in left])

    def _joint_confidence(self, orders: Sequence[Order]) -> float:
        """At which all comparisons together hold with 95%, although the best was chosen on the same samples."""
        found = [self.tree.samples(order, self.metric) for order in orders]
        known = [samples for samples in found if samples is not None and bool(samples.draws.isfinite().all())]
        same = {len(samples.states) for samples in known}
        return joint_confidence(known) if len(known) > 1 and len(same) == 1 else CONFIDENCE

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
        left_out: measured orders that do not compete, because they are marked.
    """

    judge: Judge
    ranked: list[Order]
    marks: dict[Order, list[str]]
    leads: dict[Order, Difference]
    left_out: list[Order]

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
        if value is None:
            return f"No order has a finite {metric}."
        if not self.leads:
            return f"{shown} is the only order that {'is comparable' if self.left_out else 'was measured'}."
        finite = {order: lead for order, lead in self.leads.items() if lead.value is not None}
        broken = [order for order in self.leads if order not in finite]
        also = f"; {metric} is not finite after {_listed(broken)}" if broken else ""
        if not finite:
            return f"{shown} is best{also}."
        if any(lead.low is None for lead in finite.values()):
            equal = [order for order, lead in finite.items() if lead.value == 0]
            beside = f", and so is {_listed(equal)}" if equal else ""
            unsure = "its lead has no interval, which takes a torchmetrics metric that adds up over two samples or more"
            return f"{shown} is best{beside}; {unsure}{also}."
        tied = [order for order, lead in finite.items() if not lead.is_clear]
        if len(tied) == len(finite):
            words = f"{shown} is best, but its lead over no other order is clear"
            return f"No evidence that the order matters here: {words}{also}."
        first = next(order for order in self.ranked[1:] if order not in tied)
        lead = self.leads[first]
        ahead, low, high = map(number_words, (lead.value, lead.low, lead.high))
        beaten = f"; no evidence that it beats {_listed(tied)}" if tied else ""
        return f"{shown} is best, ahead of {' -> '.join(first)} by {ahead} ({low} to {high}){beaten}{also}."

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
            "intensity": {name: finite_or_none(value) for name, value in self._intensities().items()},
            "hypothesis": self._hypothesis(),
            "left_out": [{"order": list(order), "marks": self.marks[order]} for order in self.left_out],
        }

    def _intensities(self) -> dict[str, float]:
        """In the recipe's order, whichever order is best."""
        return self.judge.intensities([name for name in self.judge.tree.names if name in self.best])

    def _entry(self, order: Order, dense: Record) -> OrderEntry:
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

    def _advantages(self) -> dict[str, DifferenceReport]:
        """A(f1->f2) = M(f2(f1(model))) - M(f1(f2(model))) of each pair, from the orders that begin with it."""
        known, found = self.judge.tree.results(), {}
        for first, second in permutations(sorted({name for order in self.ranked for name in order}), 2):
            if (first, second) in known and (second, first) in known:
                found[f"{first}->{second}"] = self.judge.difference((first, second), (second, first)).plain()
        return found

    def _hypothesis(self) -> dict[str, Any] | None:
        """The order from the weakest stage to the strongest, and how far it is from the best one.

        Of stages that are equally strong the recipe's first stands first, so that the best order has no say in it.
        """
        intensity = self._intensities()
        if len(intensity) < len(self.best) or len(self.ranked) < 2:
            return None
        wanted = tuple(sorted(intensity, key=lambda name: intensity[name]))
        order = nearest_order(wanted, sorted(self.ranked, key=lambda order: [*map(wanted.index, order)]))
        behind = Difference(0.0, 0.0, 0.0) if order == self.best else self.leads[order]
        strengths = list(intensity.values())
        equal = [name for name, value in intensity.items() if strengths.count(value) > 1]
        return {"order": list(order), "exactly": order == wanted, "equal": equal, "behind": behind.plain()}


def deciding_metric(
    module: LightningModule, metrics: Iterable[str], metric: str | None, higher: bool | None
) -> tuple[str, bool]:
    """The metric that decides, and whether more of it is better.

    Args:
        module: may say both (``primary_metric``, ``higher_is_better``).
        metrics: the names of what is measured.
        metric: what the user wants.
        higher: what the user says.

    Raises:
        RecipeError: it is not measured, or its direction is not known.
    """
    own, metrics = getattr(module, "primary_metric", None), list(metrics)
    chosen = metric or own or next(iter(metrics), "")
    if not metrics:
        raise RecipeError("trainer: the evaluation measured nothing. Look at limit_val_batches and validation_step.")
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
