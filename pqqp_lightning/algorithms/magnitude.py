"""Magnitude pruning: remove the smallest weights (Han et al., Learning both Weights and Connections, NeurIPS 2015).

The threshold is per layer (one per matrix) or global (one for all matrices); N:M keeps the N largest of every M
consecutive columns of a row. Counts are exact: ``round(sparsity * entries)``.
"""

from __future__ import annotations

from torch import Tensor

from pqqp_lightning.algorithms.selection import Pattern, keep_across, keep_highest


def prune_magnitude(
    weight: Tensor, *, sparsity: float | None = None, pattern: Pattern | None = None, mask: Tensor | None = None
) -> Tensor:
    """Compute the keep-mask [O, I] of the largest weights.

    Args:
        weight: [O, I].
        sparsity: fraction of the matrix to remove, in [0, 1).
        pattern: (N, M) instead of ``sparsity``.
        mask: [O, I], earlier keep-mask; entries that it removes stay removed and count.
    """
    return keep_highest(weight.float().abs(), sparsity=sparsity, pattern=pattern, mask=mask, within="matrix")


def prune_magnitude_global(
    weights: list[Tensor], *, sparsity: float, masks: list[Tensor | None] | None = None
) -> list[Tensor]:
    """Compute keep-masks with one threshold for all matrices.

    Args:
        weights: matrices [O, I].
        sparsity: fraction of all entries together to remove, in [0, 1).
        masks: earlier keep-mask of each matrix, or None; removed entries stay removed and count.
    """
    return keep_across(weights, sparsity, masks or [None] * len(weights))
