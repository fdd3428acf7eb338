"""Per-sample states and paired bootstrap intervals, against arithmetic written out."""

import math
import random

import pytest
import torch
from torch import nn
from torchmetrics import MeanSquaredError
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy

from pqqp_lightning.metrics import Perplexity
from pqqp_lightning.metrics.samples import interval, matching, recording


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


def test_values_are_matched_to_the_names_that_they_were_logged_with():
    found = {"head.metric": accuracies([1, 1, 0, 1])}
    assert set(matching(found, {"loss": 0.3, "top1": 0.75})) == {"top1"}
    assert not matching(found, {"top1": 0.5})


def test_of_metrics_with_one_value_each_keeps_its_own_samples():
    acc, acc_norm = accuracies([1, 1, 0, 1]), accuracies([0, 1, 1, 1])
    for found in ({"m.acc": acc, "m.acc_norm": acc_norm}, {"m.acc_norm": acc_norm, "m.acc": acc}):
        assert matching(found, {"acc": 0.75, "acc_norm": 0.75}) == {"acc": acc, "acc_norm": acc_norm}


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


def test_different_numbers_of_samples_cannot_be_paired():
    with pytest.raises(ValueError, match="6 samples cannot be paired with 4"):
        interval(accuracies([1] * 6), accuracies([1] * 4))
