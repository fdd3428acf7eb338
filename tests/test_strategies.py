"""Which orders a search measures, with scores made up."""

from itertools import permutations

from pqqp_lightning.strategies import Progressive

NAMES = ["a", "b", "c", "d"]


class Scores:
    """Orders of ``NAMES`` score by ``value``; a stage alone is the stronger, the later its name."""

    def __init__(self, value):
        self.value = value

    def score(self, order):
        return self.value(order)

    def better(self, a, b):
        return self.score(a) > self.score(b)

    def intensities(self, names):
        return {name: float(ord(name)) for name in names}


def search(value):
    strategy = Progressive(NAMES, list(permutations(NAMES)), Scores(value))
    return [order for orders in strategy.rounds() for order in orders], strategy.untried()


def test_progressive_ends_where_no_swap_of_neighbours_helps():
    measured, untried = search(lambda order: -sum(order[i] > order[i + 1] for i in range(3)))
    assert measured == [("a", "b", "c", "d"), ("b", "a", "c", "d"), ("a", "c", "b", "d"), ("a", "b", "d", "c")]
    assert untried == []


def test_progressive_says_which_swaps_it_has_left_untried():
    measured, untried = search(lambda order: sum(i * -ord(name) for i, name in enumerate(order)))
    assert len(measured) == len(set(measured)) == 2 * (len(NAMES) - 1) + 1
    best = max(measured, key=lambda order: sum(i * -ord(name) for i, name in enumerate(order)))
    assert best != ("d", "c", "b", "a")  # which is better, and more swaps away than may be tried
    assert untried
    assert not set(untried) & set(measured)
    assert all(sum(x != y for x, y in zip(order, best, strict=True)) == 2 for order in untried)
