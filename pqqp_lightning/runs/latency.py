"""How long the model's own forward pass takes on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from pqqp_lightning.checkpoint.nested import tensors_in
from pqqp_lightning.checkpoint.probe import outermost_calls
from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.network.single_step import validation_step
from pqqp_lightning.runs.single_steps import transfer
from pqqp_lightning.seeding import keep_random_state

WARM_UP, REPEATS = 3, 20
"""Passes before the clock starts, and passes that are timed."""


@dataclass(frozen=True)
class Latency:
    """The time of a forward pass.

    Attributes:
        milliseconds: the median of :data:`REPEATS` passes.
        inputs: shapes of the tensors that the model was called with.
    """

    milliseconds: float
    inputs: list[list[int]]


def measure_latency(trainer: Trainer, module: LightningModule, batch: Any) -> Latency:
    """Time the outermost call of the model in its ``validation_step``, after warm-up and in evaluation mode.

    Args:
        trainer: for its device and precision.
        module: on the trainer's device.
        batch: of the evaluation data, as a loader yields it.

    Raises:
        RecipeError: the step calls no module.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), keep_random_state(), trainer.precision_plugin.forward_context():
            with outermost_calls(module) as calls:
                validation_step(module, transfer(trainer, module, batch))
            if not calls:
                text = "cannot be measured: the model's validation_step calls no module"
                raise RecipeError(Problem("objectives", "latency_ms", text, "Leave it out."))
            name, (args, kwargs), _ = calls[0]
            model = module.get_submodule(name)
            times = [_timed(lambda: model(*args, **kwargs), module.device) for _ in range(WARM_UP + REPEATS)]
    finally:
        for part, training in modes.items():
            part.training = training
    shapes = [list(tensor.shape) for tensor in tensors_in([args, kwargs])]
    return Latency(1000 * median(times[WARM_UP:]), shapes)


def _timed(run: Any, device: torch.device) -> float:
    """Seconds of one pass, until the device is done."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
