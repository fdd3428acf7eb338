"""Which orders a search measures, with scores made up."""

from itertools import permutations

from pqqp_lightning.trials.strategies import Progressive

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


def search(value, names=NAMES):
    strategy = Progressive(list(names), list(permutations(names)), Scores(value))
    measured = [order for orders in strategy.rounds() for order in orders]
    assert len(measured) == len(set(measured))
    n = len(names)
    assert n + len(measured) * (n - 1) <= strategy.most_applications(None) <= n * (n + 2 * (n - 1))
    return measured, strategy.untried()


def is_a_move(a, b):
    """Whether one stage's place is all that differs."""
    return any([x for x in a if x != name] == [x for x in b if x != name] for name in NAMES)


def test_progressive_ends_where_no_move_of_one_stage_helps():
    measured, untried = search(lambda order: -sum(order[i] > order[i + 1] for i in range(3)))
    swaps, further = ["bacd", "acbd", "abdc"], ["bcad", "cabd", "acdb", "adbc", "bcda", "dabc"]
    assert ["".join(order) for order in measured] == ["abcd", *swaps, *further]
    assert untried == []


def test_progressive_says_which_moves_it_has_left_untried():
    def value(order):
        return sum(i * -ord(name) for i, name in enumerate(order))

    measured, untried = search(value)
    assert len(measured) == 3 * len(NAMES)
    assert untried
    assert not set(untried) & set(measured)
    assert all(is_a_move(order, max(measured, key=value)) for order in untried)


def test_progressive_leaves_an_order_that_is_the_best_of_its_neighbours_alone():
    """As measured with recipes/order/smollm2.yaml: a = GPTQ, b = SLEB, c = SparseGPT, perplexities."""
    found = {"bca": 35.73, "cab": 36.35, "cba": 37.38, "acb": 40.56, "abc": 41.62, "bac": 41.66}
    measured, _ = search(lambda order: -found["".join(order)], "abc")
    assert max(measured, key=lambda order: -found["".join(order)]) == ("b", "c", "a")
