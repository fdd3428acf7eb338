"""Stops to evaluate a pipeline that is clearly behind the best one, after an eighth or a quarter of the samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from pqqp_lightning.metrics.samples import interval
from pqqp_lightning.trials.prefix_tree import Order
from pqqp_lightning.trials.verdict import Difference, Judge

SHARES = (1 / 8, 1 / 4)
"""Of the samples, after which a pipeline may be stopped."""
LEAST = 8
"""Fewer samples say too little: the resamples of a few have too little spread."""
CONFIDENCE = 0.99
"""Of the interval that must exclude 0; there are two looks at every pipeline."""


@dataclass(frozen=True)
class Stop:
    """Why a pipeline was stopped.

    Attributes:
        samples: number of samples that it was evaluated on.
        behind: M of the best pipeline minus its own, on these samples.
    """

    samples: int
    behind: Difference


class Rungs:
    """Compares one pipeline with the best one on the first samples of both.

    Args:
        judge: has the best one's samples.
        best: the best pipeline so far, measured on all samples.
    """

    def __init__(self, judge: Judge, best: Order) -> None:
        self._judge = judge
        self._best = judge.tree.samples(best, judge.metric)
        count = 0 if self._best is None else len(self._best.states)
        looks = {math.ceil(share * count) for share in SHARES}
        self._looks = sorted(look for look in looks if LEAST <= look < count)
        self._seen: dict[int, Stop | None] = {}

    def stop(self, states: Tensor) -> Stop | None:
        """The first look at which the pipeline is clearly behind; None if it is not, or has too few samples for one.

        Args:
            states: what its samples so far added to the metric, [n, S].
        """
        for look in self._looks:
            if len(states) < look:
                return None
            if look not in self._seen:  # one look at each rung, however often the evaluation asks
                self._seen[look] = self._look(states[:look])
            if (stop := self._seen[look]) is not None:
                return stop
        return None

    def _look(self, states: Tensor) -> Stop | None:
        best, count = self._best, len(states)
        assert best is not None, "without samples there are no looks"
        sign = 1.0 if self._judge.higher else -1.0
        a, b = replace(best, states=best.states[:count]), replace(best, states=states)
        ends = interval(a, b, sign=sign, confidence=CONFIDENCE)
        if ends is None or ends[0] <= 0:
            return None
        return Stop(count, Difference(sign * (a.value() - b.value()), *ends))
