"""After each stage: the weights keep every promise, and every rank has the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from lightning.pytorch import LightningModule, Trainer

from pqqp_lightning.errors import Problem, RecipeError, shorten
from pqqp_lightning.network.constraints import (
    Promise,
    broken_promises,
    collect_promises,
    constraints_of,
    set_constraints,
)
from pqqp_lightning.network.layers import weight_matrix, weight_place
from pqqp_lightning.network.offload import offload_of
from pqqp_lightning.stages.stage import Context, Stage


def verify(module: LightningModule, stage: Stage, promised: list[Promise], context: Context) -> None:
    """Verify that the weights keep the promises made before ``stage``, and its own.

    With ``allow_undo``, broken constraints of earlier stages are dropped and noted in ``context``.

    Raises:
        RecipeError: a promise is broken.
    """
    broken = broken_promises(module, _in_turn(module, promised))
    if broken and stage.allow_undo:
        for promise, faults in broken:
            kept = constraints_of(promise.layer).without_broken(weight_matrix(promise.layer), promise.constraints)
            set_constraints(promise.layer, kept)
            context.undone = True
            context.notes.append(f"undone in {promise.name}: {'; '.join(faults)}")
        broken = []
    broken += broken_promises(module, _in_turn(module, collect_promises(module)))
    if broken:
        first, faults = broken[0]
        names = dict.fromkeys(promise.name for promise, _ in broken)
        text = f"broke what was promised for {shorten(names)}; {first.name}: {'; '.join(faults)}"
        way_out = "Put this stage before the one that it undoes, or set allow_undo: true."
        raise RecipeError(Problem(text=text, way_out=way_out).within(f"stages.{stage.name}", type(stage).__name__))


def _in_turn(module: LightningModule, promises: Iterable[Promise]) -> Iterator[Promise]:
    """The promises, each in a turn of its layer's weights."""
    for promise in promises:
        holder, _ = weight_place(promise.layer)
        with offload_of(module).turn(holder, read_only=True):
            yield promise


def require_equal_ranks(trainer: Trainer, module: LightningModule) -> None:
    """Raise if the ranks hold different weights after a stage, which DDP would train on silently."""
    if trainer.world_size == 1:
        return
    parameters = offload_of(module).visit(module.named_parameters())
    total = torch.stack([p.detach().abs().sum(dtype=torch.double) for _, p in parameters]).sum()
    sums = trainer.strategy.all_gather(total.to(trainer.strategy.root_device))
    if not bool((sums == sums.flatten()[0]).all()):
        raise RuntimeError("the ranks' weights differ after the stage")
