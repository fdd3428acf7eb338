"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from pqqp_lightning.algorithms.hessian import factorize_inverse
from pqqp_lightning.algorithms.sparsegpt import prune_sparsegpt
from pqqp_lightning.calibration.collect import Reading
from pqqp_lightning.calibration.statistics import Hessian
from pqqp_lightning.errors import Problem
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.layers import Layer, groups_of, row_groups, weight_matrix
from pqqp_lightning.stages.hessian import check_hessian_knobs, factorize
from pqqp_lightning.stages.sparsity_by_layer import OneShotPruning
from pqqp_lightning.stages.stage import Context, Plan


class SparseGPT(OneShotPruning):
    """Removes weights and updates the kept ones so that each layer's outputs on the calibration data change least.

    On layers that are quantized already, the kept weights stay on their grid.

    Example::

        stages:
          prune: {class_path: SparseGPT, init_args: {sparsity: 0.5}}

    Args:
        sparsity: fraction of the weights to remove, in (0, 1); or name pattern to fraction.
        pattern: "N:M" instead: N kept of every M consecutive inputs.
        allocation: "uniform", or "sensitivity" for each layer's own sparsity, by its estimated effect on the loss.
        block_size: columns for which the mask is chosen at a time.
        damping: fraction of the Hessian's mean diagonal that is added to it; more is steadier and less exact.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Frantar & Alistarh 2023, SparseGPT, arXiv 2301.00774"
    needs_calibration = True

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

    def check_knobs(self) -> list[Problem]:
        return super().check_knobs() + check_hessian_knobs(self.block_size, self.damping)

    def trial_scores(self, matrix: Tensor, hessians: Tensor) -> Tensor:
        factors = [factorize_inverse(hessian, self.damping).factor for hessian in hessians]
        scale = torch.stack([factor.diagonal() for factor in factors])  # [groups, I]
        return (matrix / scale.repeat_interleave(len(matrix) // len(scale), dim=0)).square()

    def parts(self, layer: Layer) -> int:
        return groups_of(layer)

    def compress(self, model: LightningModule, context: Context) -> Plan:
        def prune(reading: Reading) -> None:
            inverses = factorize(reading.statistic.value(), self.damping, reading.layers, context)
            for name, layer in reading.layers.items():
                constraints, matrix, amount = constraints_of(layer), weight_matrix(layer), self.amount(name)
                grid = constraints.grid
                grids = [None] * len(inverses) if grid is None else grid.to(matrix.device).chunk(len(inverses))
                rows = row_groups(matrix, constraints.mask(matrix.device), groups=len(inverses))
                parts = [
                    prune_sparsegpt(w, inverse, mask=m, grid=g, block_size=self.block_size, **amount)
                    for inverse, (w, m), g in zip(inverses, rows, grids, strict=True)
                ]
                pruned, mask = (torch.cat([getattr(p, part) for p in parts]) for part in ("weight", "mask"))
                self.write_mask(layer, pruned, mask, amount.get("pattern"))

        layers = self.find_layers(model)
        self.spread(model, layers, context)
        context.calibrate(self.find_blocks(model), layers, Hessian, prune)
        return {}
