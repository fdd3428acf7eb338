"""Single forward passes and losses of a model, outside of Lightning's loops: calibration needs them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric


def run_batch(trainer: Trainer, module: LightningModule, batch: Any) -> None:
    """Run the model's forward pass on one batch, by its ``calibration_step`` or else its ``validation_step``."""
    run_step(module, _transfer(trainer, module, batch))


def run_step(module: LightningModule, batch: Any) -> None:
    """Run the model's ``calibration_step`` or else its ``validation_step`` on a batch that is on its device."""
    if has_calibration_step(module):
        getattr(module, "calibration_step")(batch, 0)  # noqa: B009
    else:
        evaluate_step(module, batch)


def has_calibration_step(module: LightningModule) -> bool:
    """Whether the model computes less for calibration than in an evaluation."""
    return getattr(module, "calibration_step", None) is not None


def evaluate_batch(trainer: Trainer, module: LightningModule, batch: Any) -> None:
    """Run the model's ``validation_step`` on one batch, without logging."""
    evaluate_step(module, _transfer(trainer, module, batch))


def evaluate_step(module: LightningModule, batch: Any) -> None:
    """Run the model's ``validation_step`` on a batch that is on its device, without logging."""
    with without_logging(module):
        call_step(module.validation_step, batch)


def loss_of(trainer: Trainer, module: LightningModule, batch: Any) -> Tensor:
    """Compute the training loss of one batch, a scalar."""
    with without_logging(module):
        result: Any = call_step(module.training_step, _transfer(trainer, module, batch))
    return result["loss"] if isinstance(result, dict) else result


def call_step(step: Callable[..., Any], batch: Any) -> Any:
    """Call a step with the arguments that Lightning gives it: the batch, and its index and its loader's if it asks."""
    arguments = [batch]
    for position, name in enumerate(("batch_idx", "dataloader_idx"), start=2):
        if is_param_in_hook_signature(step, name, min_args=position):
            arguments.append(0)
    return step(*arguments)


def _transfer(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """Convert the batch and move it to the device, as Lightning's loops do before a step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, 0)
    return trainer.strategy.batch_to_device(batch)


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
