"""Adapters that correct what earlier stages did to their layers, without training (EoRA, arXiv 2410.21271)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule
from torch import Tensor

from pqqp_lightning.algorithms.eora import correct_low_rank
from pqqp_lightning.algorithms.polish import damped_hessian, objective
from pqqp_lightning.algorithms.rtn import quantize_rtn
from pqqp_lightning.calibration.collect import Reading
from pqqp_lightning.calibration.statistics import Hessian
from pqqp_lightning.network.blocks import Blocks
from pqqp_lightning.network.layers import Layer, weight_matrix
from pqqp_lightning.stages.dense_target import describe_gain
from pqqp_lightning.stages.layerwise import Compressed, write_back
from pqqp_lightning.stages.stage import Context
from pqqp_lightning.surgery.adapters import Adapters, base_of, set_factors, update_of, wrapper_of

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

DAMPING = 0.01
"""Fraction of the Hessian's mean diagonal that is added to it, the default of the stages with a Hessian."""

GROUP = 64
"""Entries of A and B that share a scale; one scale for each row where it does not divide the row."""


def correct_outputs(
    model: LightningModule,
    layers: dict[str, Layer],
    blocks: Blocks,
    context: Context,
    adapters: Adapters,
    bits: int | None = None,
) -> None:
    """Set ``adapters`` to the correction of their rank that brings the layers' outputs nearest to the dense layers'.

    It goes block by block, so that a block's inputs come from corrected blocks.

    Args:
        model: has the adapters.
        layers: the layers below them, by name.
        blocks: to calibrate one by one.
        context: has the dense weights, and gets a note.
        adapters: change what the model computes by nothing yet.
        bits: round A and B to a grid of so many bits.
    """
    ratios: list[float] = []
    corrected: dict[str, Layer] = {}
    for name, layer in layers.items():
        if context.dense(layer) is None:
            context.found("left without a correction: the dense model has no such layer", [name])
        else:
            corrected[name] = layer

    def correct(reading: Reading) -> None:
        hessian = damped_hessian(reading.statistic.value()[0], DAMPING)
        for name, layer in reading.layers.items():
            dense = context.dense(layer)
            assert dense is not None
            wrapper = wrapper_of(name, model)
            present = _present(wrapper, adapters)
            _set_correction(wrapper, adapters, dense.float() - present, hessian, bits)
            before = objective(present, dense, hessian)
            if before > 0:
                ratios.append(objective(present + update_of(wrapper, adapters.name), dense, hessian) / before)

    def unreached(missed: dict[str, Layer]) -> None:
        context.found("left without a correction, since no calibration token reached it", missed)

    context.calibrate(blocks, corrected, Hessian, correct, unreached)
    context.notes += describe_gain(ratios, "earlier stages")


def _present(wrapper: LoraLayer, adapters: Adapters) -> Tensor:
    """The matrix [O, I] that a layer computes with: its weight and its other adapters, float32."""
    present = weight_matrix(base_of(wrapper)).float()
    for name in wrapper.active_adapters:
        if name != adapters.name:
            present = present + update_of(wrapper, name)
    return present


def _set_correction(wrapper: LoraLayer, adapters: Adapters, error: Tensor, hessian: Tensor, bits: int | None) -> None:
    """Set one layer's A and B to the correction of ``error`` [O, I], rounded to ``bits``."""
    for part in set_factors(wrapper, adapters.name, *correct_low_rank(error, hessian, adapters.rank)):
        if bits is not None:
            factor = weight_matrix(part)
            rounded = quantize_rtn(factor, bits=bits, group_size=None if factor.shape[1] % GROUP else GROUP)
            write_back(part, Compressed(rounded.weight, grid=rounded.grid))
