"""The perplexity metric against arithmetic written out, and where others overflow."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pqqp_lightning.metrics import Perplexity


def reference(logits, targets, ignore_index=-100):
    total, count = 0.0, 0
    for row, label in zip(logits.double().flatten(0, 1), targets.flatten(), strict=True):
        if label != ignore_index:
            total += (row.logsumexp(0) - row[label]).item()
            count += 1
    return math.exp(total / count)


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 7, 11), (3, 130, 17)])
def test_perplexity_is_exp_of_the_mean_cross_entropy(shape):
    torch.manual_seed(0)
    logits, targets = 5 * torch.randn(shape), torch.randint(0, shape[2], shape[:2])
    metric = Perplexity()
    metric.update(logits, targets)
    assert metric.compute().item() == pytest.approx(reference(logits, targets), rel=1e-5)


def test_batches_weigh_by_their_tokens_and_not_by_their_number():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 9, 5), torch.randint(0, 5, (3, 9))
    metric = Perplexity()
    metric.update(logits[:1, :2], targets[:1, :2])
    metric.update(logits[:1, 2:], targets[:1, 2:])
    metric.update(logits[1:], targets[1:])
    assert metric.compute().item() == pytest.approx(reference(logits, targets), rel=1e-6)


def test_ignored_targets_do_not_count():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 6, 5), torch.randint(0, 5, (2, 6))
    targets[0, 2:] = -100
    metric = Perplexity()
    metric.update(logits, targets)
    assert metric.compute().item() == pytest.approx(reference(logits, targets), rel=1e-6)
    assert metric.count.item() == 8


@pytest.mark.parametrize("scale", [1e4, 1e30, 3e38])
def test_a_damaged_model_has_a_finite_perplexity(scale):
    logits = torch.tensor([[[scale, -scale, 0.0]]])
    metric = Perplexity()
    metric.update(logits, torch.tensor([[1]]))
    assert math.isfinite(metric.compute().item())
    assert metric.compute() > 1e300


def test_nan_in_the_logits_is_not_hidden():
    metric = Perplexity()
    metric.update(torch.full((1, 2, 3), float("nan")), torch.zeros(1, 2, dtype=torch.long))
    assert math.isnan(metric.compute().item())


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.type(torch.float16),
    ],
)
def test_the_sum_stays_in_float64_when_the_module_is_converted(convert):
    holder = nn.Module()
    holder.layer, holder.metric = nn.Linear(2, 2), Perplexity()
    logits, targets = torch.randn(2, 6, 5), torch.randint(0, 5, (2, 6))
    holder.metric.update(logits, targets)
    before = holder.metric.total.clone()
    convert(holder)
    assert holder.metric.total.dtype is torch.float64
    assert torch.equal(holder.metric.total, before)
    assert holder.metric.count.dtype is torch.int64
    holder.metric.reset()
    assert holder.metric.total.dtype is torch.float64


def test_set_dtype_does_not_narrow_the_sum():
    assert Perplexity().set_dtype(torch.float16).total.dtype is torch.float64


def test_half_precision_logits_are_summed_in_float32():
    torch.manual_seed(0)
    logits, targets = torch.randn(1, 50, 400).bfloat16(), torch.randint(0, 400, (1, 50))
    metric = Perplexity()
    metric.update(logits, targets)
    assert metric.compute().item() == pytest.approx(reference(logits, targets), rel=1e-5)


def test_it_works_outside_inference_mode_after_it_was_reset_inside():
    metric = Perplexity()
    with torch.inference_mode():
        metric.update(torch.randn(1, 2, 3), torch.zeros(1, 2, dtype=torch.long))
        metric.reset()
    metric.update(torch.randn(1, 2, 3), torch.zeros(1, 2, dtype=torch.long))
    assert metric.count == 2


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"Expected `logits` \[B, T, V\].*got \[1, 2, 3\] and \[1, 3\]"):
        Perplexity().update(torch.randn(1, 2, 3), torch.zeros(1, 3, dtype=torch.long))


def test_processes_are_summed():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    one, other = Perplexity(), Perplexity()
    one.update(logits[:1], targets[:1])
    other.update(logits[1:], targets[1:])
    one.merge_state(other)  # by the reductions that are used between processes
    assert one.compute().item() == pytest.approx(reference(logits, targets), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_pieces_on_a_cpu_leave_the_sum_as_it_was(dtype):
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 150, 500, dtype=dtype), torch.randint(0, 500, (2, 150))
    total = torch.zeros((), dtype=torch.float64)
    for sequence, labels in zip(logits, targets, strict=True):
        for start in range(0, 150, 64):
            part = slice(start, start + 64)
            total += F.cross_entropy(sequence[part].float(), labels[part], reduction="none").double().sum()
    metric = Perplexity()
    metric.update(logits, targets)
    assert torch.equal(metric.total, total)
