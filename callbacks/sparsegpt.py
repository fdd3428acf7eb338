"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pqqp_lightning.algorithms.hessian import InverseFactor
from pqqp_lightning.algorithms.sparsegpt import prune_sparsegpt_together
from pqqp_lightning.stages import (
    Compressed,
    Found,
    Hessian,
    LayerInputs,
    OneShotPruning,
    Problem,
    check_hessian_arguments,
    equal_runs,
    factorize,
)


class SparseGPT(OneShotPruning):
    """Removes weights and updates the kept ones so that each layer's outputs on the calibration data change least.

    On a quantized layer, the kept weights stay on their grid.

    Example::

        stages:
          prune: {class_path: SparseGPT, init_args: {sparsity: 0.5}}

    Args:
        sparsity: fraction of the weights to remove, in (0, 1); or name pattern to fraction.
        pattern: "N:M" instead: N kept of every M consecutive inputs.
        allocation: "uniform", or "sensitivity" for each layer's own sparsity, by its estimated effect on the loss.
        block_size: columns for which the mask is chosen together.
        damping: fraction of the Hessian's mean diagonal that is added to it; more is steadier and less exact.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Frantar & Alistarh 2023, SparseGPT, arXiv 2301.00774"
    statistic = Hessian
    compared_within = "matrix"

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        pattern: str | int | dict[str, str | int] | None = None,
        block_size: int = 128,
        damping: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(sparsity, pattern, **kwargs)
        self.block_size, self.damping = block_size, damping

    def check_arguments(self) -> list[Problem]:
        return super().check_arguments() + check_hessian_arguments(self.block_size, self.damping)

    def prepare(self, statistic: Tensor, found: Found) -> Sequence[InverseFactor]:
        return factorize(statistic, self.damping, found)

    def scores(self, weight: Tensor, statistic: InverseFactor) -> Tensor:
        return (weight / statistic.factor.diagonal()).square()

    def compress_layer(self, inputs: LayerInputs) -> Compressed:
        return self.compress_together([inputs])[0]

    def compress_together(self, inputs: Sequence[LayerInputs]) -> list[Compressed]:
        compressed = []
        for batch in equal_runs(inputs, self._sweep_options):
            amount = self.amount(batch[0].name)
            pruned = prune_sparsegpt_together(
                [one.weight for one in batch],
                batch[0].statistic,
                [one.mask for one in batch],
                [one.grid for one in batch],
                block_size=self.block_size,
                **amount,
            )
            compressed += [Compressed(p.weight, mask=p.mask, pattern=amount.get("pattern")) for p in pruned]
        return compressed

    def _sweep_options(self, inputs: LayerInputs) -> list[Any]:
        """What matrices that are swept together have in common."""
        grid = inputs.grid
        levels = None if grid is None else (grid.bits, grid.codebook, grid.group_size, grid.zero is None)
        return [self.amount(inputs.name), levels]
