"""Callbacks of a training segment: they hold masks, seed every step, and save a file to resume from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from pqqp_lightning.network.constraints import constrained_layers
from pqqp_lightning.network.held_zeros import HoldZeros, trained_weight
from pqqp_lightning.network.layers import to_weight
from pqqp_lightning.seeding import seed_from
from pqqp_lightning.storage.files import sync


class HoldMasks(Callback):
    """Keeps pruned weights exactly zero while the model trains.

    Where a layer computes its weight from a parameter (a fake-quantized one), that parameter is held.
    """

    def __init__(self) -> None:
        self._hold = HoldZeros()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for _, layer, constraints in constrained_layers(pl_module):
            weight = trained_weight(layer)
            mask = constraints.mask(weight.device)
            if mask is not None and weight.requires_grad:
                self._hold.hold(weight, to_weight(layer, ~mask))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._hold.zero()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._hold.release()


class SeedSteps(Callback):
    """Seeds every epoch and step from (seed, segment, epoch, step, rank): a resumed run draws the same numbers."""

    def __init__(self, seed: int, segment: int) -> None:
        self._seed, self._segment = seed, segment

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seed_from(self._seed, self._segment, trainer.current_epoch, -1, trainer.global_rank)
        loop = trainer.fit_loop
        if getattr(loop, "is_resuming", False) and loop._data_fetcher is not None:
            # On resume, Lightning has started this epoch's loader before it set the seed and the sampler's epoch.
            iter(loop._data_fetcher)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        seed_from(self._seed, self._segment, trainer.current_epoch, batch_idx, trainer.global_rank)


class ResumePoint(Checkpoint):
    """Saves the training state at the end of every epoch, after all other callbacks; the file is always complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stopped = False

    @property
    def state_key(self) -> str:
        """The same for every path, so that a run whose folder was moved finds its state."""
        return "pqqp_lightning.ResumePoint"

    def state_dict(self) -> dict[str, Any]:
        return {"stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stopped = state_dict["stopped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stopped:  # EarlyStopping had decided before the kill, and does not store that
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stopped = trainer.should_stop
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            sync(temporary)
            temporary.replace(self._path)
            sync(self._path.parent)
        trainer.strategy.barrier()
