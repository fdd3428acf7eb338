"""Calls a module's own steps outside of Lightning's loops."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torchmetrics import Metric


def call_step(step: Callable[..., Any], batch: Any) -> Any:
    """Call a step with the arguments that Lightning gives it: the batch, and its index and its loader's if it asks."""
    arguments = [batch]
    for position, name in enumerate(("batch_idx", "dataloader_idx"), start=2):
        if is_param_in_hook_signature(step, name, min_args=position):
            arguments.append(0)
    return step(*arguments)


def validation_step(module: LightningModule, batch: Any) -> Any:
    """Run ``module.validation_step`` on ``batch`` without logging, and return what it returns."""
    with without_logging(module):
        return call_step(module.validation_step, batch)


@contextmanager
def without_logging(module: LightningModule) -> Iterator[None]:
    """Inside, steps log nothing; restores the states of the metrics on exit."""
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    before = [{**m._copy_state_dict(), "_update_count": m._update_count, "_computed": m._computed} for m in metrics]
    for metric in metrics:
        metric.reset()  # a state that Lightning's evaluation left cannot be written to outside of inference mode
    # The step is the user's and calls `self.log`, which Lightning refuses outside of its loops.
    module.__dict__["log"] = module.__dict__["log_dict"] = lambda *args, **kwargs: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        del module.__dict__["log"], module.__dict__["log_dict"]
        for metric, state in zip(metrics, before, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)
