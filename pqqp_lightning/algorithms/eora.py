"""EoRA: the best correction of low rank for a compressed layer's outputs (Liu et al., arXiv 2410.21271).

With the error E = W - V of the compressed weights V and H = X^T X = Q L Q^T, the paper takes the r largest singular
values of E Q L^1/2 = U S Y^T, and B = U S, A = Y^T L^-1/2 Q^T. Then B A = U U^T E: the same correction, computed here
without L^-1/2, which a singular H does not have. U holds the first eigenvectors of E H E^T.
"""

from __future__ import annotations

import torch
from torch import Tensor


def correct_low_rank(error: Tensor, hessian: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The A [r, I] and B [O, r], float32, whose product B A minimizes tr((E - B A) H (E - B A)^T).

    B has orthonormal columns; a rank above those of the error leaves rows of A near zero.

    Args:
        error: E [O, I], what the compressed weights lack.
        hessian: H [I, I], positive definite (:func:`~pqqp_lightning.algorithms.polish.damped_hessian`).
        rank: r, at most min(O, I).

    Raises:
        ArithmeticError: the Hessian cannot be factorized, or the eigenvalues do not converge.
    """
    e = error.float()
    rows, columns = e.shape
    try:
        if rows <= columns:
            b = _leading(e @ hessian @ e.T, rank)
        else:  # the smaller product has the same eigenvalues
            image = e @ torch.linalg.cholesky(hessian)  # [O, I]
            b = torch.linalg.qr(image @ _leading(image.T @ image, rank)).Q
    except torch.linalg.LinAlgError as error_of_torch:
        raise ArithmeticError("its Hessian is too ill-conditioned for a low-rank correction") from error_of_torch
    return b.T @ e, b


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the ``rank`` largest eigenvalues of a symmetric ``matrix``, in columns."""
    return torch.linalg.eigh((matrix + matrix.T) / 2).eigenvectors[:, -rank:]
