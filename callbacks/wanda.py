"""Wanda (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

from torch import Tensor

from pqqp_lightning.algorithms.wanda import scores_wanda
from pqqp_lightning.stages import OneShotPruning, SquaredNorm


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
    statistic = SquaredNorm

    def scores(self, weight: Tensor, statistic: Tensor) -> Tensor:
        return scores_wanda(weight, statistic.sqrt())
