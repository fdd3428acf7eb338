"""Layer-wise repair towards the dense weights: coordinate descent within a mask and a grid, and an exact refit.

Both minimize tr((V - W) H (V - W)^T), the squared error of the layer's outputs, over the weights V that keep the mask
and the grid; W are the dense weights and H = X^T X. On a grid, each entry in turn moves to its best level
(QuantEase, arXiv 2309.01885, Algorithm 1, here also within a mask), and each scale to its best value in closed form.
On a mask alone the problem is linear: conjugate gradients solve it for all rows at once.

Everything is held transposed, [I, O], so that a column of the weight is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pqqp_lightning.algorithms.grid import SMALLEST_HALF, Grid, encode, round_to_grid

BLOCK = 64
"""Columns whose changes are passed on to all other columns together; it affects speed only."""


@dataclass(frozen=True)
class Repaired:
    """Weights after a repair.

    Attributes:
        weight: [O, I], in the dtype of the input.
        grid: the grid of the weight, with its new scales; None without a grid.
        before: the objective of the weights that were given.
        after: of ``weight``; never above ``before``.
    """

    weight: Tensor
    grid: Grid | None
    before: float
    after: float


def damped_hessian(hessian: Tensor, damping: float) -> Tensor:
    """Return H + damping * mean(diagonal) * I; dead features get 1 on the diagonal first, as in GPTQ's code.

    Args:
        hessian: X^T X [I, I].
        damping: fraction of the mean diagonal.

    Raises:
        ArithmeticError: NaN or infinite entries.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ArithmeticError("its calibration inputs hold NaN or infinite values")
    h = hessian.float().clone()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal.add_(damping * diagonal.mean())
    return h


def dense_inputs_map(hessian: Tensor, damped: Tensor, cross: Tensor) -> Tensor:
    """Return M [I, I] such that the weights W M^T, on the inputs X, come nearest to W on other inputs Y.

    Least squares, ||X V^T - Y W^T||^2 + D ||V - W||^2 with the damping D: V^T = (H + D)^-1 (X^T Y + D) W^T. This is the
    target of GPTAQ (arXiv 2504.02692) and Qronos (arXiv 2505.11695), where Y are the inputs in the dense model.

    Args:
        hessian: H = X^T X [I, I].
        damped: H + D, from :func:`damped_hessian`.
        cross: X^T Y [I, I].

    Raises:
        ArithmeticError: H + D is not positive definite in float32.
    """
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        raise ArithmeticError("its Hessian is not positive definite; use more damping, or inputs: compressed")
    right = cross.clone()
    right.diagonal().add_(damped.diagonal() - hessian.diagonal())
    return torch.cholesky_solve(right, factor)


def objective(weight: Tensor, dense: Tensor, hessian: Tensor) -> float:
    """Return tr((V - W) H (V - W)^T) for V = ``weight`` and W = ``dense``, both [O, I]."""
    error = weight.float() - dense.float()
    return float(((error @ hessian) * error).sum(dtype=torch.float64))


def polish(
    weight: Tensor,
    dense: Tensor,
    hessian: Tensor,
    grid: Grid,
    mask: Tensor | None = None,
    *,
    passes: int = 4,
    scales: bool = True,
) -> Repaired:
    """Move ``weight`` towards ``dense`` on its grid, by coordinate descent over the columns.

    With R = (V - W) H, column j moves to mask_j * round_to_grid(v_j - R_j / H_jj), the best level of every entry, and
    R changes by the move times H_j. After each pass every scale s of codes c moves by -(c . R) / (c^T H c), where that
    lowers the objective. Zero points and codebooks stay.

    Args:
        weight: [O, I], on the grid and zero outside the mask.
        dense: W [O, I].
        hessian: H [I, I], positive diagonal (:func:`damped_hessian`).
        grid: of ``weight``.
        mask: keep-mask [O, I].
        passes: over all columns.
        scales: move the scales, too.
    """
    before = objective(weight, dense, hessian)
    state = _Descent(weight, dense, hessian, grid, mask)
    for _ in range(passes):
        state.move_entries()
        if scales:
            state.move_scales()
    # The stored weight is what its codes decode to in its dtype; only then is the objective the model's own.
    polished = round_to_grid(state.values().to(weight.dtype), state.grid)
    if mask is not None:
        polished = polished.masked_fill(~mask, 0.0)
    after = objective(polished, dense, hessian)
    if after >= before:  # rounding to a narrow dtype may cost more than the last passes gained
        return Repaired(weight, grid, before, before)
    return Repaired(polished, state.grid, before, after)


def refit(weight: Tensor, dense: Tensor, hessian: Tensor, mask: Tensor, *, iterations: int = 20) -> Repaired:
    """Refit the kept entries of ``weight`` on ``mask``: H_MM v_M = (W H)_M for every row M, by conjugate gradients.

    The rows are independent problems with one matrix H, so that an iteration is one product for all of them. The
    residual is masked and preconditioned by the diagonal of H.

    Args:
        weight: [O, I], zero outside the mask; where the search starts.
        dense: W [O, I].
        hessian: H [I, I], positive definite (:func:`damped_hessian`).
        mask: keep-mask [O, I].
        iterations: at most; rows that are solved stop changing.
    """
    before = objective(weight, dense, hessian)
    kept = mask.float()
    inverse_diagonal = hessian.diagonal().reciprocal()
    v = weight.float() * kept
    residual = ((dense.float() - v) @ hessian) * kept  # minus half of the gradient, on the kept entries
    direction = residual * inverse_diagonal
    energy = (residual * direction).sum(1, keepdim=True)  # [O, 1]
    for _ in range(iterations):
        image = (direction @ hessian) * kept
        step = _ratio(energy, (direction * image).sum(1, keepdim=True))
        v.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        preconditioned = residual * inverse_diagonal
        next_energy = (residual * preconditioned).sum(1, keepdim=True)
        direction = preconditioned + _ratio(next_energy, energy) * direction
        energy = next_energy
    refitted = v.to(weight.dtype)
    after = objective(refitted, dense, hessian)
    if after >= before:
        return Repaired(weight, None, before, before)
    return Repaired(refitted, None, before, after)


class _Descent:
    """The state of a coordinate descent: levels and scales, whose product are the weights, and R = (V - W) H."""

    def __init__(self, weight: Tensor, dense: Tensor, hessian: Tensor, grid: Grid, mask: Tensor | None) -> None:
        self.grid = grid
        self._hessian = hessian
        rows = weight.shape[0]
        self._mask = None if mask is None else mask.T.float().contiguous()  # [I, O]
        scale = grid.scale.float().T  # [G or 1, O or 1]
        self._scale = scale.expand(scale.shape[0], rows).contiguous()
        self._zero: Tensor | float = grid.middle
        if grid.zero is not None:
            self._zero = grid.zero.float().T.expand(-1, rows).contiguous()
        self._one = torch.ones((), device=weight.device)  # decoded with it, codes become levels
        # A scale of 0 has one level only. Scales never become 0, so that most layers need not look at every column.
        self._is_used = None if bool((self._scale > 0).all()) else self._scale > 0
        origin = grid.expanded_zero()
        codes = encode(weight, grid).to(torch.float32 if grid.codebook is None else torch.int64)
        self._levels = grid.values(codes, self._one, origin).T.contiguous()  # [I, O]
        if self._mask is not None:
            self._levels.mul_(self._mask)
        self._residual = hessian @ (self.values().T - dense.float().T)  # R^T [I, O]

    def _group_of(self, column: int) -> int:
        return column // self.grid.group_size

    def values(self) -> Tensor:
        """V [O, I], float32."""
        scale = self._scale.repeat_interleave(self.grid.group_size, dim=0)  # [I, O]
        return (self._levels * scale).T.contiguous()

    def move_entries(self) -> None:
        """One pass over the columns: every entry moves to its best level."""
        width = self._levels.shape[0]
        diagonal = self._hessian.diagonal().tolist()
        for start in range(0, width, BLOCK):
            stop = min(start + BLOCK, width)
            moves = torch.zeros_like(self._levels[start:stop])
            for j in range(start, stop):
                group = self._group_of(j)
                scale = self._scale[group]
                zero = self._zero if isinstance(self._zero, float) else self._zero[group]
                # R of column j without the block's earlier moves, which reach the other columns together below.
                residual = self._residual[j]
                if j > start:
                    residual = torch.addmv(residual, moves[: j - start].T, self._hessian[start:j, j])
                current = self._levels[j] * scale
                codes = self.grid.nearest(current - residual / diagonal[j], scale, zero)
                best = self.grid.values(codes, self._one, zero)
                if self._is_used is not None:
                    best = torch.where(self._is_used[group], best, 0.0)
                if self._mask is not None:
                    best = best * self._mask[j]
                moves[j - start] = best * scale - current
                self._levels[j] = best
            self._residual.addmm_(self._hessian[:, start:stop], moves)

    def move_scales(self) -> None:
        """Move every scale to its best value for the present levels, group after group."""
        size = self.grid.group_size
        for group in range(self._scale.shape[0]):
            part = slice(group * size, (group + 1) * size)
            levels = self._levels[part]  # [size, O]
            slope = (levels * self._residual[part]).sum(0)  # [O]
            curvature = (levels * (self._hessian[part, part] @ levels)).sum(0)
            if self.grid.scale.shape[0] == 1:  # all rows share one scale
                slope = slope.sum().expand_as(slope)
                curvature = curvature.sum().expand_as(curvature)
            old = self._scale[group]
            new = self._storable(old - _ratio(slope, curvature))
            step = new - old
            # Storing a scale rounds it: take the step only where the stored scale still lowers the objective.
            better = (2 * step * slope + step.square() * curvature < 0) & self._is_normal(new)
            step = torch.where(better, step, 0.0)
            self._scale[group] = torch.where(better, new, old)
            self._residual.addmm_(self._hessian[:, part], levels * step)
        scale = self._scale.T if self.grid.scale.shape[0] > 1 else self._scale[:, :1].T
        self.grid = replace(self.grid, scale=scale.to(self.grid.scale.dtype).contiguous())

    def _storable(self, scale: Tensor) -> Tensor:
        return scale.to(self.grid.scale.dtype).float()

    def _is_normal(self, scale: Tensor) -> Tensor:
        """Whether the dtype of the stored scales holds ``scale`` with full precision; a scale is positive."""
        dtype = self.grid.scale.dtype
        smallest = SMALLEST_HALF if dtype == torch.float16 else torch.finfo(dtype).tiny
        return (scale >= smallest) & torch.isfinite(scale)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where the denominator is not positive: a row that is solved, or has no entries."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)
