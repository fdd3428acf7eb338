"""Running statistics of BatchNorm layers, estimated again on calibration data.

After a stage has changed weights, each BatchNorm still normalizes with the mean and variance that its inputs had in the
dense network. Here they become those of the compressed network, without labels and without training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from pqqp_lightning.calibration.chain import is_chain
from pqqp_lightning.calibration.collect import StopForward, watching_inputs
from pqqp_lightning.calibration.statistics import sum_over_ranks
from pqqp_lightning.calibration.walk import BlockPass, Forward, Walk, calibrating

FEW_VALUES = 64
"""A variance of fewer values a channel is off by more than a sixth (its standard error); the record says so."""

CONSTANT = 1e-12
"""A variance below this part of the squared mean is rounding noise: the channel is constant."""


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers of ``model`` that normalize with running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def recalibrate_batch_norms(walk: Walk) -> dict[str, list[str]]:
    """Set the running statistics of every BatchNorm to those of its inputs on the calibration data, in place.

    The layers are taken in the order of the forward pass, in evaluation mode, so that every layer sees what the new
    statistics of the earlier ones make of the data. Hence the result does not depend on the batch size or on the number
    of processes, and is what evaluation mode computes: the exact mean and unbiased variance over all calibration
    samples. A channel that is constant on them keeps its variance, since dividing by none would blow up the first
    other value.

    Every layer takes a forward pass that ends there: of its block, if the blocks follow one another, else of the model.

    Args:
        walk: of the compressed model; it sums over ranks.

    Returns:
        What was found, with the names of the layers: those that keep their statistics, and those with few values.
    """
    norms = batch_norms(walk.model)
    found: dict[str, list[str]] = {}
    with calibrating(walk.model):
        calls = _calls(walk, norms)
        if uncalled := [name for name in norms if name not in calls]:
            found["BatchNorm statistics kept: no forward pass reaches them"] = uncalled
        bar = tqdm(total=len(calls), desc=walk.title, unit="norm", disable=not walk.progress, leave=False)
        for name, forward in _passes(walk, calls):
            moments = _collect(name, norms[name], forward, len(walk.batches), stop=calls[name] == 1)
            if finding := _set_statistics(norms[name], moments):
                found.setdefault(finding, []).append(name)
            bar.update()
        bar.close()
    return found


@dataclass(frozen=True)
class BlockNorms:
    """The BatchNorm layers of one block, whose statistics can be estimated again for other inputs and weights.

    Attributes:
        norms: by their names in the block, in the order of the forward pass.
        repeated: the names of those that a forward pass calls several times.
    """

    norms: Mapping[str, _BatchNorm]
    repeated: frozenset[str]

    def recalibrate(
        self, run: BlockPass, hidden: Sequence[Tensor] | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Set the running statistics to those of the calibration data, layer after layer, in place.

        Call it in ``calibrating()``.

        Args:
            run: the block's forward pass.
            hidden: for each calibration batch what the block reads; that of ``run`` by default.
            tensors: parameters that take the place of the block's own, by their names in it.
        """

        def forward(i: int) -> Tensor:
            return run(i, None if hidden is None else hidden[i], tensors)

        for name, norm in self.norms.items():
            moments = _collect(name, norm, forward, len(run.hidden), stop=name not in self.repeated)
            _set_statistics(norm, moments)


def norms_of_blocks(walk: Walk) -> dict[str, BlockNorms]:
    """Return the BatchNorm layers of each block that has some, by the block's name. Call it in ``calibrating()``."""
    norms = batch_norms(walk.model)
    if not norms:
        return {}
    calls = _calls(walk, norms)
    found = {}
    for block in walk.blocks:
        inside = {name.removeprefix(f"{block}."): name for name in calls if walk.block_of(name) == block}
        if inside:
            repeated = frozenset(own for own, name in inside.items() if calls[name] > 1)
            found[block] = BlockNorms({own: norms[name] for own, name in inside.items()}, repeated)
    return found


def _calls(walk: Walk, norms: Mapping[str, _BatchNorm]) -> Counter[str]:
    """How often the probe's forward pass calls each of ``norms``, in the order of their first calls."""
    calls: Counter[str] = Counter()
    with watching_inputs(norms, lambda name, inputs: calls.update([name])):
        walk.forward(walk.probe)
    return calls


def _passes(walk: Walk, calls: Counter[str]) -> Iterator[tuple[str, Forward]]:
    """Each layer in the order of ``calls``, with the shortest forward pass that reaches it.

    The consumer sets the layer's statistics before it asks for the next one.
    """

    def run_model(i: int) -> None:
        walk.forward(walk.batches[i])

    chained = same = False
    if "" not in walk.blocks and set(calls.values()) == {1}:  # a layer of several blocks cannot be seen in one of them
        chained, same = is_chain(walk.blocks, walk.forward, walk.probe)
    block_of = {name: walk.block_of(name) if chained else None for name in calls}
    inside = [name for name in calls if block_of[name] is not None]
    outside = [name for name in calls if block_of[name] is None]
    order = list(calls)
    # the blocks are called one after another, so that every other layer comes before all of them or after
    before = [name for name in outside if not inside or order.index(name) < order.index(inside[0])]
    for name in before:
        yield name, run_model
    if inside:
        for block, run_block in walk.block_passes(every_block=not same):
            for name in inside:
                if block_of[name] == block:
                    yield name, run_block
    for name in outside[len(before) :]:
        yield name, run_model


def _collect(name: str, norm: _BatchNorm, forward: Forward, batches: int, *, stop: bool) -> Tensor:
    """The moments [3, C] of the inputs of ``norm``: number of values, their sum, the sum of their squares; float64.

    Args:
        name: of the layer.
        norm: the layer.
        forward: runs a batch of that number through the layer.
        batches: number of batches.
        stop: end each forward pass there.
    """
    assert norm.running_mean is not None
    total = torch.zeros(3, norm.num_features, dtype=torch.float64, device=norm.running_mean.device)

    def add(_: str, inputs: Tensor) -> None:
        dims = [dim for dim in range(inputs.dim()) if dim != 1]  # the channels are the second dimension
        # centred sums in float32 are exact enough, and need no float64 copy of the activations
        variance, mean = (part.double() for part in torch.var_mean(inputs.float(), dims, correction=0))
        count = inputs.numel() // inputs.shape[1]
        total.add_(torch.stack([torch.ones_like(mean), mean, variance + mean.square()]), alpha=count)
        if stop:
            raise StopForward

    with watching_inputs({name: norm}, add):
        for i in range(batches):
            with suppress(StopForward):
                forward(i)
    return sum_over_ranks(total)


def _set_statistics(norm: _BatchNorm, moments: Tensor) -> str | None:
    """Write the running statistics that follow from ``moments`` [3, C]; returns what is unusual about them."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    values = int(moments[0, 0])
    if not bool(torch.isfinite(moments).all()):
        return "BatchNorm statistics kept: their calibration inputs hold NaN or infinite values"
    if values < 2:
        return "BatchNorm statistics kept: calibration has one value a channel, which has no variance"
    mean = moments[1] / values
    biased = (moments[2] / values - mean.square()).clamp(min=0)
    varies = biased > CONSTANT * mean.square()
    variance = torch.where(varies, biased * (values / (values - 1)), norm.running_var.double())
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    if values < FEW_VALUES:
        return f"BatchNorm statistics from only {values} values a channel. Use more calibration samples"
    return None
