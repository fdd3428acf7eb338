"""One forward pass before any work, which shows how the model uses its layers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from pqqp_lightning.calibration.chain import is_chain, mark_unchained
from pqqp_lightning.calibration.layer_probe import observe_uses
from pqqp_lightning.calibration.walk import calibrating
from pqqp_lightning.network.layer_uses import mark_uses
from pqqp_lightning.network.layers import is_called, named_layers
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.single_steps import evaluate_step, has_calibration_step, run_step
from pqqp_lightning.seeding import keep_random_state
from pqqp_lightning.stages.stage import Stage

_log = logging.getLogger(__name__)


def probe_layers(trainer: Trainer, data: RunData, stages: Sequence[Stage]) -> bool:
    """Run one batch and mark in the model how it uses each layer, and blocks that are not the chain that a stage needs.

    The data must have been read.

    Nothing is marked where no stage asks, in a distributed run, whose processes have not met yet, or where the model
    does not run on its own before Lightning has set it up: such layers count as called.

    Returns:
        Whether a mark says that a stage may be refused: some layer is not called as a module, or blocks are no chain.
    """
    asked = any(stage.needs_forward or stage.needs_calibration for stage in stages)
    module = data.module
    if not asked or trainer.world_size > 1 or any(parameter.is_meta for parameter in module.parameters()):
        return False
    layers = {name: layer for name, layer in named_layers(module) if is_called(layer)}
    home, device = module.device, trainer.strategy.root_device
    attached = module._trainer
    try:
        with keep_random_state():
            if home != device:
                module.to(device)
            batch = _transferred(data, _with_dtype(data.calibration_probe(), module.dtype), device)
            module._trainer = trainer
            uses = observe_uses(module, layers, lambda: _run(module, batch))
            unchained = _mark_unchained(module, stages, batch)
    except Exception as error:  # a model that needs what Lightning sets up later: the run itself will tell
        _log.debug("the layers' use is not known: %s", error)
        return False
    finally:
        module._trainer = attached
        if module.device != home:
            module.to(home)
    mark_uses(module, uses)
    return unchained or any(use != "called" for use in uses.values())


def _mark_unchained(module: LightningModule, stages: Sequence[Stage], batch: Any) -> bool:
    """Mark the blocks that are not the chain that a stage needs; returns whether there are any."""
    found = False
    for stage in stages:
        if not stage.needs_chain:
            continue
        blocks = stage.find_blocks(module)
        if "" not in blocks:
            with calibrating(module):
                chained, _ = is_chain(blocks, lambda batch: run_step(module, batch), batch)
            if not chained:
                mark_unchained(module, blocks)
                found = True
    return found


def _run(module: LightningModule, batch: Any) -> None:
    """Run the model as calibration does, and then as an evaluation does, which may use further layers (a head)."""
    run_step(module, batch)
    if has_calibration_step(module):
        with suppress(Exception):  # its calibration data may have another form than its evaluation data
            evaluate_step(module, batch)


def _transferred(data: RunData, batch: Any, device: torch.device) -> Any:
    """The batch on ``device``, changed by the hooks of the datamodule or else of the model, as in Lightning's loops."""

    def owner(hook: str) -> Any:
        datamodule = data.datamodule
        overridden = datamodule is not None and is_overridden(hook, datamodule, LightningDataModule)
        return datamodule if overridden else data.module

    batch = owner("on_before_batch_transfer").on_before_batch_transfer(batch, 0)
    batch = owner("transfer_batch_to_device").transfer_batch_to_device(batch, device, 0)
    return owner("on_after_batch_transfer").on_after_batch_transfer(batch, 0)


def _with_dtype(batch: Any, dtype: Any) -> Any:
    """The batch with its float32 tensors in a model's ``dtype``, where that is a narrower one."""
    if isinstance(batch, Tensor) and batch.dtype == torch.float32 and dtype in (torch.float16, torch.bfloat16):
        return batch.to(dtype)
    if isinstance(batch, dict):
        return {name: _with_dtype(value, dtype) for name, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(_with_dtype(value, dtype) for value in batch)
    return batch
