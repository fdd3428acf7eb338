"""The analysis of a sweep, against the definitions written out, and on data whose answer is known."""

from __future__ import annotations

import random
from itertools import pairwise, permutations

import pytest
from scipy.stats import spearmanr

from pqqp_lightning.algorithms.rank_statistics import (
    Ratio,
    equivalent_ratio,
    falls_steadily,
    monotone_fit,
    rank_correlation,
    sentence,
)

CURVE = [(1.0, -10.0), (4.0, -10.5), (8.0, -12.0), (16.0, -40.0)]


@pytest.mark.parametrize(("rate", "score"), CURVE)
def test_the_quantizer_itself_has_its_own_rate(rate, score):
    assert equivalent_ratio(CURVE, score) == Ratio(rate)


def test_between_measured_rates_it_is_interpolated():
    assert equivalent_ratio(CURVE, -11.25).value == pytest.approx(6.0)
    assert equivalent_ratio(CURVE[::-1], -26.0).value == pytest.approx(12.0)  # whatever the order of the points
    chance = random.Random(0)
    for _ in range(20):
        rate = chance.uniform(1, 16)
        (c0, m0), (c1, m1) = next((a, b) for a, b in pairwise(CURVE) if a[0] <= rate <= b[0])
        assert equivalent_ratio(CURVE, m0 + (m1 - m0) * (rate - c0) / (c1 - c0)).value == pytest.approx(rate)


@pytest.mark.parametrize(
    ("score", "side", "limit", "words"),
    [(-9.99, "above", 1, "<1.00"), (-40.01, "below", 16, ">16.00"), (None, "no curve", None, "-")],
)
def test_beyond_the_curve_nothing_is_made_up(score, side, limit, words):
    found = equivalent_ratio(CURVE, score)
    assert found == Ratio(None, side, limit)
    assert found.words() == words
    assert found.words(minus=4, form="+.1f") in ("<-3.0", ">+12.0", "-")


def test_without_a_curve_there_is_no_ratio():
    assert equivalent_ratio([], -3.0) == Ratio(None, "no curve")


def test_a_curve_that_rises_again_counts_where_it_is_passed_last():
    curve = [(1, 10.0), (4, 7.0), (8, 9.0), (16, 1.0)]
    assert not falls_steadily(curve)
    assert falls_steadily(CURVE)
    assert equivalent_ratio(curve, 8.0).value == pytest.approx(9.0)


@pytest.mark.parametrize("seed", range(4))
def test_correlation_agrees_with_scipy_and_its_chance_with_loops(seed):
    chance = random.Random(seed)
    x, y = ([chance.choice([1.0, 2.0, 3.0, 4.0, 5.0]) for _ in range(6)] for _ in range(2))
    found = rank_correlation(x, y)
    assert found.value == pytest.approx(spearmanr(x, y).statistic)
    assert found.low <= found.value <= found.high
    orders = list(permutations(y))
    as_large = sum(spearmanr(x, order).statistic >= found.value - 1e-12 for order in orders)
    assert found.chance == pytest.approx(as_large / len(orders))


def test_perfectly_monotone():
    x = [0.1, 0.2, 0.5, 3.0, 9.0, 11.0]
    found = rank_correlation(x, [v**3 for v in x])
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
    assert found.chance == pytest.approx(1 / 720)
    assert found.grows
    assert not found.falls
    back = rank_correlation(x, [-v for v in x])
    assert back.value == pytest.approx(-1)
    assert back.falls
    assert not back.grows


def test_three_points_in_a_row_are_no_evidence():
    found = rank_correlation([1, 2, 3], [1, 2, 3])
    assert found.value == pytest.approx(1)
    assert found.chance == pytest.approx(1 / 6)
    assert not found.grows
    assert sentence("A", "G", found).startswith("No evidence that A grows with G: Spearman 1.00")
    words = "over 3 points, which are few; chance alone gives as much in 17% of cases."
    assert sentence("A", "G", found).endswith(words)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """Independent numbers, whose correlation is 0: far more often inside than not, and seldom called growth."""
    chance, inside, called = random.Random(1), 0, 0
    for trial in range(40):
        x, y = ([chance.gauss(0, 1) for _ in range(12)] for _ in range(2))
        found = rank_correlation(x, y, seed=trial)
        inside += found.low <= 0 <= found.high
        called += found.grows
    assert inside >= 32
    assert called <= 6


@pytest.mark.parametrize(("x", "y"), [([], []), ([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [2, 2, 2])])
def test_what_has_no_correlation(x, y):
    found = rank_correlation(x, y)
    assert (found.value, found.low, found.high, found.chance, found.points) == (None, None, None, None, len(x))
    why = "too few points" if len(x) < 3 else "the points do not differ"
    assert sentence("A", "G", found) == f"Whether A grows with G cannot be said: {why} ({len(x)})."


def slow_monotone(y: list[float]) -> list[float]:
    """Isotonic regression by its min-max formula: max over i <= k of min over j >= k of the mean of y[i..j]."""
    n = len(y)
    return [
        max(min(sum(y[i : j + 1]) / (j + 1 - i) for j in range(k, n)) for i in range(k + 1)) for k in range(n)
    ]  # fmt: skip


def test_monotone_fit_agrees_with_its_formula():
    chance = random.Random(2)
    x = [chance.random() for _ in range(9)]
    y = [v + chance.gauss(0, 0.3) for v in x]
    fit = monotone_fit(x, y)
    pairs = sorted(zip(x, y, strict=True))
    assert fit["x"] == [a for a, _ in pairs]
    assert fit["y"] == pytest.approx(slow_monotone([b for _, b in pairs]))
    mean = sum(y) / 9
    left = sum((b - f) ** 2 for (_, b), f in zip(pairs, fit["y"], strict=True))
    assert fit["explained"] == pytest.approx(1 - left / sum((b - mean) ** 2 for b in y))
    assert monotone_fit(x, x)["explained"] == pytest.approx(1)
    assert monotone_fit([1, 2], [1, 2]) is None
