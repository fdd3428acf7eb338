"""The checks of arguments and the factorization that stages with a layer-wise Hessian share."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from pqqp_lightning.algorithms.hessian import InverseFactor, factorize_inverse
from pqqp_lightning.errors import Problem
from pqqp_lightning.stages.layerwise import Found


def check_hessian_arguments(block_size: int, damping: float) -> list[Problem]:
    """Problems of ``block_size`` and ``damping``."""
    problems = []
    if block_size < 1:
        problems.append(Problem("block_size", block_size, "is not above 0", "The papers use 128."))
    if not 0 <= damping <= 1:
        problems.append(Problem("damping", damping, "is not in [0, 1]", "The papers use 0.01."))
    return problems


def factorize(
    hessians: Iterable[Tensor], damping: float, found: Found, *, activation_order: bool = False
) -> list[InverseFactor]:
    """The factorized inverse of each row group's Hessian [I, I].

    Args:
        hessians: one for each row group.
        damping: fraction of the mean diagonal to add; raised if the factorization needs more.
        found: called with anything unusual, for the record.
        activation_order: sort the columns by descending diagonal.

    Raises:
        ArithmeticError: a Hessian cannot be factorized.
    """
    inverses = [factorize_inverse(h, damping, activation_order=activation_order) for h in hessians]
    if any(bool(inverse.dead.any()) for inverse in inverses):
        found("some inputs are always zero; their weights became zero")
    if (used := max(inverse.damping for inverse in inverses)) > damping:
        found(f"damping raised to {used:g}, the Hessian is ill-conditioned")
    return inverses
