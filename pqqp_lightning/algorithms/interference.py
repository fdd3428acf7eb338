"""What two compressions do to each other: errors of a layer's outputs, mixed quantization units, sums of errors.

Kim et al. (arXiv 2603.18426) explain the order of compression layer by layer. For a layer with dense outputs Y and
outputs f(Y) after compression f, the relative error is ``e_f = ||f(Y) - Y||^2 / ||Y||^2``. Interference is what two
methods cost together beyond their sum, ``Delta = e_{P then Q} - (e_P + e_Q)``. Their theorems assume that every
quantization unit (the weights of one scale) is touched by one method only, "disjoint selectivity", and that the
layers' errors are independent, so that they add up: both are measured here instead.
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
        ratio: ``||d||^2 / sum_k ||d_k||^2`` of the whole change d and the changes d_k by one part each; 1 if the parts'
            errors are independent and none is amplified by the others.
        cosine: mean absolute cosine between the changes of two parts; 0 if they are orthogonal.
        parts: how many parts changed anything.
    """

    ratio: float
    cosine: float
    parts: int


def mixed_units(mask: Tensor, scales: torch.Size) -> tuple[int, int]:
    """Quantization units of which pruning took a part, and all units.

    Args:
        mask: bool [O, I], True where a weight is kept.
        scales: shape of the grid's scales, [O, G] or [1, 1]: G units a row, or the whole matrix as one.
    """
    rows, columns = scales
    units = mask.view(rows, mask.shape[0] // rows, columns, -1).transpose(1, 2).flatten(2)  # [rows, G, entries]
    return int((units.any(dim=2) & ~units.all(dim=2)).sum()), rows * columns


def additivity(changes: Sequence[Tensor], whole: Tensor) -> Additivity | None:
    """How the changes by one part each relate to that of all parts together; None if fewer than two change anything.

    Args:
        changes: of an output, each [N].
        whole: the change by all parts at once, [N].
    """
    moving = [change for change in changes if bool(change.any())]
    if len(moving) < 2:
        return None
    moved = torch.stack(moving).double()
    gram = moved @ moved.T
    squares = gram.diagonal()
    cosines = gram / torch.outer(squares.sqrt(), squares.sqrt())
    pairs = cosines.abs().triu(diagonal=1).sum() / (len(moved) * (len(moved) - 1) / 2)
    return Additivity(float(whole.double().square().sum() / squares.sum()), float(pairs), len(moved))
