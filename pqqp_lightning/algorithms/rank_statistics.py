"""From a sweep's scores to the Progressive Intensity Hypothesis: equivalent ratios, rank correlation, monotone fit.

Pure functions of numbers. M is a score of which more is better; names are those of Kim et al. (arXiv 2603.18426).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, permutations
from typing import Any

import numpy as np

RESAMPLES = 2000
FEWEST = 3
"""Two points have a rank correlation of 1 or -1, whatever they are."""
FEW = 10
"""Of fewer points it is said that they are few."""
ALL_ORDERS = 7
"""Up to so many points every permutation is looked at; of more, a random :data:`RESAMPLES` of them."""
LEVEL = 0.05

Curve = Sequence[tuple[float, float]]
"""(C, M) of quantization alone."""


def leaves_zero_out(low: float | None, high: float | None) -> bool:
    """Whether an interval says that a difference is one; where there is no interval, nothing does."""
    return low is not None and high is not None and not low <= 0 <= high


@dataclass(frozen=True)
class Ratio:
    """A compression equivalent ratio, or on which side of the curve it would be.

    Attributes:
        value: C*, if the score lies on the curve.
        beyond: "above" where the score is better than the whole curve (C* is smaller than every C on it), "below" where
            it is worse than the curve's end (C* is larger than every C on it), "no curve" where there is none.
        limit: the C at the end of the curve that C* lies beyond.
    """

    value: float | None
    beyond: str = ""
    limit: float | None = None

    def words(self, minus: float = 0.0, form: str = ".2f") -> str:
        """C* less ``minus``: ``"6.40"``, or what is known of it, as in ``">16.00"``."""
        if self.value is not None:
            return format(self.value - minus, form)
        if self.limit is None:
            return "-"
        return f"{'<' if self.beyond == 'above' else '>'}{format(self.limit - minus, form)}"


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation.

    Attributes:
        value: None where it is not defined: fewer than 3 points, or all alike.
        low: of its 95% bootstrap interval over the points.
        high: of the same.
        chance: the share of permutations of y that give at least this value: a one-sided p-value, exact for few points.
        points: how many there were.
    """

    value: float | None
    low: float | None
    high: float | None
    chance: float | None
    points: int

    @property
    def grows(self) -> bool:
        """Whether there is evidence that y grows with x: the interval is above 0, and chance seldom does it."""
        return self.low is not None and self.low > 0 and self.chance is not None and self.chance <= LEVEL

    @property
    def falls(self) -> bool:
        """Whether there is evidence of the contrary."""
        return self.high is not None and self.high < 0 and self.chance is not None and self.chance >= 1 - LEVEL

    def plain(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


def equivalent_ratio(curve: Curve, score: float | None) -> Ratio:
    """C* with M(Q; C*) = ``score``: linear in C between neighbours on the curve, never beyond its ends.

    Where a curve that is not monotone passes the score several times, the largest C counts: as far as quantization
    alone can go and be no worse. Of several scores at one C the best counts.
    """
    points = sorted(dict(sorted(curve)).items())  # the last of one C, which is the best
    if not points or score is None:
        return Ratio(None, "no curve")
    reached = [i for i, (_, m) in enumerate(points) if m >= score]
    if not reached:
        return Ratio(None, "above", points[0][0])
    rate, m = points[reached[-1]]
    if m == score:
        return Ratio(rate)
    if reached[-1] == len(points) - 1:
        return Ratio(None, "below", rate)
    next_rate, next_m = points[reached[-1] + 1]
    return Ratio(rate + (m - score) / (m - next_m) * (next_rate - rate))


def falls_steadily(curve: Curve) -> bool:
    """Whether more compression never scores better along the curve."""
    return all(a[1] >= b[1] for a, b in pairwise(sorted(curve)))


def rank_correlation(x: Sequence[float], y: Sequence[float], seed: int = 0) -> Correlation:
    """Spearman's correlation of ``x`` and ``y``.

    The points of a grid share stages, so that they are not independent: the interval is a guide rather than a promise.
    """
    count, a, b = len(x), np.asarray(x, float), np.asarray(y, float)
    value = None if count < FEWEST else _correlation(a[None], b[None])[0]
    if value is None or np.isnan(value):
        return Correlation(None, None, None, None, count)
    generator = np.random.default_rng(seed)
    chosen = generator.integers(count, size=(RESAMPLES, count))
    drawn = _correlation(a[chosen], b[chosen])
    drawn = drawn[~np.isnan(drawn)]  # a draw of one point alone says nothing
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Correlation(float(value), float(low), float(high), _chance(a, b, float(value), generator), count)


def monotone_fit(x: Sequence[float], y: Sequence[float]) -> dict[str, Any] | None:
    """The growing function of ``x`` that is nearest to ``y`` (isotonic least squares), and how much it explains.

    Returns:
        ``x`` in order, ``y`` fitted there, and ``explained``, the share of the variance of ``y`` (R squared).
    """
    if len(x) < FEWEST:
        return None
    from sklearn.isotonic import IsotonicRegression  # here: other commands do without it

    order = np.argsort(x, kind="stable")
    a, b = np.asarray(x, float)[order], np.asarray(y, float)[order]
    fitted = IsotonicRegression(increasing=True).fit_transform(a, b)
    around = float(((b - b.mean()) ** 2).sum())
    explained = None if around == 0 else 1 - float(((b - fitted) ** 2).sum()) / around
    return {"x": a.tolist(), "y": fitted.tolist(), "explained": explained}


def sentence(advantage: str, quantity: str, found: Correlation) -> str:
    """The verdict on whether ``advantage`` grows with ``quantity``, for people."""
    if found.value is None:
        why = "too few points" if found.points < FEWEST else "the points do not differ"
        return f"Whether {advantage} grows with {quantity} cannot be said: {why} ({found.points})."
    spearman = f"Spearman {found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
    few = ", which are few" if found.points < FEW else ""
    numbers = f"{spearman} over {found.points} points"
    if found.grows:
        return f"{advantage} grows with {quantity}: {numbers}{few}."
    if found.falls:
        return f"{advantage} falls with {quantity}, against the hypothesis: {numbers}{few}."
    luck = f"; chance alone gives as much in {found.chance:.0%} of cases" if found.value > 0 else ""
    return f"No evidence that {advantage} grows with {quantity}: {numbers}{few}{luck}."


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's correlation row by row [R, N], NaN where a row is constant."""
    from scipy.stats import rankdata  # here: other commands do without it

    a, b = (rankdata(v, axis=1) for v in (x, y))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), size, out=np.full(len(a), np.nan), where=size > 0)


def _chance(x: np.ndarray, y: np.ndarray, value: float, generator: np.random.Generator) -> float:
    """The share of permutations of ``y`` whose correlation is at least ``value``."""
    exact = len(y) <= ALL_ORDERS
    orders = list(permutations(range(len(y)))) if exact else [generator.permutation(len(y)) for _ in range(RESAMPLES)]
    permuted = y[np.asarray(orders)]
    hits = int((_correlation(np.broadcast_to(x, permuted.shape), permuted) >= value - 1e-12).sum())
    return hits / len(orders) if exact else (hits + 1) / (len(orders) + 1)
