"""Which orders of the stages to measure, and in which sequence.

"progressive" is the Progressive Intensity Hypothesis at work (Kim et al., arXiv 2603.18426): measure each stage alone,
sort them from the weakest perturbation to the strongest, and try from there whether another place for one stage helps:
swaps of neighbours first, then longer moves (the insertion neighbourhood of the linear ordering problem, Schiavinotto
and Stuetzle 2004), since an order may be best of its neighbours and not of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Protocol

from pqqp_lightning.trials.prefix_tree import Order, prefixes


class Measures(Protocol):
    """What a strategy asks for."""

    def score(self, order: Order) -> float:
        """M after these stages (measured if need be): higher is better."""

    def intensities(self, names: Sequence[str]) -> dict[str, float]:
        """M of the dense model minus M after each stage alone, for those that were measured alone."""

    def better(self, a: Order, b: Order) -> bool:
        """Whether ``a``, which was measured, is better than ``b``."""


class Strategy:
    """Chooses among the orders that the stages' checks allow.

    Args:
        names: of the stages.
        allowed: the orders that can run.
        measures: what is asked for scores.
    """

    name = ""

    def __init__(self, names: list[str], allowed: list[Order], measures: Measures) -> None:
        self._names, self._allowed, self._measures = names, allowed, measures

    def first(self) -> list[Order]:
        """What is measured before any whole order."""
        return []

    def rounds(self) -> Iterator[list[Order]]:
        """The orders to measure, round by round: a whole round before the next is asked for."""
        raise NotImplementedError

    def nodes(self, max_runs: int | None) -> list[Order]:
        """The prefixes that are sure to be measured."""
        raise NotImplementedError

    def most_applications(self, max_runs: int | None) -> int:
        """How many prefixes are measured at most."""
        return len(self.nodes(max_runs))

    def describe(self) -> str:
        """For people."""
        raise NotImplementedError

    def untried(self) -> list[Order]:
        """Orders that it would have gone on with, had it not measured as many as it may."""
        return []

    def finished(self, measured: list[Order]) -> list[Order]:
        """Nodes that nothing goes on from any more."""
        return []


class Exhaustive(Strategy):
    """Every order, depth first, so that a common beginning is used while it is there."""

    name = "exhaustive"

    def rounds(self) -> Iterator[list[Order]]:
        yield self._allowed

    def nodes(self, max_runs: int | None) -> list[Order]:
        return _nodes(self._allowed[:max_runs])

    def describe(self) -> str:
        return f"all {len(self._allowed)} orders"

    def finished(self, measured: list[Order]) -> list[Order]:
        left = set(_nodes([order for order in self._allowed if order not in set(measured)]))
        best = measured[0]
        for order in measured:
            best = order if self._measures.better(order, best) else best
        return [node for node in _nodes(measured) if node not in left and node != best]


class Progressive(Strategy):
    """From the weakest stage to the strongest, then swaps of neighbours and longer moves until none helps."""

    name = "progressive"

    def __init__(self, names: list[str], allowed: list[Order], measures: Measures) -> None:
        super().__init__(names, allowed, measures)
        self._left: list[Order] = []

    def first(self) -> list[Order]:
        return [(name,) for name in self._alone()]

    def rounds(self) -> Iterator[list[Order]]:
        best = self._sorted()
        yield [best]
        tried, self._left = {best}, self._untried_moves(best, {best})
        while self._left and len(tried) < self._most_runs():
            order = self._left[0]
            tried.add(order)
            yield [order]
            if self._measures.better(order, best):
                best = order
            self._left = self._untried_moves(best, tried)

    def untried(self) -> list[Order]:
        return self._left

    def _untried_moves(self, order: Order, tried: Set[Order]) -> list[Order]:
        return [moved for moved in _moves(order) if moved in self._allowed and moved not in tried]

    def nodes(self, max_runs: int | None) -> list[Order]:
        return self.first()

    def most_applications(self, max_runs: int | None) -> int:
        runs = min(max_runs or self._most_runs(), self._most_runs(), len(self._allowed))
        return len(self._alone()) + runs * (len(self._names) - 1)  # the first stage of each is measured alone

    def describe(self) -> str:
        return f"from the weakest stage to the strongest, and moves of one stage ({len(self._allowed)} orders can run)"

    def _most_runs(self) -> int:
        """With the stages alone, as many applications as n + 2(n - 1) whole orders of n stages."""
        return 3 * len(self._names)

    def _alone(self) -> list[str]:
        """Stages that some order begins with."""
        first = {order[0] for order in self._allowed}
        return [name for name in self._names if name in first]

    def _sorted(self) -> Order:
        """The allowed order that is nearest to the sorted one: the fewest pairs the other way round."""
        intensity = self._measures.intensities(self._names)
        wanted = sorted(self._names, key=lambda name: intensity.get(name, float("inf")))
        return nearest_order(tuple(wanted), self._allowed)


STRATEGIES: dict[str, type[Strategy]] = {s.name: s for s in (Exhaustive, Progressive)}


def nearest_order(wanted: Order, allowed: Sequence[Order]) -> Order:
    """The one of ``allowed`` with the fewest pairs of stages that stand the other way round than in ``wanted``."""
    place = {name: position for position, name in enumerate(wanted)}

    def inversions(order: Order) -> int:
        return sum(place[a] > place[b] for i, a in enumerate(order) for b in order[i + 1 :])

    return min(allowed, key=inversions)


def _moves(order: Order) -> Iterator[Order]:
    """The orders in which one stage has another place, the nearest places first: swaps of neighbours."""
    for distance in range(1, len(order)):
        for i in range(len(order) - distance):
            low, moved, high = order[:i], order[i : i + distance + 1], order[i + distance + 1 :]
            yield (*low, *moved[1:], moved[0], *high)
            if distance > 1:
                yield (*low, moved[-1], *moved[:-1], *high)


def _nodes(orders: Sequence[Order]) -> list[Order]:
    """The distinct prefixes of ``orders``, each before those that go on from it."""
    return list(dict.fromkeys(prefix for order in orders for prefix in prefixes(order)))
