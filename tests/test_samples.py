"""Per-sample states and paired bootstrap intervals, against arithmetic written out."""

import math
import random
from itertools import combinations

import pytest
import torch
from tiny import RegressionData, Regressor, trainer
from torch import nn
from torchmetrics import MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy

from pqqp_lightning.metrics import Perplexity
from pqqp_lightning.metrics.samples import Samples, interval, joint_confidence, recording
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.stage_runner import StageRunner


class Holder(nn.Module):
    def __init__(self, **metrics):
        super().__init__()
        for name, metric in metrics.items():
            setattr(self, name, metric)


def accuracies(right, batch=4):
    """A recorded accuracy over samples of which ``right`` says which are right."""
    holder = Holder(top1=MulticlassAccuracy(3, average="micro"))
    targets = torch.zeros(len(right), dtype=torch.long)
    logits = torch.eye(3)[torch.tensor([0 if r else 1 for r in right])]
    with recording(holder) as found:
        for x, y in zip(logits.split(batch), targets.split(batch), strict=True):
            holder.top1.update(x, y)
    assert holder.top1.compute().item() == pytest.approx(sum(right) / len(right))
    return found["top1"]


def test_recording_changes_nothing_and_leaves_no_trace():
    torch.manual_seed(0)
    batches = [(torch.randn(b, 5), torch.randint(0, 5, (b,))) for b in (4, 4, 3)]
    plain, watched = (Holder(top1=MulticlassAccuracy(5, average="macro")) for _ in range(2))
    update = watched.top1.update
    with recording(watched) as found:
        for batch in batches:
            watched.top1.update(*batch)
            plain.top1.update(*batch)
    assert watched.top1.update is update
    assert watched.top1.compute() == plain.top1.compute()
    assert found["top1"].states.shape[0] == 11
    assert found["top1"].value() == pytest.approx(plain.top1.compute().item())


def test_any_choice_of_samples_has_its_metric():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 7, 11), torch.randint(0, 11, (6, 7))
    holder = Holder(perplexity=Perplexity())
    with recording(holder) as found:
        holder.perplexity.update(logits[:4], targets[:4])
        holder.perplexity.update(logits[4:], targets[4:])
    chosen = torch.tensor([0, 0, 3, 5, 5, 5])
    other = Perplexity()
    other.update(logits[chosen], targets[chosen])
    counts = torch.bincount(chosen, minlength=6)
    assert found["perplexity"].value(counts) == pytest.approx(other.compute().item(), rel=1e-9)


def test_metrics_that_do_not_add_up_are_left_out():
    holder = Holder(auroc=BinaryAUROC(), mse=MeanSquaredError())
    with recording(holder) as found:
        holder.auroc.update(torch.rand(4), torch.tensor([0, 1, 0, 1]))
        holder.mse.update(torch.rand(4), torch.rand(4))
    assert set(found) == {"mse"}


class TwoErrors(Regressor):
    """Logs two metrics of one value, each under a name that is not its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = MeanSquaredError(), MeanSquaredError()

    def validation_step(self, batch, batch_idx):
        for metric in (self.first, self.second):
            metric(self(batch[0]), batch[1])
        self.log("one", self.second, on_step=False, on_epoch=True)
        self.log_dict({"other": self.first, "plain": self(batch[0]).mean()}, on_step=False, on_epoch=True)


def test_samples_belong_to_the_name_that_their_metric_was_logged_with(tmp_path):
    data = RunData(TwoErrors(), datamodule=RegressionData())
    runner = StageRunner(trainer(tmp_path), data, keep_samples=True)
    metrics = runner.evaluate()
    assert metrics["one"] == metrics["other"]
    assert {name: samples.path for name, samples in runner.samples.items()} == {"one": "second", "other": "first"}


def test_samples_that_miss_a_part_of_the_metric_do_not_reproduce_it():
    samples = accuracies([1, 1, 0, 1])
    assert samples.reproduces(0.75)
    assert not samples.reproduces(0.5)


def bootstrap_slowly(a, b, draws=4000):
    """Percentiles of the difference of two accuracies, drawn with Python's own generator."""
    source = random.Random(1)
    found = []
    for _ in range(draws):
        chosen = [source.randrange(len(a)) for _ in a]
        found.append(sum(a[i] - b[i] for i in chosen) / len(a))
    found.sort()
    return found[int(0.025 * draws)], found[int(0.975 * draws)]


def test_the_paired_interval_agrees_with_a_slow_reference():
    source = random.Random(0)
    a = [source.random() < 0.8 for _ in range(60)]
    b = [x if source.random() < 0.9 else not x for x in a]
    low, high = interval(accuracies(a), accuracies(b))
    slow_low, slow_high = bootstrap_slowly(a, b)
    assert low == pytest.approx(slow_low, abs=0.02)
    assert high == pytest.approx(slow_high, abs=0.02)
    assert low <= (sum(a) - sum(b)) / 60 <= high


def test_pairing_narrows_the_interval():
    source = random.Random(0)
    a = [source.random() < 0.6 for _ in range(100)]
    b = [*a[:-2], not a[-2], not a[-1]]
    apart = sum((high - low) ** 2 for low, high in (interval(accuracies(x)) for x in (a, b))) ** 0.5
    low, high = interval(accuracies(a), accuracies(b))
    assert high - low < 0.5 * apart


def test_the_same_model_has_no_difference_and_the_sign_turns_it_round():
    a, b = accuracies([1, 1, 1, 0, 1, 1]), accuracies([1, 0, 1, 0, 1, 1])
    assert interval(a, a) == (0.0, 0.0)
    low, high = interval(a, b)
    assert interval(a, b, sign=-1.0) == (-high, -low)
    assert math.isfinite(low)


def test_what_cannot_be_paired_has_no_interval():
    assert interval(accuracies([True, False]), accuracies([True, False, True])) is None
    sums = Samples(Ratio(), torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64))  # some draw divides by 0
    assert interval(sums) is None


class Ratio(Metric):
    """Its states are sums, and it is as torchmetrics' template has it: updated twice in a call."""

    def __init__(self):
        super().__init__()
        self.add_state("above", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("below", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, x):
        self.above += x.sum()
        self.below += (x != 0).sum()

    def compute(self):
        return self.above / self.below


@pytest.mark.parametrize("full", [None, True, False])
def test_a_metric_that_updates_itself_twice_in_a_call_is_noted_once(full, monkeypatch):
    monkeypatch.setattr(Ratio, "full_state_update", full)
    holder = Holder(ratio=Ratio())
    with recording(holder) as found:
        values = [holder.ratio(torch.tensor(x)).item() for x in ([1.0, 0.0, 2.0], [3.0])]
    assert values == [1.5, 3.0]
    assert "forward" not in vars(holder.ratio)
    assert found["ratio"].states.tolist() == [[1, 1], [0, 0], [2, 1], [3, 1]]  # a row of nothing is a sample, too
    assert found["ratio"].value() == holder.ratio.compute().item() == 2


def test_metrics_of_a_collection_have_their_samples_although_one_is_updated_for_all():
    torch.manual_seed(0)
    metrics = {"micro": MulticlassAccuracy(3, average="micro"), "macro": MulticlassAccuracy(3, average="macro")}
    metrics |= {"weighted": MulticlassAccuracy(3, average="weighted"), "error": MeanSquaredError()}
    holder = Holder(all=MetricCollection(metrics))
    with recording(holder) as found:
        for _ in range(3):
            holder.all.update(torch.randint(0, 3, (5,)), torch.randint(0, 3, (5,)))
    values = holder.all.compute()
    assert any(len(group) > 1 for group in holder.all.compute_groups.values())
    for name, value in values.items():
        assert found[f"all.{name}"].value() == pytest.approx(value.item()), name
        assert len(found[f"all.{name}"].states) == 15


def test_the_joint_confidence_holds_for_all_pairs_at_once():
    generator = random.Random(0)
    equal = [accuracies([generator.random() < 0.5 for _ in range(80)]) for _ in range(6)]
    assert joint_confidence(equal[:2]) == pytest.approx(0.95, abs=0.002)
    joint = joint_confidence(equal)
    assert 0.95 < joint < 1 - 0.05 / 15  # less than Bonferroni asks of 15 pairs
    inside = torch.ones(2000, dtype=torch.bool)
    for a, b in combinations(equal, 2):
        low, high = interval(a, b, confidence=joint)
        inside &= (a.draws - b.draws >= low) & (a.draws - b.draws <= high)
    assert inside.double().mean() == pytest.approx(0.95, abs=0.01)
    assert joint_confidence([equal[0], equal[0]]) == 0.95  # of the same model: nothing to correct


def test_equal_models_are_seldom_told_apart():
    """The best of six equal ones is clearly ahead of some other in about 5% of all cases; uncorrected, in far more."""
    size, trials, generator = 100, 300, torch.Generator().manual_seed(0)
    chosen = torch.randint(size, (2000, size), generator=generator)
    counts = torch.zeros(2000, size, dtype=torch.float64).scatter_add_(1, chosen, torch.ones(2000, size).double())
    alarms, uncorrected = 0, 0
    for _ in range(trials):
        right = (torch.rand(6, size, generator=generator) < 0.5).double()
        equal = [Samples(Ratio(), torch.stack([x, torch.ones_like(x)], 1)) for x in right]
        for samples, x in zip(equal, right, strict=True):
            vars(samples)["draws"] = counts @ x / size  # all at once
        best = max(range(6), key=lambda i: right[i].sum())
        others, joint = [x for i, x in enumerate(equal) if i != best], joint_confidence(equal)
        alarms += any(interval(equal[best], other, confidence=joint)[0] > 0 for other in others)
        uncorrected += any(interval(equal[best], other)[0] > 0 for other in others)
    assert alarms / trials < 0.08
    assert uncorrected / trials > 0.2
