"""Wanda: prune by weight times input norm (Sun et al., arXiv 2306.11695, section 3, equation 1).

The score of W[o, i] is |W[o, i]| * ||X[:, i]||_2, compared within each output row. Weights are not updated.
"""

from __future__ import annotations

from torch import Tensor

from pqqp_lightning.algorithms.selection import Pattern, keep_by_pattern, keep_by_score


def prune_wanda(
    weight: Tensor,
    column_norm: Tensor,
    *,
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Keep-mask [O, I]; ``round(sparsity * I)`` entries go in every row, or all but N in every M columns.

    Args:
        weight: [O, I].
        column_norm: [I], the l2 norm of each input feature over the calibration tokens.
        sparsity: fraction of each row to remove, in [0, 1).
        pattern: (N, M) instead of ``sparsity``.
        mask: [O, I], earlier keep-mask; its zeros stay removed and count.
    """
    scores = weight.float().abs() * column_norm.float()  # [O, I]
    if pattern is not None:
        return keep_by_pattern(scores, pattern, mask)
    assert sparsity is not None
    return keep_by_score(scores, sparsity, mask)
