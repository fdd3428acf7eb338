"""Interference of two compression methods: mixed quantization units, and whether errors add up.

Kim et al. (arXiv 2603.18426) explain the order of compression layer by layer. For a layer with dense outputs Y and
outputs f(Y) after compression f, the relative error is ``e_f = ||f(Y) - Y||^2 / ||Y||^2``. Interference is the error
of two methods together beyond the sum of their errors: ``Delta = e_{P then Q} - (e_P + e_Q)``.

Their theorems assume that each quantization unit (the weights of one scale) is touched by one method only ("disjoint
selectivity"), and that the layers' errors are independent and therefore add up. This module measures both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Additivity:
    """Whether errors add up.

    Attributes:
        ratio: ``||d||^2 / sum_k ||d_k||^2`` of the change d by all parts and the changes d_k by one part each; 1 if the
            parts' errors are independent and do not amplify each other.
        cosine: mean absolute cosine between the changes of two parts; 0 if they are orthogonal.
        parts: number of parts that changed the output.
    """

    ratio: float
    cosine: float
    parts: int


def mixed_units(mask: Tensor, scales: torch.Size) -> tuple[int, int]:
    """Count the quantization units that pruning removed in part, and all units.

    Args:
        mask: bool [O, I], True where a weight is kept.
        scales: shape of the grid's scales, [O, G] or [1, 1]: G units per row, or the whole matrix as one unit.

    Returns:
        (mixed units, all units).
    """
    rows, columns = scales
    units = mask.view(rows, mask.shape[0] // rows, columns, -1).transpose(1, 2).flatten(2)  # [rows, G, entries]
    return int((units.any(dim=2) & ~units.all(dim=2)).sum()), rows * columns


def additivity(changes: Sequence[Tensor], whole: Tensor) -> Additivity | None:
    """Compare the changes by one part each with the change by all parts together.

    Args:
        changes: the change of one output by each part alone, each [N].
        whole: the change by all parts at once, [N].

    Returns:
        The comparison, or None if fewer than two parts change the output.
    """
    nonzero = [change for change in changes if bool(change.any())]
    if len(nonzero) < 2:
        return None
    stacked = torch.stack(nonzero).double()  # [K, N]
    gram = stacked @ stacked.T  # [K, K]
    squares = gram.diagonal()
    cosines = gram / torch.outer(squares.sqrt(), squares.sqrt())
    pairs = len(stacked) * (len(stacked) - 1) / 2
    mean_cosine = cosines.abs().triu(diagonal=1).sum() / pairs
    ratio = whole.double().square().sum() / squares.sum()
    return Additivity(float(ratio), float(mean_cosine), len(stacked))
