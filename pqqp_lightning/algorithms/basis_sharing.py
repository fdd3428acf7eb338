"""Basis Sharing: one basis for the weights of several layers (Wang et al., arXiv 2410.03765, sections 3.1 and 3.2).

Layers i = 1..n with inputs X_i and weights W_i [O_i, I] become y = (x B^T) C_i^T. They share the basis B [k, I]; each
has its own coefficients C_i [O_i, k]. Let W [N, I] be the stacked weights and G = sum_i X_i^T X_i = L L^T. The product
CB that minimizes tr((W - CB) G (W - CB)^T) comes from the truncated singular value decomposition of W L (the paper's
S W). For n = 1 this is the whitened decomposition of a single layer (SVD-LLM, arXiv 2403.07378).

Differs from the published code in the computation. The singular vectors of the smaller side come from the
eigendecomposition of a Gram matrix in float64. With fewer rows than inputs nothing is inverted, since then C = P and
B = P^T W for the leading left singular vectors P. As in the paper the coefficients' columns have norm 1. The rows of
the basis carry the singular values, so that a quantizer's scale per row absorbs them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedBasis:
    """The factors of several layers, in the layout of Linear weights.

    Attributes:
        basis: B [k, I].
        coefficients: C_i [O_i, k] of each layer.
        damping: the damping used; larger than requested if the matrix was too ill-conditioned.
        dead: bool [I], input features that were zero on every calibration token.
    """

    basis: Tensor
    coefficients: tuple[Tensor, ...]
    damping: float
    dead: Tensor


def rank_for(ratio: float, columns: int, rows: int) -> int:
    """Return the largest rank k whose factors, k * (I + N) entries, are at most 1 - ratio of the N * I dense entries.

    Args:
        ratio: the share of the parameters to save, in (0, 1).
        columns: I, the inputs that the layers have in common.
        rows: N, the outputs of all the layers that share a basis.
    """
    return int((1 - ratio) * (columns * rows) / (columns + rows) + 1e-9)  # 1e-9: 1 - ratio may be rounded down


def share_basis(weights: list[Tensor], gram: Tensor, rank: int, *, damping: float = 1e-4) -> SharedBasis:
    """Compute the factors of ``rank`` that change the layers' outputs least on the calibration inputs.

    Args:
        weights: W_i [O_i, I].
        gram: G [I, I], the sum of the layers' X_i^T X_i.
        rank: k, at most min(I, N).
        damping: fraction of G's mean diagonal added to its diagonal, which gives weight to directions that no input
            took. It grows tenfold, up to 1, while float64 cannot factorize G.

    Raises:
        ArithmeticError: G or a weight has NaN or infinite entries, or G stays indefinite.
        ValueError: ``rank`` is not in 1..min(I, N).
    """
    w = torch.cat(weights).double()  # [N, I]
    largest_rank = min(w.shape)
    if not 1 <= rank <= largest_rank:
        raise ValueError(f"Expected `rank` to be in 1..{largest_rank}, but got {rank}.")
    if not bool(torch.isfinite(gram).all() and torch.isfinite(w).all()):
        raise ArithmeticError("its calibration inputs or its weights hold NaN or infinite values")
    g = gram.double()
    dead = g.diagonal() == 0
    factor, used_damping = _factorize(g, damping)
    if w.shape[0] <= w.shape[1]:
        basis, coefficients = _factors_of_few_rows(w, factor, rank)
    else:
        basis, coefficients = _factors_of_many_rows(w, factor, rank)
    dtype = weights[0].dtype
    parts = coefficients.to(dtype).split([len(weight) for weight in weights])
    return SharedBasis(basis.to(dtype), tuple(part.contiguous() for part in parts), used_damping, dead)


def _factors_of_few_rows(w: Tensor, factor: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B [k, I], C [N, k]) for N <= I: the projection P P^T W."""
    whitened = w @ factor  # [N, I]
    left_vectors = _leading_eigenvectors(whitened @ whitened.T, rank)  # P [N, k]
    return left_vectors.T @ w, left_vectors


def _factors_of_many_rows(w: Tensor, factor: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B [k, I], C [N, k]) for N > I: W L Q Q^T L^-1."""
    whitened = w @ factor  # [N, I]
    right_vectors = _leading_eigenvectors(whitened.T @ whitened, rank)  # Q [I, k]
    coefficients = whitened @ right_vectors  # P Sigma [N, k]
    values = torch.linalg.vector_norm(coefficients, dim=0)
    # Singular values at the level of rounding are noise: a floor keeps the division below from blowing it up.
    values = values.clamp_min(torch.finfo(values.dtype).eps * values.max()).masked_fill_(values == 0, 1.0)
    basis = torch.linalg.solve_triangular(factor.T, right_vectors, upper=True).T  # Q^T L^-1 [k, I]
    return basis * values[:, None], coefficients / values


def _leading_eigenvectors(symmetric: Tensor, count: int) -> Tensor:
    """The eigenvectors [.., count] of the largest eigenvalues, the largest first."""
    return torch.linalg.eigh(symmetric).eigenvectors[:, -count:].flip(1)  # eigh sorts ascending


def _factorize(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """Factorize G + damping * mean(diagonal) = L L^T in float64.

    Returns:
        L [I, I], and the damping used.

    Raises:
        ArithmeticError: G stays indefinite.
    """
    mean = gram.diagonal().mean()
    used = damping
    if not bool(mean > 0):
        raise ArithmeticError("its calibration inputs are all zero")
    while True:
        damped = gram + used * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            return factor, used
        if used >= 1.0:
            raise ArithmeticError("its Gram matrix is not positive definite even with damping 1")
        used = min(1.0, max(used, 1e-9) * 10)
