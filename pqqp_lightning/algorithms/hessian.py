"""The layer-wise Hessian of SparseGPT and GPTQ, H = X^T X, and the factor of its inverse that both sweep with.

Damping is relative to the mean diagonal, so a common scale of H changes neither method, and the sum over tokens is
used as it is, without the papers' factor 2 / n. (With dead inputs the scale shows: their 1 enters that mean.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PANEL = 512
"""Columns a panel: the lower half of the symmetric product is mirrored, not computed (67% of the work at I = 1536)."""


def add_gram(total: Tensor, inputs: Tensor) -> None:
    """Add X^T X of ``inputs`` [T, I] to the upper triangle (in panels) of ``total`` [I, I], float32, in place."""
    x = inputs.to(total.dtype)
    width = x.shape[-1]
    for start in range(0, width, PANEL):
        stop = min(start + PANEL, width)
        total[:stop, start:stop].addmm_(x[:, :stop].T, x[:, start:stop])


def complete(total: Tensor) -> None:
    """Make ``total`` the full symmetric matrix from the upper triangle that :func:`add_gram` fills, in place."""
    total.triu_().add_(total.triu(1).mT)


@dataclass(frozen=True)
class InverseFactor:
    """Upper Cholesky factor U of the damped inverse Hessian, H^-1 = U^T U.

    Attributes:
        factor: U [I, I], float32.
        dead: bool [I], input features that were zero on every calibration token.
        damping: the damping that was used; above the one asked for where the matrix was too ill-conditioned.
        order: [I], the column that comes up at each turn; None for the columns' own order. U and ``dead`` follow it.
    """

    factor: Tensor
    dead: Tensor
    damping: float
    order: Tensor | None = None


def factorize_inverse(hessian: Tensor, damping: float, *, activation_order: bool = False) -> InverseFactor:
    """Factorize the inverse of ``hessian`` [I, I] + damping * mean(diagonal).

    With ``activation_order`` the columns come up by descending diagonal (GPTQ code).

    Dead features get 1 on the diagonal before damping (SparseGPT and GPTQ code). U comes from one Cholesky
    factorization in reversed column order and one triangular inverse, half the work of inverting H and factorizing
    again. If float32 cannot factorize the matrix, damping grows tenfold, up to 1; the caller records it.

    Raises:
        ArithmeticError: the Hessian has NaN or infinite entries, or stays indefinite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ArithmeticError("its calibration inputs hold NaN or infinite values")
    order = hessian.diagonal().argsort(descending=True, stable=True) if activation_order else None
    h = hessian.float().clone() if order is None else hessian.float()[order][:, order]
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    mean = h.diagonal().mean()
    used, added = damping, 0.0
    while True:
        h.diagonal().add_((used - added) * mean)
        added = used
        reversed_factor, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
        if not bool(failed):
            break
        if used >= 1.0:
            raise ArithmeticError("its Hessian is not positive definite even with damping 1")
        used = min(1.0, max(used, 1e-6) * 10)
    del h
    upper = reversed_factor.flip(0, 1)  # R with H = R R^T, upper triangular
    del reversed_factor
    identity = torch.eye(upper.shape[0], dtype=upper.dtype, device=upper.device)
    return InverseFactor(torch.linalg.solve_triangular(upper, identity, upper=True), dead, used, order)
