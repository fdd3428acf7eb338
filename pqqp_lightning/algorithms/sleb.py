"""SLEB: greedy removal of redundant transformer blocks (Song et al. 2024, arXiv 2402.09025, section 3.3, algorithm 1).

Each round removes the unit (a block, or an attention or MLP sublayer) whose removal gives the pruned model the lowest
calibration loss. The paper runs the whole model for every candidate. Here candidates share the activations of the
blocks before them, which gives the same losses for half the work: see :func:`count_evaluations`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Losses = Callable[[list[int], list[int]], Sequence[float]]
"""(removed, candidates) to one loss per candidate: that of the model without ``removed`` and that candidate."""


@dataclass(frozen=True)
class Removal:
    """One round's choice.

    Attributes:
        unit: index of the removed unit.
        loss: of the model without it and without the units removed before.
        refused: candidates whose loss was NaN or infinite.
    """

    unit: int
    loss: float
    refused: tuple[int, ...] = ()


def remove_greedily(amount: int, candidates: int, losses: Losses) -> list[Removal]:
    """Remove ``amount`` of ``candidates`` units one at a time, each time the one whose removal gives the lowest loss.

    On ties the first unit is removed. Units with a NaN or infinite loss are never removed.

    Args:
        amount: number of units to remove.
        candidates: number of units.
        losses: computes the losses of one round.

    Raises:
        ValueError: ``amount`` is not between 1 and ``candidates``.
        ArithmeticError: no candidate of a round has a finite loss.
    """
    if not 1 <= amount <= candidates:
        raise ValueError(f"Expected `amount` to be between 1 and {candidates}, but got {amount}")
    remaining = list(range(candidates))
    removals: list[Removal] = []
    for _ in range(amount):
        removed = [removal.unit for removal in removals]
        loss_without = dict(zip(remaining, losses(removed, list(remaining)), strict=True))
        finite = [unit for unit in remaining if math.isfinite(loss_without[unit])]
        if not finite:
            raise ArithmeticError("the loss is NaN or infinite without any of the candidates")
        best = min(finite, key=loss_without.__getitem__)
        refused = tuple(unit for unit in remaining if unit not in finite)
        removals.append(Removal(best, loss_without[best], refused))
        remaining.remove(best)
    return removals


def count_evaluations(units: Sequence[int], candidates: Sequence[int], *, shared: bool = True) -> int:
    """Count the unit evaluations of one round for one batch.

    With L blocks of one unit each, all of them candidates, it takes L(L-1)/2 evaluations to finish every candidate's
    forward pass behind its block, and L-1 to extend the common prefix: about half of the L(L-1) evaluations of whole
    forward passes.

    Args:
        units: number of units that each block still has.
        candidates: for each candidate, the position of its block.
        shared: whether candidates share the blocks before them; if not, each takes a whole forward pass.
    """
    if not shared:
        return len(candidates) * (sum(units) - 1)
    suffixes = sum(sum(units[block:]) - 1 for block in candidates)
    return suffixes + sum(units[: max(candidates, default=0)])
