"""What each evaluation sample adds to a metric, and paired bootstrap intervals from it.

A metric whose states are sums (accuracies, perplexity, mean errors) is a function of the sum of its samples' states.
The metric of any resample of the data therefore needs no further forward pass. Two models are compared on the same
resamples: the interval of their difference is much narrower than that of either metric.
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

RESAMPLES = 2000
RESAMPLES_AT_ONCE = 50  # bounds the memory of the sample counts, 8 bytes each
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Samples:
    """One metric's states for each of N samples.

    Attributes:
        metric: computes its value from summed states.
        states: float64 [N, S]: the metric's states in their order, each flattened, S numbers in all.
        path: the metric's name among the model's modules.
    """

    metric: Metric
    states: Tensor
    path: str = ""

    def value(self, counts: Tensor | None = None) -> float:
        """The metric when sample n counts ``counts[n]`` times, [N]; by default each counts once."""
        summed = self.states.sum(0) if counts is None else counts.to(self.states) @ self.states
        return float(self._computed(summed[None]))

    def reproduces(self, value: float) -> bool:
        """Whether the samples make up the whole of ``value``: some update may hold no rows that belong together."""
        return math.isclose(self.value(), value, rel_tol=1e-4, abs_tol=1e-9)  # float32 sums in another order

    @cached_property
    def draws(self) -> Tensor:
        """The metric of R = :data:`RESAMPLES` draws of N samples with replacement, float64 [R].

        The draws depend on N only: draw r takes the same samples for every metric and model measured on N samples.
        """
        size = len(self.states)
        generator = torch.Generator().manual_seed(0)
        summed = []
        for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
            chosen = torch.randint(size, (RESAMPLES_AT_ONCE, size), generator=generator)  # indices of samples
            counts = torch.zeros(RESAMPLES_AT_ONCE, size, dtype=torch.float64)
            counts.scatter_add_(1, chosen, torch.ones_like(counts))
            summed.append(counts @ self.states)
        return self._computed(torch.cat(summed))

    def _computed(self, summed: Tensor) -> Tensor:
        """The metric of each row of summed states [R, S], float64 [R]."""
        metric = self.metric
        parts = _split(metric, summed)
        values = []
        for row in range(len(summed)):
            # The class's compute: the instance's is wrapped to cache its value and to synchronise processes.
            vars(metric).update({name: part[row] for name, part in parts.items()})
            values.append(float(type(metric).compute(metric)))
        return torch.tensor(values, dtype=torch.float64)


class Recorded(dict[str, Samples]):
    """The samples of each metric by its name in ``model``, filled at the end of :func:`recording`.

    Args:
        model: the model.
        rows: what each sample added to a metric so far, by the metric's name.
    """

    def __init__(self, model: nn.Module, rows: dict[str, list[Tensor]]) -> None:
        super().__init__()
        self._model, self._rows = model, rows

    def so_far(self) -> dict[str, Tensor]:
        """What each sample so far added to a metric, float64 [n, S], by the metric's name."""
        leaders = _leaders(self._model)
        own = {name: self._rows.get(leaders.get(name, name)) for name in self._rows}
        return {name: torch.stack(rows) for name, rows in own.items() if rows}


@contextmanager
def recording(model: nn.Module) -> Iterator[Recorded]:
    """Record what every sample adds to the metrics of ``model``; the yielded dict has them by name after the block.

    A sample is one row of the tensors passed to ``update``. Metrics whose states are not sums are left out.
    """
    metrics = {name: m for name, m in model.named_modules() if isinstance(m, Metric) and _adds_up(m)}
    rows: dict[str, list[Tensor]] = {name: [] for name in metrics}
    found = Recorded(model, rows)
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


@contextmanager
def without_updates(model: nn.Module) -> Iterator[None]:
    """Inside, the metrics of ``model`` whose states are sums count nothing, and nothing is recorded of them.

    Other metrics may fail when they compute their value from nothing.
    """
    metrics = [metric for metric in model.modules() if isinstance(metric, Metric) and _adds_up(metric)]
    before = [vars(metric)["update"] for metric in metrics]  # a metric's own attribute: torchmetrics wraps the method
    for metric in metrics:
        metric.update = lambda *args, **kwargs: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        for metric, update in zip(metrics, before, strict=True):
            metric.update = update  # type: ignore[method-assign]


def gather_samples(recorded: dict[str, Samples]) -> dict[str, Samples]:
    """Concatenate the samples of all processes in rank order; every rank gets the same.

    A metric that some rank did not record is left out.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return recorded
    states_by_rank: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states_by_rank, {name: item.states for name, item in recorded.items()})
    gathered = {}
    for name, samples in recorded.items():
        if all(name in states for states in states_by_rank):
            joined = torch.cat([states[name] for states in states_by_rank])
            gathered[name] = replace(samples, states=joined)
    return gathered


def restored(model: nn.Module, path: str, states: Tensor) -> Samples:
    """The samples whose ``states`` were kept, with the metric at ``path`` in ``model``."""
    metric = model.get_submodule(path)
    assert isinstance(metric, Metric), f"{path} is not a metric"
    return Samples(_pristine(metric), states, path)


def interval(
    a: Samples, b: Samples | None = None, *, sign: float = 1.0, confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """The bootstrap interval of ``sign`` times the metric of ``a``, or times its difference from that of ``b``.

    The ends are percentiles over :data:`RESAMPLES` draws of N samples with replacement (Efron and Tibshirani 1993,
    chapter 13). Each draw takes the same samples for ``a`` and ``b``.

    Returns:
        The low and the high end. None with a single sample, with different numbers of samples in ``a`` and ``b``, or
        if the metric of any draw is not finite.
    """
    if len(a.states) < 2 or (b is not None and len(b.states) != len(a.states)):
        return None
    draws = sign * (a.draws if b is None else a.draws - b.draws)
    if not bool(draws.isfinite().all()):
        return None
    tail = (1 - confidence) / 2
    low, high = draws.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(low), float(high)


def joint_confidence(compared: Sequence[Samples], confidence: float = CONFIDENCE) -> float:
    """The confidence per interval at which the differences of *all* pairs hold together with ``confidence``.

    With two models it is ``confidence`` itself. All pairs count, not just those with the best model, because the best
    is chosen on the same samples. The correction comes from the draws, balanced over the pairs (Beran 1988, "Balanced
    simultaneous confidence sets"), so that correlated differences cost less than Bonferroni's correction.
    """
    differences = torch.stack([a.draws - b.draws for a, b in combinations(compared, 2)])  # [pairs, R]
    # The rank of each draw among its pair's draws, counted from the middle: how wide an interval must be to hold it.
    middle = (differences.shape[1] - 1) / 2
    ordered = differences.sort(dim=1).values
    first = torch.searchsorted(ordered, differences).double()  # equal values all take their most central rank
    last = torch.searchsorted(ordered, differences, right=True).double() - 1
    distance = torch.maximum(first - middle, middle - last).clamp(min=0)
    # A draw is covered if every pair's interval holds it, so its widest pair decides.
    needed = float(distance.amax(0).quantile(confidence))
    return min(1.0, max(confidence, needed / middle))


def _leaders(model: nn.Module) -> dict[str, str]:
    """The metric that is updated in place of another, by the other's name.

    Metrics of a MetricCollection that would have the same states form a compute group. Only the group's first metric is
    updated; the others share its states.
    """
    leaders: dict[str, str] = {}
    for name, collection in model.named_modules():
        if isinstance(collection, MetricCollection):
            names = {id(metric): path for path, metric in collection.named_modules(prefix=name)}
            for group in collection.compute_groups.values():
                leader, *followers = [names[id(collection[member])] for member in group]
                leaders.update(dict.fromkeys(followers, leader))
    return leaders


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
    """Whether the metric has states, and all are tensors that torchmetrics sums over processes."""
    for reduction in metric._reductions.values():
        if reduction is None or getattr(reduction, "__name__", "") != "dim_zero_sum":
            return False
    return bool(metric._defaults) and all(isinstance(default, Tensor) for default in metric._defaults.values())


def _defaults(metric: Metric) -> dict[str, Tensor]:
    return metric._defaults  # type: ignore[return-value]  # _adds_up has found tensors only


def _pristine(metric: Metric) -> Metric:
    """A copy in its initial state that does not synchronise processes."""
    copy = metric.clone()
    copy.reset()
    copy.distributed_available_fn = lambda: False  # its states will be the sums over all processes already
    return copy


def _joined(metric: Metric) -> Tensor:
    """All states of ``metric``, flattened into one row, float64 [S]."""
    return torch.cat([getattr(metric, name).detach().double().flatten().cpu() for name in metric._defaults])


def _split(metric: Metric, joined: Tensor) -> dict[str, Tensor]:
    """The inverse of :func:`_joined` for many rows [R, S]: each state by name, [R, *its shape]."""
    parts = {}
    start = 0
    for name, default in _defaults(metric).items():
        columns = joined[:, start : start + default.numel()]
        parts[name] = columns.reshape(len(joined), *default.shape).to(default.dtype)
        start += default.numel()
    return parts
