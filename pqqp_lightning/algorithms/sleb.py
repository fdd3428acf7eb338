"""SLEB: greedy removal of redundant transformer blocks (Song et al. 2024, arXiv 2402.09025, section 3.3, algorithm 1).

In each round the unit (a block, or an attention or MLP sublayer) goes without which the calibration loss of the model
as pruned so far is lowest. The paper runs the whole model for every candidate; here candidates share the activations
of the blocks before them, which changes no loss and halves the work: see :func:`count_evaluations`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Losses = Callable[[list[int], list[int]], Sequence[float]]
"""(removed, left) to the loss for each of ``left``: that of the model without ``removed`` and that one."""


@dataclass(frozen=True)
class Removal:
    """One round's choice.

    Attributes:
        unit: its number among the candidates.
        loss: of the model without it and without those removed before.
        refused: candidates whose loss was NaN or infinite.
    """

    unit: int
    loss: float
    refused: tuple[int, ...] = ()


def remove_greedily(amount: int, candidates: int, losses: Losses) -> list[Removal]:
    """Remove ``amount`` of ``candidates`` units one at a time, each time the one that leaves the lowest loss.

    Of equal losses the first unit's wins. A loss that is NaN or infinite never wins.

    Raises:
        ValueError: ``amount`` is not between 1 and ``candidates``.
        ArithmeticError: no candidate of a round has a finite loss.
    """
    if not 1 <= amount <= candidates:
        raise ValueError(f"Expected `amount` to be between 1 and {candidates}, but got {amount}")
    left = list(range(candidates))
    removals: list[Removal] = []
    for _ in range(amount):
        found = dict(zip(left, losses([r.unit for r in removals], list(left)), strict=True))
        finite = [unit for unit in left if math.isfinite(found[unit])]
        if not finite:
            raise ArithmeticError("the loss is NaN or infinite without any of the candidates")
        best = min(finite, key=found.__getitem__)
        removals.append(Removal(best, found[best], tuple(unit for unit in left if unit not in finite)))
        left.remove(best)
    return removals


def count_evaluations(units: Sequence[int], candidates: Sequence[int], *, shared: bool = True) -> int:
    """Units that one round evaluates for one batch.

    With L blocks, each of them one unit and a candidate, it is L(L-1)/2 to finish every candidate's forward pass from
    the block behind it, and L-1 to carry the common prefix on: near half of the L(L-1) of whole forward passes.

    Args:
        units: how many units each block has left.
        candidates: for each candidate, the position of its block.
        shared: whether candidates share the blocks before them; else each is a whole forward pass.
    """
    if not shared:
        return len(candidates) * (sum(units) - 1)
    suffixes = sum(sum(units[block:]) - 1 for block in candidates)
    return suffixes + sum(units[: max(candidates, default=0)])
