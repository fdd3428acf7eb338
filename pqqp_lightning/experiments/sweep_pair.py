"""Tests the hypothesis about the order of one pruning and one quantizing stage on a sweep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import cast

from pqqp_lightning.algorithms.rank_statistics import (
    Ratio,
    equivalent_ratio,
    falls_steadily,
    monotone_fit,
    rank_correlation,
    sentence,
)
from pqqp_lightning.experiments.sweep_grid import Point, Variant
from pqqp_lightning.experiments.sweep_plan import Curve
from pqqp_lightning.storage.reports import (
    Correlation,
    CurvePoint,
    CurveReport,
    PairHypothesis,
    PairReport,
    PointReport,
)
from pqqp_lightning.trials.verdict import Judge

SIDES = {
    "above": "better than quantization alone at any rate of its curve",
    "below": "worse than quantization alone at the end of its curve",
    "no curve": "no curve to be compared with",
}


class PairAnalysis:
    """Scores of P and Q alone and in both orders.

    Args:
        judge: has the measured scores.
        curve: the stage that quantizes, with its variants.
        last: names of the stages that follow both in every order.
    """

    def __init__(self, judge: Judge, curve: Curve, last: Sequence[str] = ()) -> None:
        self._judge, self._curve, self._last = judge, curve, last
        self._known = judge.tree.results()

    def curves(self) -> list[CurveReport]:
        """M of quantization alone over C, with one curve for each choice of its other arguments.

        Each curve starts with the dense model, which has C = 1.
        """
        metrics = self._judge.tree.measure(()).record["metrics"]
        dense: CurvePoint = {"knobs": {}, "rate": 1.0, "score": self._judge.score(()), "metrics": metrics}
        found: dict[str, list[CurvePoint]] = {}
        for variant in self._curve.variants:
            if (score := self._alone(variant)) is not None:
                entry = self._entry(variant, score)
                found.setdefault(self._curve.label(variant), [dense]).append(entry)
        curves: list[CurveReport] = []
        for label, points in found.items():
            points.sort(key=lambda point: point["rate"])
            curves.append({"label": label, "points": points, "falls_steadily": falls_steadily(_pairs(points))})
        return curves

    def point(self, point: Point, curves: Sequence[CurveReport]) -> PairReport:
        """A, G, C_P, C_Q, C*_P and C*_P - C_Q; None if not measured or not finite."""
        p = next(v for v in point.variants if v.name == self._curve.other)
        q = next(v for v in point.variants if v.name == self._curve.name)
        steps = {variant.name: variant.step for variant in point.variants}
        last = tuple(steps[name] for name in self._last)
        there, back = (q.step, p.step, *last), (p.step, q.step, *last)
        both = there in self._known and back in self._known
        label = self._curve.label(q)
        curve: list[CurvePoint] = next((c["points"] for c in curves if c["label"] == label), [])
        score_p, score_q = self._alone(p), self._alone(q)
        # a stage that only rounds activations does not compress weights and has a single rate
        rates = {entry["rate"] for entry in curve}
        ratio = equivalent_ratio(_pairs(curve), score_p) if len(rates) > 1 else Ratio(None, "no curve")
        rate_q = self._rate(q)
        return {
            "advantage": self._judge.difference(there, back).plain() if both else None,
            "score_pruned": score_p,
            "score_quantized": score_q,
            "gap": None if score_p is None or score_q is None else score_q - score_p,
            "rate_pruned": self._rate(p),
            "rate_quantized": rate_q,
            "equivalent_ratio": ratio.value,
            "beyond": ratio.beyond,
            "limit": ratio.limit,
            "ratio_difference": None if ratio.value is None or rate_q is None else ratio.value - rate_q,
        }

    def _entry(self, variant: Variant, score: float) -> CurvePoint:
        record = self._known[(variant.step,)].record
        metrics = record["metrics"]
        return {"knobs": variant.plain, "rate": record["nominal_rate"], "metrics": metrics, "score": score}

    def _alone(self, variant: Variant) -> float | None:
        if (variant.step,) not in self._known:
            return None
        score = self._judge.score((variant.step,))
        return score if math.isfinite(score) else None

    def _rate(self, variant: Variant) -> float | None:
        known = self._known.get((variant.step,))
        return None if known is None else known.record["nominal_rate"]


def analyse(points: Iterable[PointReport], curve: Curve) -> PairHypothesis:
    """The hypothesis on the pairs of all points: correlations, monotone fits, and the verdict in sentences."""
    pairs = [point["pair"] for point in points]
    p, q = curve.other, curve.name
    advantage = f"A({q}->{p})"
    gap, gap_sentence = _correlated(advantage, f"G({q}, {p})", [(pair["gap"], pair) for pair in pairs])
    by_ratio = [(pair["ratio_difference"], pair) for pair in pairs]
    ratio, ratio_sentence = _correlated(advantage, f"C*_{p} - C_{q}", by_ratio)
    verdict = [gap_sentence, ratio_sentence]
    return {"advantage": advantage, "verdict": verdict, "gap": gap, "ratio_difference": ratio}


def _correlated(
    advantage: str, name: str, points: Sequence[tuple[float | None, PairReport]]
) -> tuple[Correlation, str]:
    """The correlation of A with the quantity ``name`` over the points that have both, and a sentence about it."""
    x: list[float] = []
    y: list[float] = []
    for quantity, pair in points:
        advantage_here = pair["advantage"]
        if quantity is not None and advantage_here is not None and advantage_here["value"] is not None:
            x.append(quantity)
            y.append(advantage_here["value"])
    correlation = rank_correlation(x, y)
    found = {"name": name, **correlation.plain(), "fit": monotone_fit(x, y)}
    return cast(Correlation, found), sentence(advantage, name, correlation)


def pair_notes(points: Sequence[PointReport], curves: Sequence[CurveReport], curve: Curve) -> list[str]:
    """Notes on the numbers: ratios outside of the curve, curves that rise, and marked points."""
    notes = []
    for side, words in SIDES.items():
        off = [pt for pt in points if pt["pair"]["beyond"] == side and pt["pair"]["score_pruned"] is not None]
        steps = list(dict.fromkeys(pt["steps"][curve.other] for pt in off))
        if steps:
            notes.append(f"{', '.join(steps)}: {words}; {len(off)} of {len(points)} points have no C*.")
    for found in curves:
        if not found["falls_steadily"]:
            of = f" with {found['label']}" if found["label"] else ""
            notes.append(
                f"{curve.name}{of}: more compression scores better somewhere on the curve; the largest C counts."
            )
    if marked := sum(any(order["marks"] for order in pt["orders"]) for pt in points):
        words = "compare orders that differ in size, or of which one lost a constraint"
        notes.append(f"{marked} of {len(points)} points {words}.")
    return notes


def _pairs(points: Sequence[CurvePoint]) -> list[tuple[float, float]]:
    return [(point["rate"], point["score"]) for point in points if math.isfinite(point["score"])]
