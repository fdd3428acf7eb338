"""What a search says, and that it says no more than was measured."""

import json
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
from torchmetrics import MeanMetric

from pqqp_lightning.metrics.samples import Samples
from pqqp_lightning.report.order import hypothesis_sentence
from pqqp_lightning.trials.prefix_tree import prefixes
from pqqp_lightning.trials.verdict import Judge

PAIR = [("prune", "quantize"), ("quantize", "prune")]


class Tree:
    """A tree that has measured ``losses``; with ``spread``, over samples that scatter so much around them."""

    def __init__(self, losses, names=("prune", "quantize"), spread=None, sizes=None, undone=()):
        self.losses, self.names, self.spread = {(): 1.0} | losses, list(names), spread
        self.sizes, self.undone = sizes or {}, undone

    def measure(self, order):
        record = {"metrics": {"loss": self.losses[order]}, "size_bytes": self.sizes.get(order, 100)}
        record["undone"] = order in self.undone
        return SimpleNamespace(record=record)

    def results(self):
        return {order: self.measure(order) for order in self.losses}

    def samples(self, order, metric):
        value = self.losses.get(order)
        if self.spread is None or value is None:
            return None
        noise = torch.randn(50, generator=torch.Generator().manual_seed(len(order) + ord(order[0][0]) if order else 0))
        states = value + self.spread * (noise - noise.mean()).double()
        return Samples(MeanMetric(), torch.stack([states, torch.ones(50)], 1).double())


def decide(losses, comparable_only=False, **options):
    """The verdict on the whole orders among ``losses``."""
    tree = Tree(losses, **options)
    for order in [*losses]:
        for node in prefixes(order):
            tree.losses.setdefault(node, 2.0)
    whole = [order for order in losses if len(order) == len(tree.names)]
    return Judge(tree, "loss", higher=False).decide(whole, comparable_only)


def test_an_order_that_is_not_finite_takes_no_interval_from_the_others():
    names = ("a", "b", "c")
    losses = {order: 3.0 + i for i, order in enumerate(permutations(names))}
    losses["c", "b", "a"] = None
    sentence = decide(losses, names=names, spread=0.01).sentence()
    assert sentence.startswith("a -> b -> c (loss 3) is best, ahead of a -> c -> b by 1 (")
    assert sentence.endswith("; loss is not finite after c -> b -> a.")


def test_without_a_finite_order_none_is_best():
    assert decide(dict.fromkeys(PAIR)).sentence() == "No order has a finite loss."
    assert decide({PAIR[0]: 2.0, PAIR[1]: None}).sentence() == (
        "prune -> quantize (loss 2) is best; loss is not finite after quantize -> prune."
    )


def test_without_samples_it_says_so_and_names_what_is_equal():
    unsure = "its lead has no interval, which needs a torchmetrics metric that sums over two samples or more."
    assert decide({PAIR[0]: 2.0, PAIR[1]: 3.0}).sentence() == f"prune -> quantize (loss 2) is best; {unsure}"
    equal = decide({PAIR[0]: 2.0, PAIR[1]: 2.0}).sentence()
    assert equal == f"prune -> quantize (loss 2) is best, and so is quantize -> prune; {unsure}"


def test_equal_orders_are_told_apart_by_nothing():
    equal = decide({PAIR[0]: 2.0, PAIR[1]: 2.0}, spread=0.0).sentence()
    assert equal.startswith("No evidence that the order matters here: ")


@pytest.mark.parametrize("best", PAIR)
def test_equally_strong_stages_stand_as_in_the_recipe(best):
    losses = {("prune",): 2.0, ("quantize",): 2.0} | {order: 3.0 if order == best else 4.0 for order in PAIR}
    report = decide(losses, spread=0.01).report()
    assert report["best"] == list(best)
    assert report["hypothesis"]["order"] == ["prune", "quantize"]
    found = "is the best." if best == PAIR[0] else "is behind the best by 1.0000 (1.0000 to 1.0000) in loss."
    equal = "prune and quantize are equally strong alone."
    sentence = hypothesis_sentence(report)
    assert sentence.startswith("Weakest first, strongest last (prune -> quantize) is ")
    assert sentence.endswith(equal)
    assert best != PAIR[0] or found in sentence


def test_the_sorted_order_that_was_not_measured_is_not_called_the_best():
    names = ("a", "b", "c")
    losses = {("a",): 2.0, ("b",): 3.0, ("c",): 4.0, ("a", "c", "b"): 5.0, ("c", "a", "b"): 6.0}
    report = decide(losses, names=names).report()
    assert report["hypothesis"] == {
        "order": ["a", "c", "b"],
        "exactly": False,
        "equal": [],
        "behind": {"value": 0.0, "low": 0.0, "high": 0.0},
    }
    assert hypothesis_sentence(report) == (
        "The measured order nearest to weakest first, strongest last (a -> c -> b) is the best."
    )


def test_a_stage_or_an_order_that_is_not_finite_is_worded_and_its_report_is_json():
    losses = {("prune",): 2.0, ("quantize",): None, PAIR[0]: None, PAIR[1]: 3.0}
    report = decide(losses).report()
    json.dumps(report, allow_nan=False)
    assert report["intensity"] == {"prune": 1.0, "quantize": None}
    assert (
        hypothesis_sentence(report) == "Weakest first, strongest last (prune -> quantize) has no finite loss."
    )  # the best is another


def test_orders_without_a_mark_compete_alone_and_the_others_are_listed():
    verdict = decide({PAIR[0]: 2.0, PAIR[1]: 3.0}, comparable_only=True, sizes={PAIR[0]: 150})
    assert verdict.sentence() == "quantize -> prune (loss 3) is the only order that is comparable."
    assert verdict.report()["left_out"] == [
        {"order": ["prune", "quantize"], "marks": ["1.50 times as large as the smallest"]}
    ]


def test_where_every_order_is_marked_all_of_them_compete():
    verdict = decide({PAIR[0]: 2.0, PAIR[1]: 3.0}, comparable_only=True, undone=PAIR)
    assert [verdict.best, verdict.left_out] == [PAIR[0], []]
