"""Where a value stands on an axis, and which round values to write beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeGuard

MARGIN = 0.04
"""Left free at both ends, as a fraction of the axis."""
LARGEST = 1e300
"""What is not below has no place on an axis."""
MANY_TIMES = 20
"""From this ratio of the largest to the smallest value on, the axis is logarithmic."""


class Scale:
    """An axis over ``values``, those that are no finite number left out.

    Attributes:
        logarithmic: whether equal ratios, not differences, are equally far apart.
        empty: whether there was no value at all.
    """

    def __init__(self, values: Iterable[float | None]) -> None:
        known = [v for v in values if is_number(v)]
        self.empty = not known
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        if low == high:
            around = abs(low) / 10 or 1.0
            low, high = low - around, high + around
        self.logarithmic = low > 0 and high / low >= MANY_TIMES
        self._low, self._high = self._bend(low), self._bend(high)

    def place(self, value: float) -> float:
        """Between 0 and 1."""
        inside = (self._bend(value) - self._low) / (self._high - self._low)
        return MARGIN + (1 - 2 * MARGIN) * inside

    def ticks(self) -> list[tuple[float, str]]:
        """(place, text) of a few round values."""
        values = self._powers() if self.logarithmic else self._multiples()
        return [(self.place(value), f"{value:.10g}") for value in values]

    def _bend(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def _multiples(self) -> list[float]:
        step = round_step((self._high - self._low) / 6)
        first, last = math.ceil(self._low / step - 1e-9), math.floor(self._high / step + 1e-9)
        return [float(f"{step * i:.12g}") for i in range(first, last + 1)]

    def _powers(self) -> list[float]:
        first, last = math.ceil(self._low), math.floor(self._high)
        stride = max(1, round((last - first) / 4))
        factors = (1, 3) if last - first < 2 else (1,)
        values = [factor * 10.0**power for power in range(first - 1, last + 1, stride) for factor in factors]
        return [v for v in values if self._low <= math.log10(v) <= self._high]


def round_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten: the least that is not below ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def is_number(value: float | None) -> TypeGuard[float]:
    """Whether there is a value to draw; one that fills float64, as a perplexity that overflows, is none."""
    return value is not None and abs(value) < LARGEST
