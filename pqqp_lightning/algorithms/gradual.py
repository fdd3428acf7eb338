"""Gradual pruning: the sparsity grows along a cubic while the network trains (Zhu & Gupta, To prune, or not to prune,
arXiv 1710.01878, section 3, equation 1).

s(t) = s_f + (s_i - s_f) (1 - t / T)^3 for t = 0 .. T: fast at first, while many weights are redundant, then slower.
As in the paper, the smallest magnitudes of each layer are removed. Unlike in its code, a removed entry stays removed.

The paper has no N:M patterns. Here the same cubic gives the number of entries to remove. They are chosen among the
entries that the pattern removes, the smallest of the matrix first, so that the mask ends in the pattern.
"""

from __future__ import annotations

from torch import Tensor

from pqqp_lightning.algorithms.selection import Pattern, keep_by_pattern, keep_by_score


def cubic_sparsity(step: int, steps: int, *, initial: float, final: float) -> float:
    """Return the sparsity at ``step``: ``initial`` at step 0, ``final`` from ``steps`` on."""
    if steps <= 0:
        return final
    remaining = 1.0 - min(1.0, max(0.0, step / steps))  # 1 - t / T
    return final + (initial - final) * remaining**3


def grow_mask(weight: Tensor, *, sparsity: float, pattern: Pattern | None = None, mask: Tensor | None = None) -> Tensor:
    """Remove the smallest weights until ``round(sparsity * entries)`` entries are gone in total.

    Args:
        weight: [O, I].
        sparsity: fraction of the matrix to remove, in [0, 1); entries that ``mask`` removes count.
        pattern: (N, M) that the mask grows towards: no group of M columns loses more than M - N entries.
        mask: [O, I], the keep-mask so far.

    Returns:
        The keep-mask [O, I], which keeps nothing that ``mask`` removes.
    """
    scores = weight.float().abs()
    if pattern is not None:
        kept = keep_by_pattern(scores, pattern, mask)
        # Entries that the finished pattern keeps are never removed on the way to it.
        sparsity = min(sparsity, 1 - int(kept.sum()) / kept.numel())
        scores = scores.masked_fill(kept, float("inf"))
    flat_mask = None if mask is None else mask.reshape(1, -1)
    return keep_by_score(scores.reshape(1, -1), sparsity, flat_mask).view_as(weight)
