"""The verdict on measured orders: which one is best, by how much, and whether the data can tell them apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from lightning.pytorch import LightningModule

from pqqp_lightning.algorithms.rank_statistics import leaves_zero_out
from pqqp_lightning.errors import Problem, RecipeError, suggest
from pqqp_lightning.metrics.samples import CONFIDENCE, interval, joint_confidence
from pqqp_lightning.storage.records import finite_or_none, hardware, package_versions
from pqqp_lightning.storage.reports import DifferenceReport, OrderEntry, Record
from pqqp_lightning.trials.prefix_tree import Order, PrefixTree, prefixes
from pqqp_lightning.trials.strategies import nearest_order

LOWER_IS_BETTER = ("perplexity", "loss", "error", "mse", "mae", "rmse")
HIGHER_IS_BETTER = ("top1", "top5", "accuracy", "acc", "f1", "auroc", "precision", "recall", "r2")
MAX_SIZE_RATIO = 1.01
"""Orders more than 1% larger than the smallest one are marked: their scores are not at equal size."""


@dataclass(frozen=True)
class Difference:
    """M of one node minus M of another, with the ends of its paired bootstrap interval if there is one."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return leaves_zero_out(self.low, self.high)

    def plain(self) -> DifferenceReport:
        """The difference as plain data for the report."""
        return {"value": self.value, "low": self.low, "high": self.high}


class Judge:
    """Scores the nodes of a tree.

    Args:
        tree: measures the nodes.
        metric: name of the metric.
        higher: whether a higher value is better.
    """

    def __init__(self, tree: PrefixTree, metric: str, higher: bool) -> None:
        self.tree = tree
        self.metric = metric
        self.higher = higher

    def score(self, order: Order) -> float:
        """M of a node, measured if unknown: the metric, negated if lower is better; -inf if it is not finite."""
        value = self.tree.measure(order).record["metrics"][self.metric]
        if value is None:
            return float("-inf")
        return value if self.higher else -value

    def better(self, a: Order, b: Order) -> bool:
        """Whether ``a`` scores higher than ``b``."""
        return self.score(a) > self.score(b)

    def intensities(self, names: Sequence[str]) -> dict[str, float]:
        """M of the dense model minus M after each stage alone; stages not measured alone are left out."""
        known = self.tree.results()
        dense = self.score(())
        return {name: dense - self.score((name,)) for name in names if (name,) in known}

    def difference(self, a: Order, b: Order, confidence: float = CONFIDENCE) -> Difference:
        """M(a) - M(b); its interval holds with ``confidence``."""
        score_a = self.score(a)
        score_b = self.score(b)
        if max(abs(score_a), abs(score_b)) == float("inf"):
            return Difference(None)
        samples_a = self.tree.samples(a, self.metric)
        samples_b = self.tree.samples(b, self.metric)
        if samples_a is None or samples_b is None:
            return Difference(score_a - score_b)
        ends = interval(samples_a, samples_b, sign=1.0 if self.higher else -1.0, confidence=confidence)
        return Difference(score_a - score_b, *(ends or ()))

    def interval(self, order: Order) -> list[float] | None:
        """The ends of the metric's own 95% interval, if there is one."""
        samples = self.tree.samples(order, self.metric)
        if samples is None:
            return None
        ends = interval(samples)
        return None if ends is None else list(ends)

    def decide(self, measured: Sequence[Order], comparable_only: bool = False) -> Verdict:
        """Rank the measured orders.

        Args:
            measured: the orders.
            comparable_only: leave out marked orders, unless all are marked.
        """
        marks = self.marks(measured)
        competing = list(measured)
        if comparable_only:
            competing = [order for order in measured if not marks[order]] or competing
        ranked = sorted(competing, key=self.score, reverse=True)
        confidence = self._joint_confidence(ranked)
        leads = {order: self.difference(ranked[0], order, confidence) for order in ranked[1:]}
        return Verdict(self, ranked, marks, leads, [order for order in measured if order not in competing])

    def _joint_confidence(self, orders: Sequence[Order]) -> float:
        """The confidence per comparison at which all hold together with 95%.

        It is higher than 95%, because the best order is chosen on the samples that it is compared on.
        """
        comparable = []
        for order in orders:
            samples = self.tree.samples(order, self.metric)
            if samples is not None and bool(samples.draws.isfinite().all()):
                comparable.append(samples)
        sizes = {len(samples.states) for samples in comparable}
        if len(comparable) < 2 or len(sizes) > 1:
            return CONFIDENCE
        return joint_confidence(comparable)

    def marks(self, measured: Sequence[Order]) -> dict[Order, list[str]]:
        """The reasons, in a few words, why an order cannot be compared with the others; empty if it can."""
        records = {order: self.tree.measure(order).record for order in measured}
        smallest = min(record["size_bytes"] for record in records.values())
        marks: dict[Order, list[str]] = {}
        for order, record in records.items():
            marks[order] = []
            if record["size_bytes"] > MAX_SIZE_RATIO * smallest:
                marks[order].append(f"{record['size_bytes'] / smallest:.2f} times as large as the smallest")
            if any(self.tree.measure(prefix).record.get("undone") for prefix in prefixes(order)):
                marks[order].append("lost a constraint")
        return marks


@dataclass(frozen=True)
class Verdict:
    """The ranking of a search's orders.

    Attributes:
        judge: gave the scores.
        ranked: the competing orders, best first.
        marks: reasons why an order cannot be compared with the others, for each measured order.
        leads: M of the best order minus M of each other one; the intervals hold together with 95%.
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
        """The verdict in words."""
        return self._lead() + self._caveat()

    def _caveat(self) -> str:
        """A warning if the best order is marked and another one is not: the order may not be the reason of its lead."""
        marks = self.marks[self.best]
        if not marks or all(self.marks[order] for order in self.ranked):
            return ""
        return f" But it cannot be compared: {'; '.join(marks)}. --comparable_only true leaves such orders out."

    def _lead(self) -> str:
        metric = self.judge.metric
        value = self.judge.tree.measure(self.best).record["metrics"][metric]
        best = f"{' -> '.join(self.best)} ({metric} {format_number(value)})"
        if value is None:
            return f"No order has a finite {metric}."
        if not self.leads:
            return f"{best} is the only order that {'is comparable' if self.left_out else 'was measured'}."
        finite = {order: lead for order, lead in self.leads.items() if lead.value is not None}
        broken = [order for order in self.leads if order not in finite]
        broken_words = f"; {metric} is not finite after {_join_orders(broken)}" if broken else ""
        if not finite:
            return f"{best} is best{broken_words}."
        if any(lead.low is None for lead in finite.values()):
            equal = [order for order, lead in finite.items() if lead.value == 0]
            equal_words = f", and so is {_join_orders(equal)}" if equal else ""
            reason = "its lead has no interval, which needs a torchmetrics metric that sums over two samples or more"
            return f"{best} is best{equal_words}; {reason}{broken_words}."
        unclear = [order for order, lead in finite.items() if not lead.is_clear]
        if len(unclear) == len(finite):
            words = f"{best} is best, but its lead over no other order is clear"
            return f"No evidence that the order matters here: {words}{broken_words}."
        # The nearest order that is clearly behind: a lead over an unclear one would claim too much.
        behind = next(order for order in self.ranked[1:] if order not in unclear)
        lead = self.leads[behind]
        ends = f"({format_number(lead.low)} to {format_number(lead.high)})"
        unclear_words = f"; no evidence that it beats {_join_orders(unclear)}" if unclear else ""
        lead_words = f"ahead of {' -> '.join(behind)} by {format_number(lead.value)} {ends}"
        return f"{best} is best, {lead_words}{unclear_words}{broken_words}."

    def report(self) -> dict[str, Any]:
        """The content of ``order.json`` as plain data."""
        judge = self.judge
        dense = judge.tree.measure(()).record
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
        """The stages' intensities, in the recipe's order of stages."""
        return self.judge.intensities([name for name in self.judge.tree.names if name in self.best])

    def _entry(self, order: Order, dense: Record) -> OrderEntry:
        """One order of the report, with the records of its prefixes."""
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
        """A(f1->f2) = M(f2(f1(model))) - M(f1(f2(model))) of each pair of stages that was measured both ways."""
        known = self.judge.tree.results()
        names = sorted(set().union(*self.ranked))
        advantages = {}
        for first, second in permutations(names, 2):
            if (first, second) in known and (second, first) in known:
                advantage = self.judge.difference((first, second), (second, first))
                advantages[f"{first}->{second}"] = advantage.plain()
        return advantages

    def _hypothesis(self) -> dict[str, Any] | None:
        """The order from the weakest stage to the strongest, and how far it is behind the best one.

        None if a stage was not measured alone, or only one order competes.
        """
        intensity = self._intensities()
        if len(intensity) < len(self.best) or len(self.ranked) < 2:
            return None
        # Equally strong stages stay in the recipe's order: choosing the better order would favour the hypothesis.
        predicted = tuple(sorted(intensity, key=lambda name: intensity[name]))
        # For the same reason, equally near orders are sorted by the prediction, not by their scores.
        candidates = sorted(self.ranked, key=lambda order: [predicted.index(name) for name in order])
        order = nearest_order(predicted, candidates)
        behind = Difference(0.0, 0.0, 0.0) if order == self.best else self.leads[order]
        strengths = list(intensity.values())
        equal = [name for name, value in intensity.items() if strengths.count(value) > 1]
        return {"order": list(order), "exactly": order == predicted, "equal": equal, "behind": behind.plain()}


def deciding_metric(
    module: LightningModule, metrics: Iterable[str], metric: str | None, higher: bool | None
) -> tuple[str, bool]:
    """Choose the metric that ranks the orders, and its direction.

    Args:
        module: may have ``primary_metric`` and ``higher_is_better``.
        metrics: names of the measured metrics.
        metric: the user's choice; None takes the module's, else the first one measured.
        higher: whether higher is better, if the user says so.

    Returns:
        The metric's name, and whether a higher value is better.

    Raises:
        RecipeError: the metric is not measured, or its direction is unknown.
    """
    primary = getattr(module, "primary_metric", None)
    metrics = list(metrics)
    chosen = metric or primary or next(iter(metrics), "")
    if not metrics:
        way_out = "Look at limit_val_batches and validation_step."
        raise RecipeError(Problem(text="the evaluation measured nothing", way_out=way_out).within("trainer"))
    if chosen not in metrics:
        raise RecipeError(Problem("metric", chosen, "is not measured", suggest(chosen, metrics).strip()))
    if higher is None and chosen == primary:
        higher = getattr(module, "higher_is_better", None)
    # The losses come first: "accuracy_loss" is a loss.
    name = chosen.lower()
    if higher is None and any(word in name for word in LOWER_IS_BETTER):
        higher = False
    if higher is None and any(word in name for word in HIGHER_IS_BETTER):
        higher = True
    if higher is None:
        text = "is unknown: higher values may be better or worse"
        raise RecipeError(Problem("metric", chosen, text, "Say --higher_is_better true or false."))
    return chosen, higher


def format_number(value: float | None) -> str:
    """A metric's value with four digits; ``-`` if there is none."""
    return "-" if value is None else f"{value:.4g}"


def _join_orders(orders: Sequence[Order]) -> str:
    """The first three orders, and how many more there are."""
    words = ", ".join(" -> ".join(order) for order in orders[:3])
    if len(orders) > 3:
        words += f" and {len(orders) - 3} more"
    return words
