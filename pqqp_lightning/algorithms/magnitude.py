"""Magnitude pruning: remove the smallest weights (Han et al., Learning both Weights and Connections, NeurIPS 2015).

The threshold is per layer (one per matrix) or global (one for all matrices); N:M keeps the N largest of every M
consecutive columns of a row. Counts are exact: ``round(sparsity * entries)``.
"""

from __future__ import annotations

from torch import Tensor

from pqqp_lightning.algorithms.selection import Pattern, keep_across, keep_by_pattern, keep_by_score


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
    scores = weight.float().abs()
    if pattern is not None:
        return keep_by_pattern(scores, pattern, mask)
    assert sparsity is not None
    flat_mask = None if mask is None else mask.reshape(1, -1)
    return keep_by_score(scores.reshape(1, -1), sparsity, flat_mask).view_as(weight)


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
