"""Strategies choose which orders of the stages to measure, and in which sequence.

"progressive" applies the Progressive Intensity Hypothesis (Kim et al., arXiv 2603.18426): it measures each stage alone
and sorts the stages from the weakest perturbation to the strongest. From there it tries to move one stage at a time:
first swaps of neighbours, then longer moves, because the best of all orders may not be a neighbour. The moves are the
insertion neighbourhood of the linear ordering problem (Schiavinotto and Stuetzle 2004).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from itertools import combinations
from typing import Protocol

from pqqp_lightning.trials.prefix_tree import Order, distinct_prefixes


class Scorer(Protocol):
    """Scores orders for a strategy."""

    def score(self, order: Order) -> float:
        """M after these stages, measured if unknown; higher is better."""

    def intensities(self, names: Sequence[str]) -> dict[str, float]:
        """M of the dense model minus M after each stage alone; stages not measured alone are left out."""

    def better(self, a: Order, b: Order) -> bool:
        """Whether ``a`` scores higher than ``b``; both are measured."""


class Strategy:
    """Chooses among the orders that the stages' checks allow.

    Args:
        names: of the stages.
        allowed: the orders that the stages' checks accept.
        scorer: gives the scores.
    """

    name = ""

    def __init__(self, names: list[str], allowed: list[Order], scorer: Scorer) -> None:
        self._names = names
        self._allowed = allowed
        self._scorer = scorer

    def first(self) -> list[Order]:
        """The nodes to measure before any whole order."""
        return []

    def rounds(self) -> Iterator[list[Order]]:
        """The orders to measure, in rounds; a round is complete before the next one is requested."""
        raise NotImplementedError

    def nodes(self, max_runs: int | None) -> list[Order]:
        """The nodes that are certain to be measured."""
        raise NotImplementedError

    def most_applications(self, max_runs: int | None) -> int:
        """An upper bound on the number of measured nodes."""
        return len(self.nodes(max_runs))

    def describe(self) -> str:
        """A phrase for the report and the progress lines."""
        raise NotImplementedError

    def untried(self) -> list[Order]:
        """The orders that the strategy would try next if it had no limit."""
        return []

    def finished(self, measured: list[Order]) -> list[Order]:
        """The measured nodes whose models no later order needs."""
        return []


class Exhaustive(Strategy):
    """Every order, depth first, so that consecutive orders reuse a common prefix while its model exists."""

    name = "exhaustive"

    def rounds(self) -> Iterator[list[Order]]:
        yield self._allowed

    def nodes(self, max_runs: int | None) -> list[Order]:
        return distinct_prefixes(self._allowed[:max_runs])

    def describe(self) -> str:
        return f"all {len(self._allowed)} orders"

    def finished(self, measured: list[Order]) -> list[Order]:
        needed = set(distinct_prefixes([order for order in self._allowed if order not in measured]))
        best = measured[0]
        for order in measured:
            if self._scorer.better(order, best):
                best = order
        # The best order's model is the search's result; it is kept until a better one comes.
        return [node for node in distinct_prefixes(measured) if node not in needed and node != best]


class Progressive(Strategy):
    """From the weakest stage to the strongest, then swaps of neighbours and longer moves until none helps."""

    name = "progressive"

    def __init__(self, names: list[str], allowed: list[Order], scorer: Scorer) -> None:
        super().__init__(names, allowed, scorer)
        self._untried: list[Order] = []

    def first(self) -> list[Order]:
        return [(name,) for name in self._first_stages()]

    def rounds(self) -> Iterator[list[Order]]:
        intensity = self._scorer.intensities(self._names)
        by_intensity = sorted(self._names, key=lambda name: intensity.get(name, float("inf")))  # unknown ones last
        best = nearest_order(tuple(by_intensity), self._allowed)
        yield [best]
        tried = {best}
        self._untried = self._untried_moves(best, tried)
        while self._untried and len(tried) < self._most_runs():
            order = self._untried[0]
            tried.add(order)
            yield [order]
            # First improvement: move on from a better order at once, before the other moves are tried.
            if self._scorer.better(order, best):
                best = order
            self._untried = self._untried_moves(best, tried)

    def untried(self) -> list[Order]:
        return self._untried

    def _untried_moves(self, order: Order, tried: Set[Order]) -> list[Order]:
        return [moved for moved in _moves(order) if moved in self._allowed and moved not in tried]

    def nodes(self, max_runs: int | None) -> list[Order]:
        return self.first()

    def most_applications(self, max_runs: int | None) -> int:
        runs = min(max_runs or self._most_runs(), self._most_runs(), len(self._allowed))
        return len(self._first_stages()) + runs * (len(self._names) - 1)  # each order's first stage is measured alone

    def describe(self) -> str:
        return f"from the weakest stage to the strongest, and moves of one stage ({len(self._allowed)} orders can run)"

    def _most_runs(self) -> int:
        """Limit of measured orders; it grows linearly with the n stages, where all orders would be n!."""
        return 3 * len(self._names)

    def _first_stages(self) -> list[str]:
        """The stages that some allowed order begins with: only those can be measured alone."""
        first = {order[0] for order in self._allowed}
        return [name for name in self._names if name in first]


STRATEGIES: dict[str, type[Strategy]] = {s.name: s for s in (Exhaustive, Progressive)}


def nearest_order(wanted: Order, allowed: Sequence[Order]) -> Order:
    """The order of ``allowed`` with the fewest inversions: pairs of stages in the opposite order than in ``wanted``."""
    position = {name: index for index, name in enumerate(wanted)}

    def inversions(order: Order) -> int:
        return sum(position[a] > position[b] for a, b in combinations(order, 2))

    return min(allowed, key=inversions)


def _moves(order: Order) -> Iterator[Order]:
    """Every order that moves one stage to another position; short moves (swaps of neighbours) first."""
    for distance in range(1, len(order)):
        for start in range(len(order) - distance):
            end = start + distance + 1
            before, moved, after = order[:start], order[start:end], order[end:]
            yield (*before, *moved[1:], moved[0], *after)
            if distance > 1:  # at distance 1 both moves are the same swap
                yield (*before, moved[-1], *moved[:-1], *after)
