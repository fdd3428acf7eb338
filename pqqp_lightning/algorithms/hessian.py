"""The layer-wise Hessian of SparseGPT and GPTQ, H = X^T X, and the factor of its inverse that their sweep uses.

H is the sum over tokens, without the papers' factor 2 / n: damping is relative to the mean diagonal, so scaling H
changes neither method. (Dead inputs are the exception: their diagonal of 1 enters the mean.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PANEL = 192
"""Columns per panel on a CPU: the product is symmetric, so panels below the diagonal are mirrored instead of computed.

Narrower panels compute less and run slower: at 576 and 1536 columns this one takes 21% and 9% less than 512.
"""

GPU_PANEL = 512
"""The same for a GPU, which wide products keep busy."""

SOLVED_AT_ONCE = 128
"""Columns of a triangular matrix that are inverted at once; affects speed only."""


def add_gram(total: Tensor, inputs: Tensor) -> None:
    """Add X^T X of ``inputs`` [T, I] to the upper triangle (in panels) of ``total`` [I, I], float32, in place."""
    x = inputs.to(total.dtype)
    width = x.shape[-1]
    panel = PANEL if x.device.type == "cpu" else GPU_PANEL
    for start in range(0, width, panel):
        stop = min(start + panel, width)
        total[:stop, start:stop].addmm_(x[:, :stop].T, x[:, start:stop])


def mirror_upper_triangle(total: Tensor) -> None:
    """Make ``total`` [I, I] symmetric by copying the upper triangle, which :func:`add_gram` fills, in place."""
    total.triu_().add_(total.triu(1).mT)


@dataclass(frozen=True)
class InverseFactor:
    """Upper Cholesky factor U of the damped inverse Hessian, H^-1 = U^T U.

    Attributes:
        factor: U [I, I], float32.
        dead: bool [I], input features that were zero on every calibration token.
        damping: the damping used; larger than requested if the matrix was too ill-conditioned.
        order: [I], the column swept at each position; None for the original order. U and ``dead`` follow it.
    """

    factor: Tensor
    dead: Tensor
    damping: float
    order: Tensor | None = None


def factorize_inverse(hessian: Tensor, damping: float, *, activation_order: bool = False) -> InverseFactor:
    """Factorize the inverse of ``hessian`` [I, I] + damping * mean(diagonal).

    Dead features get 1 on the diagonal before damping (as in the SparseGPT and GPTQ code). U comes from one Cholesky
    factorization in reversed column order and one triangular inverse, half the work of inverting H and factorizing
    again. If float32 cannot factorize the matrix, damping grows tenfold, up to 1; the caller records it.

    Args:
        hessian: X^T X [I, I].
        damping: fraction of the mean diagonal.
        activation_order: sort the columns by descending diagonal (as in the GPTQ code).

    Raises:
        ArithmeticError: the Hessian has NaN or infinite entries, or stays indefinite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ArithmeticError("its calibration inputs hold NaN or infinite values")
    order = None
    h = hessian.float()
    if activation_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        h = h[order][:, order]
    else:
        h = h.clone()  # changed in place below
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    mean = h.diagonal().mean()
    used = damping
    added = 0.0  # what the diagonal holds already: a retry adds the difference only
    while True:
        h.diagonal().add_((used - added) * mean)
        added = used
        reversed_factor, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
        if not bool(failed):
            break
        if used >= 1.0:
            raise ArithmeticError("its Hessian is not positive definite even with damping 1")
        used = min(1.0, max(used, 1e-6) * 10)
    del h  # [I, I] matrices are large: free each one as early as possible
    upper = reversed_factor.flip(0, 1)  # R with H = R R^T, upper triangular
    del reversed_factor
    return InverseFactor(invert_upper(upper), dead, used, order)


def invert_upper(upper: Tensor) -> Tensor:
    """The inverse of the upper triangular ``upper`` [I, I].

    On a CPU by halves, [[A, B], [0, C]]^-1 = [[A^-1, -A^-1 B C^-1], [0, C^-1]]: two thirds of the operations of a solve
    with the identity, most of them in matrix products, in less than half of its time. On a GPU these could run in TF32.
    """
    if upper.device.type != "cpu":
        return _solve_for_identity(upper)
    inverse = torch.zeros_like(upper)
    _fill_inverse(inverse, upper)
    return inverse


def _fill_inverse(inverse: Tensor, upper: Tensor) -> None:
    """Write the inverse of ``upper`` into the upper triangle of ``inverse``."""
    half = len(upper) // 2
    if len(upper) <= SOLVED_AT_ONCE:
        inverse.copy_(_solve_for_identity(upper))
        return
    _fill_inverse(inverse[:half, :half], upper[:half, :half])
    _fill_inverse(inverse[half:, half:], upper[half:, half:])
    above = inverse[:half, :half] @ upper[:half, half:]
    torch.mm(above.neg_(), inverse[half:, half:], out=inverse[:half, half:])


def _solve_for_identity(upper: Tensor) -> Tensor:
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)
