"""Measures orders again with other calibration samples, to see how much of a lead is chance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from pqqp_lightning.errors import Problem
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.trainer import Trainer
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.storage.records import finite_or_none
from pqqp_lightning.storage.reports import RepeatsReport
from pqqp_lightning.storage.result_store import ResultStore
from pqqp_lightning.trials.executors import LocalExecutor
from pqqp_lightning.trials.fingerprint import digest_of
from pqqp_lightning.trials.prefix_tree import Order, PrefixTree
from pqqp_lightning.trials.progress import Progress, TimeLimit
from pqqp_lightning.trials.strategies import Exhaustive
from pqqp_lightning.trials.verdict import Judge, format_number

SEED = "calibration_seed"
"""The attribute of a datamodule that seeds its draw of calibration samples."""


def check_repeats(count: int, data: RunData, stages: Sequence[Stage]) -> list[Problem]:
    """The problems of measuring with ``count`` draws of calibration samples."""
    if count < 1:
        way_out = "Use 1 for the recipe's own calibration samples alone."
        return [Problem("repeats", count, "measures nothing", way_out)]
    if count > 1 and not isinstance(getattr(data.datamodule, SEED, None), int):
        owner = type(data.owner).__name__
        text = f"needs a datamodule that draws its calibration samples by {SEED}, which {owner} does not have"
        return [Problem("repeats", count, text, "Leave it out.")]
    if count > 1 and not any(stage.needs_calibration for stage in stages):
        text = "would measure the same again: no stage reads calibration samples"
        return [Problem("repeats", count, text, "Leave it out.")]
    return []


def check_draws(data: RunData, count: int) -> list[Problem]:
    """The problem of draws that are all equal. Call it after the data is set up."""
    if count < 2:
        return []
    own: int = getattr(data.datamodule, SEED)
    draws = []
    for seed in (own, own + 1):
        with _drawn_by(data, seed):
            draws.append(digest_of(data.calibration_batches(0, 1, None)[0]))
    if draws[0] != draws[1]:
        return []
    text = "would measure the same again: every draw has the same calibration samples"
    return [Problem("repeats", count, text, "Set calibration_samples below all there are.")]


class Repeats:
    """Measures orders with other draws of calibration samples, one after another in this process.

    Args:
        trainer: for evaluation and training.
        data: the model and its data.
        stages: the stages by name.
        store: reads and keeps results.
        tree: has measured the orders with the recipe's own draw.
        judge: the judge of that tree.
    """

    def __init__(
        self,
        trainer: Trainer,
        data: RunData,
        stages: Mapping[str, Stage],
        store: ResultStore,
        tree: PrefixTree,
        judge: Judge,
    ) -> None:
        self._trainer, self._data, self._stages = trainer, data, stages
        self._store, self._tree, self._judge = store, tree, judge
        self.applications = 0

    def report(self, ranked: Sequence[Order], count: int, limit: TimeLimit) -> RepeatsReport | None:
        """Each order's metric with every draw, and how often the best order wins; None for a single draw.

        A draw that the time limit interrupts does not count, but the store keeps its results.
        """
        if count < 2:
            return None
        first: int = getattr(self._data.datamodule, SEED)
        scores = [{order: self._judge.score(order) for order in ranked}]
        for seed in range(first + 1, first + count):
            if self._trainer.is_global_zero:
                print(f"order: again with calibration seed {seed}", flush=True)
            drawn = self._scores(ranked, seed, limit)
            if drawn is None:
                break
            scores.append(drawn)
        sign = 1 if self._judge.higher else -1
        return {
            "seeds": [first + i for i in range(len(scores))],
            "orders": [{"order": list(o), "values": [finite_or_none(sign * row[o]) for row in scores]} for o in ranked],
            "verdict": _sentence(ranked, scores),
        }

    def _scores(self, orders: Sequence[Order], seed: int, limit: TimeLimit) -> dict[Order, float] | None:
        self._tree.bring_to(())
        with _drawn_by(self._data, seed):
            tree = PrefixTree(self._trainer, self._data, self._stages, self._store)
            tree.open_with(self._tree.measure(()))
            judge = Judge(tree, self._judge.metric, self._judge.higher)
            strategy, measured = Exhaustive(list(self._stages), list(orders), judge), list[Order]()
            executor = LocalExecutor(tree, Progress("order", self._trainer, tree, len(strategy.nodes(None))))
            for order in executor.measure(orders, limit.is_over):
                measured.append(order)
                for node in strategy.finished(measured):
                    tree.drop(node)
            # a best order is defined only among all orders
            whole = len(measured) == len(orders)
            scores = {order: judge.score(order) for order in orders} if whole else None
            tree.bring_to(())  # both trees share one model: give it back dense
            for node in tree.results():
                tree.drop(node)
        self.applications += tree.applications
        return scores


@contextmanager
def _drawn_by(data: RunData, seed: int) -> Iterator[None]:
    own = getattr(data.datamodule, SEED)
    setattr(data.datamodule, SEED, seed)
    try:
        yield
    finally:
        setattr(data.datamodule, SEED, own)


def _sentence(ranked: Sequence[Order], scores: Sequence[Mapping[Order, float]]) -> str:
    """How often the best order wins, and the range of its lead over the second."""
    best, count = ranked[0], len(scores)
    wins = sum(row[best] >= max(row.values()) for row in scores)
    words = f"With {count} draws of calibration samples, {' -> '.join(best)} is best in {wins}"
    if len(ranked) < 2:
        return f"{words}."
    leads = [row[best] - row[ranked[1]] for row in scores]
    between = f"{format_number(min(leads))} to {format_number(max(leads))}"
    return f"{words}; its lead over {' -> '.join(ranked[1])} is {between}."
