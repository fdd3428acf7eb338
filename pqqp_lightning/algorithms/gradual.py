"""Gradual pruning: the sparsity grows along a cubic while the network trains (Zhu & Gupta, To prune, or not to prune,
arXiv 1710.01878, section 3, equation 1).

s(t) = s_f + (s_i - s_f) (1 - t / T)^3 for t = 0 .. T: fast at first, while much is redundant, and ever slower. As in
the paper the smallest magnitudes go, layer by layer; unlike in its code an entry that is gone stays gone. N:M
patterns are not in the paper: here the same cubic counts the entries removed, and they are taken from those that the
pattern would remove, the smallest of the matrix first, so that it ends in the pattern.
"""

from __future__ import annotations

from torch import Tensor

from pqqp_lightning.algorithms.selection import Pattern, keep_by_pattern, keep_by_score


def cubic_sparsity(step: int, steps: int, *, initial: float, final: float) -> float:
    """s(step): from ``initial`` at step 0 to ``final`` at ``steps`` and ever after."""
    left = 1.0 - min(1.0, max(0.0, step / steps)) if steps > 0 else 0.0
    return final + (initial - final) * left**3


def grow_mask(weight: Tensor, *, sparsity: float, pattern: Pattern | None = None, mask: Tensor | None = None) -> Tensor:
    """Keep-mask [O, I] within ``mask`` that removes ``round(sparsity * entries)`` in all, the smallest weights first.

    Args:
        weight: [O, I].
        sparsity: fraction of the matrix removed, in [0, 1); what ``mask`` removes counts.
        pattern: (N, M) that the mask grows towards: no group of M columns loses more than M - N entries.
        mask: [O, I], the keep-mask so far.
    """
    scores = weight.float().abs()
    if pattern is not None:
        kept = keep_by_pattern(scores, pattern, mask)
        sparsity = min(sparsity, 1 - int(kept.sum()) / kept.numel())
        scores = scores.masked_fill(kept, float("inf"))
    flat_mask = None if mask is None else mask.reshape(1, -1)
    return keep_by_score(scores.reshape(1, -1), sparsity, flat_mask).view_as(weight)
