"""Single forward passes and losses of a model, outside of Lightning's loops: calibration needs them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from pqqp_lightning.network.single_step import call_step, without_logging


def run_batch(trainer: Trainer, module: LightningModule, batch: Any) -> None:
    """Run the model's forward pass on one batch, by its ``calibration_step`` or else its ``validation_step``."""
    run_step(module, transfer(trainer, module, batch))


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
    evaluate_step(module, transfer(trainer, module, batch))


def evaluate_step(module: LightningModule, batch: Any) -> None:
    """Run the model's ``validation_step`` on a batch that is on its device, without logging."""
    with without_logging(module):
        call_step(module.validation_step, batch)


def loss_of(trainer: Trainer, module: LightningModule, batch: Any) -> Tensor:
    """Compute the training loss of one batch, a scalar."""
    with without_logging(module):
        result: Any = call_step(module.training_step, transfer(trainer, module, batch))
    return result["loss"] if isinstance(result, dict) else result


def transfer(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """Convert the batch and move it to the device, as Lightning's loops do before a step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, 0)
    return trainer.strategy.batch_to_device(batch)
