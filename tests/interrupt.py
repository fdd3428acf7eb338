"""Runs that die at a training batch and are resumed, next to one that does not: both must end the same."""

from pathlib import Path

import pytest
from lightning.pytorch import Callback
from tiny import regression_loader, trainer


class Died(Exception):
    """Stands for a kill."""


class DieAt(Callback):
    """Ends the run before a batch of an epoch of the stage's segment with that number, the first being 1."""

    def __init__(self, segment, epoch, batch):
        self.at, self.segment = (segment, epoch, batch), 0

    def on_train_start(self, trainer, pl_module):
        self.segment += 1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (self.segment, trainer.current_epoch, batch_idx) == self.at:
            raise Died


def undisturbed_and_resumed(folder: Path, stages, make_module, at, **options):
    """The modules of two runs: one undisturbed, one that died ``at`` (segment, epoch, batch) and was resumed."""

    def fit(name, callbacks, ckpt_path=None):
        module = make_module()
        engine = trainer(folder / name, *stages(), callbacks=callbacks, **options)
        engine.fit(module, regression_loader(), regression_loader(16, seed=1), ckpt_path=ckpt_path)
        return module

    undisturbed = fit("undisturbed", [])
    with pytest.raises(Died):
        fit("died", [DieAt(*at)])
    return undisturbed, fit("died", [], "last")
