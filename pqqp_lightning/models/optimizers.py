"""Optimizers over the trainable parameters, built when Lightning asks for them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau

from pqqp_lightning.errors import Problem, RecipeError


def build_optimizer(
    module: LightningModule, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None
) -> Any:
    """Build what ``configure_optimizers`` returns, over the parameters that require a gradient.

    Raises:
        RecipeError: no parameter requires a gradient.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        text = "no parameter of the model requires a gradient, so there is nothing to finetune"
        way_out = "Set epochs to 0 on every stage, or add a recovery stage that trains something."
        raise RecipeError(Problem(text=text, way_out=way_out))
    built = optimizer(parameters)
    if lr_scheduler is None:
        return {"optimizer": built}
    schedule = lr_scheduler(built)
    if isinstance(schedule, ReduceLROnPlateau):  # Lightning steps it with the value of the metric that it monitors
        return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "monitor": schedule.monitor}}
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule}}
