"""GPTQ / OPTQ (Frantar et al., arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pqqp_lightning.algorithms.gptq import quantize_gptq_together
from pqqp_lightning.algorithms.hessian import InverseFactor
from pqqp_lightning.stages import (
    Compressed,
    Found,
    GroupSize,
    Hessian,
    LayerInputs,
    Problem,
    QuantizationStage,
    check_hessian_arguments,
    equal_runs,
    factorize,
)


class GPTQ(QuantizationStage):
    """Rounds weights column by column and feeds each rounding error to the columns after it.

    On a pruned layer, pruned weights stay zero and the kept weights compensate for their error.

    Example::

        stages:
          quantize: {class_path: GPTQ, init_args: {bits: 4, group_size: 64}}

    Args:
        bits: 2 to 8; or name pattern to bits.
        group_size: input columns that share a scale; "channel" for one scale an output channel, "tensor" for one in
            all; or name pattern to size.
        symmetric: without zero points; False for asymmetric grids.
        block_size: columns whose errors are passed on together; it affects speed only.
        damping: fraction of the Hessian's mean diagonal that is added to it; more is steadier and less exact.
        activation_order: quantize the columns with the largest inputs first; often a little better.
        clip: search the range of each scale for the smallest error in the layer's outputs; without it, scales span all
            weights as in the paper. It costs little time and helps most at few bits (docs/methods.md).
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Frantar et al. 2023, GPTQ (OPTQ), arXiv 2210.17323"
    statistic = Hessian

    def __init__(
        self,
        bits: int | dict[str, int] = 4,
        group_size: GroupSize | dict[str, GroupSize] = "channel",
        symmetric: bool = True,
        block_size: int = 128,
        damping: float = 0.01,
        activation_order: bool = False,
        clip: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(bits, group_size, symmetric, clip, **kwargs)
        self.block_size, self.damping, self.activation_order = block_size, damping, activation_order

    def check_arguments(self) -> list[Problem]:
        return super().check_arguments() + check_hessian_arguments(self.block_size, self.damping)

    def prepare(self, statistic: Tensor, found: Found) -> Sequence[InverseFactor]:
        return factorize(statistic, self.damping, found, activation_order=self.activation_order)

    def compress_layer(self, inputs: LayerInputs) -> Compressed:
        return self.compress_together([inputs])[0]

    def compress_together(self, inputs: Sequence[LayerInputs]) -> list[Compressed]:
        compressed = []
        for batch in equal_runs(inputs, lambda one: self.grid_options(one.name)):
            quantized = quantize_gptq_together(
                [one.weight for one in batch],
                batch[0].statistic,
                [one.mask for one in batch],
                block_size=self.block_size,
                **self.grid_options(batch[0].name),
            )
            compressed += [Compressed(q.weight, grid=q.grid) for q in quantized]
        return compressed
