"""What each evaluation sample adds to a metric, and paired bootstrap intervals from it.

A metric whose states are sums (accuracies, perplexity, mean errors) is a function of the sum of its samples' states.
So any choice of samples has its metric without another forward pass, and two models can be compared on the same
choices: their difference has a much narrower interval than each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

RESAMPLES, AT_ONCE = 2000, 50
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Samples:
    """One metric's states, sample by sample.

    Attributes:
        metric: computes its value from the states.
        states: float64 [N, S], in the order of the metric's states, each flattened.
        path: the metric's name among the model's modules.
    """

    metric: Metric
    states: Tensor
    path: str = ""

    def value(self, counts: Tensor | None = None) -> float:
        """The metric where sample n counts ``counts[n]`` times; each once by default."""
        summed = self.states.sum(0) if counts is None else counts.to(self.states) @ self.states
        return float(self._computed(summed[None]))

    def reproduces(self, value: float) -> bool:
        """Whether the samples make up the whole of ``value``: some update may hold no rows that belong together."""
        return math.isclose(self.value(), value, rel_tol=1e-4, abs_tol=1e-9)  # float32 sums in another order

    @cached_property
    def draws(self) -> Tensor:
        """The metric of :data:`RESAMPLES` draws of N samples with replacement, float64 [R].

        Draw r is the same choice of samples for every metric and every model that were measured on N samples.
        """
        size, generator = len(self.states), torch.Generator().manual_seed(0)
        summed = []
        for _ in range(RESAMPLES // AT_ONCE):
            chosen = torch.stack([torch.randint(size, (size,), generator=generator) for _ in range(AT_ONCE)])
            counts = torch.zeros(AT_ONCE, size, dtype=torch.float64)
            counts.scatter_add_(1, chosen, torch.ones_like(counts))
            summed.append(counts @ self.states)
        return self._computed(torch.cat(summed))

    def _computed(self, summed: Tensor) -> Tensor:
        """The metric of each row of states [R, S], float64 [R], by its class's own ``compute``."""
        parts, metric = _split(self.metric, summed), self.metric
        values = []
        for row in range(len(summed)):
            vars(metric).update({name: part[row] for name, part in parts.items()})
            values.append(float(type(metric).compute(metric)))
        return torch.tensor(values, dtype=torch.float64)


@contextmanager
def recording(model: nn.Module) -> Iterator[dict[str, Samples]]:
    """Note what every sample adds to the metrics of ``model``; in the result, by their names, after the block.

    A sample is a row of the tensors that a metric is updated with. Metrics whose states are no sums are left out.
    """
    metrics = {name: m for name, m in model.named_modules() if isinstance(m, Metric) and _adds_up(m)}
    rows: dict[str, list[Tensor]] = {name: [] for name in metrics}
    found: dict[str, Samples] = {}
    for name, metric in metrics.items():
        _record(metric, rows[name])
    try:
        yield found
    finally:
        for metric in metrics.values():
            metric.update = metric.update.recorded  # type: ignore[method-assign,attr-defined]
            del metric.forward
    leaders = _leaders(model)
    for name, metric in metrics.items():
        if own := rows[leaders.get(name, name)]:
            found[name] = Samples(_pristine(metric), torch.stack(own), name)


def over_ranks(found: dict[str, Samples]) -> dict[str, Samples]:
    """The samples of all processes, rank by rank: the same on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, {name: samples.states for name, samples in found.items()})
    everywhere = [name for name in found if all(name in part for part in parts)]
    return {name: replace(found[name], states=torch.cat([part[name] for part in parts])) for name in everywhere}


def restored(model: nn.Module, path: str, states: Tensor) -> Samples:
    """The samples whose ``states`` were kept, with the metric at ``path`` in ``model``."""
    metric = model.get_submodule(path)
    assert isinstance(metric, Metric), f"{path} is not a metric"
    return Samples(_pristine(metric), states, path)


def interval(
    a: Samples, b: Samples | None = None, *, sign: float = 1.0, confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """The bootstrap interval of ``sign`` times the metric of ``a``, or of its difference from that of ``b``.

    Percentiles of :data:`RESAMPLES` draws of N samples with replacement (Efron and Tibshirani 1993, chapter 13); ``a``
    and ``b`` are drawn together, sample by sample.

    Returns:
        Its ends; None where there is one sample alone, where the two were measured on different numbers of samples, or
        where the metric of some draw is not finite.
    """
    if len(a.states) < 2 or (b is not None and len(b.states) != len(a.states)):
        return None
    draws = sign * (a.draws if b is None else a.draws - b.draws)
    if not bool(draws.isfinite().all()):
        return None
    tail = (1 - confidence) / 2
    low, high = draws.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(low), float(high)


def joint_confidence(found: Sequence[Samples], confidence: float = CONFIDENCE) -> float:
    """The confidence at which the intervals of the differences of *all* pairs hold together with ``confidence``.

    For two it is ``confidence`` itself. That all pairs count, and not those with the best alone, makes up for the best
    having been chosen on the same samples. From the draws themselves, balanced over the pairs (Beran 1988, "Balanced
    simultaneous confidence sets"): so correlated differences cost less than Bonferroni's correction.
    """
    differences = torch.stack([a.draws - b.draws for a, b in combinations(found, 2)])  # [pairs, draws]
    middle = (differences.shape[1] - 1) / 2
    ordered = differences.sort(dim=1).values
    first = torch.searchsorted(ordered, differences).double()  # equal values share the most central of their places
    last = torch.searchsorted(ordered, differences, right=True).double() - 1
    depth = torch.maximum(first - middle, middle - last).clamp(min=0)
    farthest = float(depth.amax(0).quantile(confidence))
    return min(1.0, max(confidence, farthest / middle))


def _leaders(model: nn.Module) -> dict[str, str]:
    """Metrics of a collection that share another one's states, which alone is updated, with that one's name."""
    found: dict[str, str] = {}
    for name, collection in model.named_modules():
        if isinstance(collection, MetricCollection):
            names = {id(metric): path for path, metric in collection.named_modules(prefix=name)}
            for group in collection.compute_groups.values():
                leader, *others = (names[id(collection[member])] for member in group)
                found |= dict.fromkeys(others, leader)
    return found


def _record(metric: Metric, rows: list[Tensor]) -> None:
    update, forward, probe = metric.update, metric.forward, _pristine(metric)
    noted: bool | None = None  # whether this call's update was; None outside of a call

    def called(*args: Any, **kwargs: Any) -> Any:
        """A metric may update itself twice in a call: for all batches so far, and for the value of this one."""
        nonlocal noted
        noted = False
        try:
            return forward(*args, **kwargs)
        finally:
            noted = None

    def recorded(*args: Any, **kwargs: Any) -> None:
        nonlocal noted
        before = _joined(metric)
        update(*args, **kwargs)
        if noted:
            return
        noted = None if noted is None else True
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim]
        count = min((len(x) for x in tensors), default=0)
        if any(len(x) != count for x in tensors):
            return
        if count == 1:
            rows.append(_joined(metric) - before)
            return
        probe.to(metric.device)
        for i in range(count):
            probe.reset()
            probe.update(*(_row(x, i) for x in args), **{k: _row(x, i) for k, x in kwargs.items()})
            rows.append(_joined(probe))

    recorded.recorded = update  # type: ignore[attr-defined]
    metric.update, metric.forward = recorded, called  # type: ignore[method-assign]


def _row(value: Any, i: int) -> Any:
    return value[i : i + 1] if isinstance(value, Tensor) and value.ndim else value


def _adds_up(metric: Metric) -> bool:
    """Whether all its states are tensors that are summed over processes, and so over samples."""
    sums = all(f is not None and getattr(f, "__name__", "") == "dim_zero_sum" for f in metric._reductions.values())
    return bool(metric._defaults) and sums and all(isinstance(d, Tensor) for d in metric._defaults.values())


def _defaults(metric: Metric) -> dict[str, Tensor]:
    return metric._defaults  # type: ignore[return-value]  # tensors, where it adds up


def _pristine(metric: Metric) -> Metric:
    """A copy that has seen nothing and belongs to nobody."""
    copy = metric.clone()
    copy.reset()
    copy.distributed_available_fn = lambda: False  # its states are those of all processes already
    return copy


def _joined(metric: Metric) -> Tensor:
    return torch.cat([getattr(metric, name).detach().double().flatten().cpu() for name in metric._defaults])


def _split(metric: Metric, joined: Tensor) -> dict[str, Tensor]:
    """The states by name, each [R, *its shape], of rows that hold all of them [R, S]."""
    parts = {}
    for name, default in _defaults(metric).items():
        part, joined = joined[:, : default.numel()], joined[:, default.numel() :]
        parts[name] = part.reshape(len(part), *default.shape).to(default.dtype)
    return parts
