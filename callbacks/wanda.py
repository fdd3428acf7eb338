"""Wanda (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from pqqp_lightning.algorithms.wanda import prune_wanda
from pqqp_lightning.calibration.collect import Reading
from pqqp_lightning.calibration.statistics import SquaredNorm
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.layers import Layer, row_groups, weight_matrix
from pqqp_lightning.stages.sparsity_by_layer import OneShotPruning
from pqqp_lightning.stages.stage import Context, Plan


class Wanda(OneShotPruning):
    """Removes the weights with the smallest |weight| x input norm within each output row; no weight is updated.

    Example::

        stages:
          prune: {class_path: Wanda, init_args: {sparsity: 0.5}}

    Args:
        sparsity: fraction of each output row to remove, in (0, 1); or name pattern to fraction.
        pattern: "N:M" instead: N kept of every M consecutive inputs.
        allocation: "uniform", or "sensitivity" for each layer's own sparsity, by its estimated effect on the loss.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Sun et al. 2023, A Simple and Effective Pruning Approach for LLMs, arXiv 2306.11695"
    needs_calibration = True

    def trial_scores(self, matrix: Tensor, hessians: Tensor) -> Tensor:
        norms = hessians.diagonal(dim1=1, dim2=2).sqrt()  # [groups, I]
        return matrix.abs() * norms.repeat_interleave(len(matrix) // len(norms), dim=0)

    def parts(self, layer: Layer) -> int:
        return layer.weight.shape[0]

    def compress(self, model: LightningModule, context: Context) -> Plan:
        def prune(reading: Reading) -> None:
            norms = reading.statistic.value().sqrt()  # [groups, I]
            for name, layer in reading.layers.items():
                matrix, amount = weight_matrix(layer), self.amount(name)
                earlier = constraints_of(layer).mask(matrix.device)
                rows = row_groups(matrix, earlier, groups=len(norms))
                masks = [prune_wanda(w, norm, mask=m, **amount) for norm, (w, m) in zip(norms, rows, strict=True)]
                self.write_mask(layer, matrix, torch.cat(masks), amount.get("pattern"))

        layers = self.find_layers(model)
        self.spread(model, layers, context)
        context.calibrate(self.find_blocks(model), layers, SquaredNorm, prune)
        return {}
