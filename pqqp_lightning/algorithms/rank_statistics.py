"""Statistics that test the Progressive Intensity Hypothesis on a sweep: equivalent ratios, rank correlation, fits.

Pure functions of numbers. M is a score, higher is better; the terms are those of Kim et al. (arXiv 2603.18426).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, permutations
from typing import Any

import numpy as np

RESAMPLES = 2000
"""Bootstrap samples of the interval, and random permutations of the p-value."""
FEWEST = 3
"""Fewest points of a correlation: two points always have a rank correlation of 1 or -1."""
FEW = 10
"""With fewer points than this, the sentence adds that they are few."""
ALL_ORDERS = 7
"""Up to this many points the p-value counts all permutations, else :data:`RESAMPLES` random ones."""
LEVEL = 0.05
"""Significance level of the p-value."""

Curve = Sequence[tuple[float, float]]
"""Points (C, M) of quantization alone."""


def leaves_zero_out(low: float | None, high: float | None) -> bool:
    """Whether an interval excludes zero, that is, shows a difference; False without an interval."""
    return low is not None and high is not None and not low <= 0 <= high


@dataclass(frozen=True)
class Ratio:
    """A compression equivalent ratio C*, or a bound where it lies outside the curve.

    Attributes:
        value: C*, if the score lies on the curve.
        beyond: "above" if the score is better than the whole curve (C* is smaller than every C on it), "below" if it is
            worse than the curve's end (C* is larger than every C on it), "no curve" if there is no curve or score.
        limit: the C at the end of the curve that C* lies beyond.
    """

    value: float | None
    beyond: str = ""
    limit: float | None = None

    def words(self, minus: float = 0.0, form: str = ".2f") -> str:
        """Format C* - ``minus``: ``"6.40"``, a bound such as ``">16.00"``, or ``"-"`` if nothing is known."""
        if self.value is not None:
            return format(self.value - minus, form)
        if self.limit is None:
            return "-"
        sign = "<" if self.beyond == "above" else ">"
        return sign + format(self.limit - minus, form)


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation.

    Attributes:
        value: None if undefined: fewer than 3 points, or all x or all y equal.
        low: lower end of the 95% bootstrap interval over the points.
        high: upper end of the same interval.
        chance: one-sided p-value: the share of permutations of y that give at least this value; exact for few points.
        points: number of points.
    """

    value: float | None
    low: float | None
    high: float | None
    chance: float | None
    points: int

    @property
    def grows(self) -> bool:
        """Whether there is evidence that y grows with x: the interval is above 0 and the p-value is small."""
        return self.low is not None and self.low > 0 and self.chance is not None and self.chance <= LEVEL

    @property
    def falls(self) -> bool:
        """Whether there is evidence that y falls with x."""
        return self.high is not None and self.high < 0 and self.chance is not None and self.chance >= 1 - LEVEL

    def plain(self) -> dict[str, Any]:
        """Return the fields as a dict, for the report."""
        return asdict(self)


def equivalent_ratio(curve: Curve, score: float | None) -> Ratio:
    """Find C* with M(Q; C*) = ``score`` by linear interpolation in C; never extrapolate.

    If a curve that is not monotone crosses the score several times, the largest C counts: how far quantization alone
    can go without being worse. Of several scores at one C the best counts.
    """
    points = sorted(dict(sorted(curve)).items())  # dict keeps the last entry of each C, which is the best
    if not points or score is None:
        return Ratio(None, "no curve")
    reached = [i for i, (_, m) in enumerate(points) if m >= score]
    if not reached:
        return Ratio(None, "above", points[0][0])
    last = reached[-1]
    rate, m = points[last]
    if m == score:
        return Ratio(rate)
    if last == len(points) - 1:
        return Ratio(None, "below", rate)
    next_rate, next_m = points[last + 1]
    return Ratio(rate + (m - score) / (m - next_m) * (next_rate - rate))


def falls_steadily(curve: Curve) -> bool:
    """Whether the score never rises with more compression along the curve."""
    scores = [score for _, score in sorted(curve)]
    return all(score >= next_score for score, next_score in pairwise(scores))


def rank_correlation(x: Sequence[float], y: Sequence[float], seed: int = 0) -> Correlation:
    """Compute Spearman's correlation of ``x`` and ``y`` with a bootstrap interval and a permutation p-value.

    The points of a grid share stages and are therefore not independent: read the interval as a guide.
    """
    count = len(x)
    a = np.asarray(x, float)
    b = np.asarray(y, float)
    value = None if count < FEWEST else _correlation(a[None], b[None])[0]
    if value is None or np.isnan(value):
        return Correlation(None, None, None, None, count)
    generator = np.random.default_rng(seed)
    chosen = generator.integers(count, size=(RESAMPLES, count))
    drawn = _correlation(a[chosen], b[chosen])
    drawn = drawn[~np.isnan(drawn)]  # undefined where a sample repeats one point only
    low, high = np.quantile(drawn, [0.025, 0.975])
    chance = _permutation_p_value(a, b, float(value), generator)
    return Correlation(float(value), float(low), float(high), chance, count)


def monotone_fit(x: Sequence[float], y: Sequence[float]) -> dict[str, Any] | None:
    """Fit a growing function of ``x`` to ``y`` (isotonic least squares).

    Returns:
        ``x`` sorted, ``y`` the fit there, and ``explained``, the share of the variance of ``y`` (R squared), or None if
        ``y`` is constant. None for fewer than 3 points.
    """
    if len(x) < FEWEST:
        return None
    from sklearn.isotonic import IsotonicRegression  # a slow import that other commands do not need

    order = np.argsort(x, kind="stable")
    a = np.asarray(x, float)[order]
    b = np.asarray(y, float)[order]
    fitted = IsotonicRegression(increasing=True).fit_transform(a, b)
    total = float(((b - b.mean()) ** 2).sum())
    explained = None if total == 0 else 1 - float(((b - fitted) ** 2).sum()) / total
    return {"x": a.tolist(), "y": fitted.tolist(), "explained": explained}


def sentence(advantage: str, quantity: str, correlation: Correlation) -> str:
    """Say in one sentence whether ``advantage`` grows with ``quantity``."""
    points = correlation.points
    if correlation.value is None:
        why = "too few points" if points < FEWEST else "the points do not differ"
        return f"Whether {advantage} grows with {quantity} cannot be said: {why} ({points})."
    spearman = f"Spearman {correlation.value:.2f} ({correlation.low:.2f} to {correlation.high:.2f})"
    few = ", which are few" if points < FEW else ""
    numbers = f"{spearman} over {points} points"
    if correlation.grows:
        return f"{advantage} grows with {quantity}: {numbers}{few}."
    if correlation.falls:
        return f"{advantage} falls with {quantity}, against the hypothesis: {numbers}{few}."
    luck = f"; chance alone gives as much in {correlation.chance:.0%} of cases" if correlation.value > 0 else ""
    return f"No evidence that {advantage} grows with {quantity}: {numbers}{few}{luck}."


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's correlation row by row [R, N], NaN where a row is constant."""
    from scipy.stats import rankdata  # a slow import that other commands do not need

    # scipy.stats.spearmanr takes one pair of samples at a time; here thousands of rows are computed at once.
    a = rankdata(x, axis=1)
    b = rankdata(y, axis=1)
    a = a - a.mean(1, keepdims=True)
    b = b - b.mean(1, keepdims=True)
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), size, out=np.full(len(a), np.nan), where=size > 0)


def _permutation_p_value(x: np.ndarray, y: np.ndarray, value: float, generator: np.random.Generator) -> float:
    """The share of permutations of ``y`` whose correlation with ``x`` is at least ``value``."""
    exact = len(y) <= ALL_ORDERS
    if exact:
        orders = list(permutations(range(len(y))))
    else:
        orders = [tuple(generator.permutation(len(y))) for _ in range(RESAMPLES)]
    permuted = y[np.asarray(orders)]
    correlations = _correlation(np.broadcast_to(x, permuted.shape), permuted)
    hits = int((correlations >= value - 1e-12).sum())  # the tolerance counts permutations that only differ by rounding
    # Random permutations count the observed order as one of them, so that the p-value is never 0.
    return hits / len(orders) if exact else (hits + 1) / (len(orders) + 1)
