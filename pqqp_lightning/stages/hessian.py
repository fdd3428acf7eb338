"""What the stages that use the layer-wise Hessian share: the checks of its knobs, and its factorization."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from pqqp_lightning.algorithms.hessian import InverseFactor, factorize_inverse
from pqqp_lightning.errors import Problem
from pqqp_lightning.stages.stage import Context


def check_hessian_knobs(block_size: int, damping: float) -> list[Problem]:
    """Problems with ``block_size`` and ``damping``."""
    problems = []
    if block_size < 1:
        problems.append(Problem("block_size", block_size, "is not above 0", "The papers use 128."))
    if not 0 <= damping <= 1:
        problems.append(Problem("damping", damping, "is not in [0, 1]", "The papers use 0.01."))
    return problems


def factorize(
    hessians: Iterable[Tensor],
    damping: float,
    layers: Iterable[str],
    context: Context,
    *,
    activation_order: bool = False,
) -> list[InverseFactor]:
    """The factorized inverse of each row group's Hessian [I, I]; what was unusual is noted.

    Raises:
        ArithmeticError: a Hessian cannot be factorized.
    """
    inverses = [factorize_inverse(h, damping, activation_order=activation_order) for h in hessians]
    if any(bool(inverse.dead.any()) for inverse in inverses):
        context.found("some inputs are always zero; their weights became zero", layers)
    if (used := max(inverse.damping for inverse in inverses)) > damping:
        context.found(f"damping raised to {used:g}, the Hessian is ill-conditioned", layers)
    return inverses
