"""Stops an evaluation in the middle, once its first samples say enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torchmetrics import Metric

from pqqp_lightning.metrics.samples import Recorded

Watch = Callable[[Mapping[str, Tensor]], bool]
"""Whether to stop, given what the samples so far [n, S] added to each metric, by the metric's path in the model."""


class StoppedEarly(Exception):
    """Ends an evaluation.

    Attributes:
        states: what the samples so far added to each metric, as in :data:`Watch`.
    """

    def __init__(self, states: Mapping[str, Tensor]) -> None:
        super().__init__("the evaluation was stopped early")
        self.states = states


class WatchSamples(Callback):
    """Asks after each batch whether to stop."""

    def __init__(self, recorded: Recorded, watch: Watch) -> None:
        self._recorded, self._watch = recorded, watch

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the evaluation if the watch says so.

        Raises:
            StoppedEarly: it does.
        """
        states = self._recorded.so_far()
        if self._watch(states):
            raise StoppedEarly(states)


@contextmanager
def stoppable(module: LightningModule, reason: type[Exception] = StoppedEarly) -> Iterator[None]:
    """Put the modes and the metrics of ``module`` back if ``reason`` ends the evaluation inside."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    except reason:
        for part, training in modes.items():
            part.training = training
            if isinstance(part, Metric):
                part.reset()
        # Lightning's teardown, which did not run, forgets where each metric is; a restored structure has other metrics
        module._metric_attributes = None
        raise
