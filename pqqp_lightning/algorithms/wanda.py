"""Wanda: prune by weight times input norm (Sun et al., arXiv 2306.11695, section 3, equation 1).

Scores are compared within each output row. Weights are not updated.
"""

from __future__ import annotations

from torch import Tensor


def scores_wanda(weight: Tensor, column_norm: Tensor) -> Tensor:
    """``|W[o, i]| * ||X[:, i]||_2``: [O, I] from [O, I] and [I], in float32."""
    return weight.float().abs() * column_norm.float()
