"""ALPS: the mask by ADMM on the layer's squared output error (Meng et al., NeurIPS 2024, arXiv 2406.07831).

Section 3.2 (Algorithm 1) splits the problem "least error with k entries" into weights U that are free and weights
D that are sparse, which a penalty rho and multipliers V pull together. U solves (H + rho I) U = H W + rho D - V, D
keeps the best k entries of U + V / rho, and V grows by rho (U - D). rho rises slowly: a small one finds good
entries, a large one settles them. Inputs are scaled to a diagonal of 1 first, so that entries of different columns
compete on one scale. Section 3.3 (Algorithm 2) then solves for the kept entries by preconditioned conjugate
gradients.

The first rho, its growth, 300 iterations and a damping of 1% are those of the published code. Three details of
that code are left out: it ends the search after 30 iterations once less than 0.03% of the kept entries change
(here: none), it starts again with a fifth of rho if at most 0.5% change at first, which happens at low sparsity
only, and it stops the conjugate gradients after 10 iterations (here: 20).

Differs from the paper in that it keeps earlier constraints. Entries that an earlier mask removed stay removed and
count. On a quantized weight, coordinate descent over the levels of the stored grid takes the place of the
conjugate gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pqqp_lightning.algorithms.grid import Grid
from pqqp_lightning.algorithms.polish import damped_hessian, polish, refit
from pqqp_lightning.algorithms.selection import Pattern, keep_highest, removed_first
from pqqp_lightning.algorithms.sparsegpt import Pruned

FIRST_PENALTY = 0.1
"""rho at the start; the scaled Hessian has a diagonal of 1."""

PERIOD = 3
"""Iterations with one rho. The mask is compared with that of so many iterations before."""

GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""How much rho grows while at least this share of the kept entries changes in a period."""


@dataclass(frozen=True)
class Spectrum:
    """A damped Hessian, and the eigenvalues of its scaled form for all layers that share an input.

    Attributes:
        hessian: H [I, I], damped.
        dead: bool [I], input features that were zero on every calibration token.
    """

    hessian: Tensor
    dead: Tensor

    @property
    def scale(self) -> Tensor:
        """The square root of H's diagonal [I]."""
        return self.hessian.diagonal().sqrt()

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [I] of H / (scale scale^T), and its eigenvectors [I, I] in columns.

        Raises:
            ArithmeticError: the decomposition does not converge.
        """
        scaled = self.hessian / torch.outer(self.scale, self.scale)
        try:
            values, vectors = torch.linalg.eigh(scaled)
        except torch.linalg.LinAlgError as error:
            raise ArithmeticError("the eigenvalues of its Hessian do not converge; raise damping") from error
        return values.clamp_(min=0), vectors  # rounding leaves those of a singular matrix slightly negative


def damp(hessian: Tensor, damping: float) -> Spectrum:
    """Damp ``hessian`` [I, I] by a fraction of its mean diagonal.

    Raises:
        ArithmeticError: NaN or infinite entries.
    """
    return Spectrum(damped_hessian(hessian, damping), hessian.diagonal() == 0)


def prune_alps(
    weight: Tensor,
    spectrum: Spectrum,
    *,
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    iterations: int = 300,
    mask: Tensor | None = None,
    grid: Grid | None = None,
) -> Pruned:
    """Choose a mask for ``weight`` [O, I] and the best kept entries on it.

    Args:
        weight: [O, I].
        spectrum: from :func:`damp`.
        sparsity: fraction to remove from the matrix.
        pattern: (N, M) instead of ``sparsity``.
        iterations: of ADMM, at most; it ends when the mask stops changing.
        mask: earlier keep-mask; entries that it removes stay removed and count.
        grid: earlier grid; every kept entry ends on it.
    """
    live = weight.float().masked_fill(spectrum.dead, 0.0)
    kept = choose_mask(live, spectrum, sparsity=sparsity, pattern=pattern, iterations=iterations, mask=mask)
    start = (live * kept).to(weight.dtype)  # on the grid still, since 0 is
    if grid is None:
        return Pruned(refit(start, live, spectrum.hessian, kept).weight, kept)
    return Pruned(polish(start, live, spectrum.hessian, grid, kept, scales=False).weight, kept)


def choose_mask(
    weight: Tensor,
    spectrum: Spectrum,
    *,
    sparsity: float | None,
    pattern: Pattern | None,
    iterations: int,
    mask: Tensor | None = None,
) -> Tensor:
    """The keep-mask [O, I] that ADMM settles on; see :func:`prune_alps` for the arguments."""
    values, vectors = spectrum.eigen
    target = weight * spectrum.scale  # W for inputs of norm 1
    penalty = FIRST_PENALTY
    compared = _above_threshold(target, sparsity, pattern, mask)
    sparse = target * compared  # D
    scaled = torch.zeros_like(target)  # V / rho
    for iteration in range(iterations):
        if iteration % PERIOD == 0:
            # One inverse for each rho halves the products of an iteration: U needs one instead of two.
            inverse = (vectors * (penalty / (values + penalty))) @ vectors.T
        # U = W + rho (H + rho I)^-1 (D - W - V / rho), which is the paper's update without the product H W
        shifted = torch.addmm(target, sparse - target - scaled, inverse).add_(scaled)  # U + V / rho
        kept = _above_threshold(shifted, sparsity, pattern, mask)
        sparse = shifted * kept
        scaled = shifted - sparse  # (V + rho (U - D)) / rho
        if iteration % PERIOD == PERIOD - 1:
            changed = int((kept != compared).sum())
            if not changed:
                break
            share = changed / max(1, int(kept.sum()))
            growth = next(growth for above, growth in GROWTH if share >= above)
            penalty *= growth
            scaled /= growth
            compared = kept
    return keep_highest(shifted.abs(), sparsity=sparsity, pattern=pattern, mask=mask, within="matrix")


def _above_threshold(values: Tensor, sparsity: float | None, pattern: Pattern | None, mask: Tensor | None) -> Tensor:
    """The entries of ``values`` [O, I] that :func:`keep_highest` keeps, without those that tie with the threshold.

    It is faster, and only the last mask has to be exact.
    """
    scores = removed_first(values.abs(), mask)
    if pattern is not None:
        grouped = scores.unflatten(-1, (-1, pattern[1]))  # [O, I / M, M]
        threshold = grouped.kthvalue(pattern[1] - pattern[0], dim=-1, keepdim=True).values
        return (grouped > threshold).flatten(-2)
    assert sparsity is not None
    count = round(sparsity * scores.numel())
    return scores > scores.flatten().kthvalue(count).values if count else scores >= 0
