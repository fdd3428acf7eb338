"""Basis Sharing: one basis for the weights of several layers (Wang et al., arXiv 2410.03765, sections 3.1 and 3.2).

Layers i = 1..n with inputs X_i and weights W_i [O_i, I] become y = (x B^T) C_i^T with one basis B [k, I] and each its
own coefficients C_i [O_i, k]. With W [N, I] the weights one below another and G = sum_i X_i^T X_i = L L^T, the product
that minimises tr((W - CB) G (W - CB)^T) is the truncated singular value decomposition of W L (the paper's S W).
For n = 1 that is the whitened decomposition of a single layer (SVD-LLM, arXiv 2403.07378).

Differs from the published code in how it is computed: the singular vectors of the smaller side come from the
eigendecomposition of a Gram matrix in float64, and where the rows are fewer than the inputs nothing is inverted, since
then C = P and B = P^T W for the leading left singular vectors P. As in the paper the coefficients' columns have norm 1
and the singular values sit in the basis, one in each row, where a quantizer's scale of that row takes them up.
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
        damping: the damping that was used; above the one asked for where the matrix was too ill-conditioned.
        dead: bool [I], input features that were zero on every calibration token.
    """

    basis: Tensor
    coefficients: tuple[Tensor, ...]
    damping: float
    dead: Tensor


def rank_for(ratio: float, columns: int, rows: int) -> int:
    """The largest rank k whose factors, k * (I + N) entries, are at most 1 - ratio of the N * I dense entries.

    Args:
        ratio: the share of the parameters to save, in (0, 1).
        columns: I, the inputs that the layers have in common.
        rows: N, the outputs of all the layers that share a basis.
    """
    return int((1 - ratio) * (columns * rows) / (columns + rows) + 1e-9)


def share_basis(weights: list[Tensor], gram: Tensor, rank: int, *, damping: float = 1e-4) -> SharedBasis:
    """The factors of ``rank`` that change the layers' outputs least on the calibration inputs.

    Args:
        weights: W_i [O_i, I].
        gram: G [I, I], the sum of the layers' X_i^T X_i.
        rank: k, at most min(I, N).
        damping: fraction of G's mean diagonal added to its diagonal; it weighs directions that no input took. Where
            float64 cannot factorize G it grows tenfold, up to 1.

    Raises:
        ArithmeticError: G or a weight has NaN or infinite entries, or G stays indefinite.
        ValueError: ``rank`` is not in 1..min(I, N).
    """
    w = torch.cat(weights).double()  # [N, I]
    most = min(w.shape)
    if not 1 <= rank <= most:
        raise ValueError(f"Expected `rank` to be in 1..{most}, but got {rank}.")
    if not bool(torch.isfinite(gram).all() and torch.isfinite(w).all()):
        raise ArithmeticError("its calibration inputs or its weights hold NaN or infinite values")
    g = gram.double()
    dead = g.diagonal() == 0
    factor, used = _factorize(g, damping)
    b, c = _few_rows(w, factor, rank) if w.shape[0] <= w.shape[1] else _many_rows(w, factor, rank)
    dtype = weights[0].dtype
    parts = c.to(dtype).split([len(weight) for weight in weights])
    return SharedBasis(b.to(dtype), tuple(part.contiguous() for part in parts), used, dead)


def _few_rows(w: Tensor, factor: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B [k, I], C [N, k]) for N <= I: the projection P P^T W."""
    whitened = w @ factor  # [N, I]
    leading = _leading(whitened @ whitened.T, rank)  # P [N, k]
    return leading.T @ w, leading


def _many_rows(w: Tensor, factor: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B [k, I], C [N, k]) for N > I: W L Q Q^T L^-1."""
    whitened = w @ factor  # [N, I]
    leading = _leading(whitened.T @ whitened, rank)  # Q [I, k]
    coefficients = whitened @ leading  # P Sigma [N, k]
    values = torch.linalg.vector_norm(coefficients, dim=0)
    values = values.clamp_min(torch.finfo(values.dtype).eps * values.max()).masked_fill_(values == 0, 1.0)
    basis = torch.linalg.solve_triangular(factor.T, leading, upper=True).T  # Q^T L^-1 [k, I]
    return basis * values[:, None], coefficients / values


def _leading(symmetric: Tensor, count: int) -> Tensor:
    """The eigenvectors [.., count] of the largest eigenvalues, the largest first."""
    return torch.linalg.eigh(symmetric).eigenvectors[:, -count:].flip(1)


def _factorize(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """(L [I, I] with L L^T = G + damping * mean(diagonal), the damping used), float64.

    Raises:
        ArithmeticError: G stays indefinite.
    """
    mean, used = gram.diagonal().mean(), damping
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
