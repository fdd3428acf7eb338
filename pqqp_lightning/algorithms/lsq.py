"""Fake quantization with a straight-through estimator and learned step sizes.

Rounding to a grid in the forward pass, for a weight v with step size s and codes from -Q_N to Q_P (Esser et al.,
Learned Step Size Quantization, arXiv 1902.08153, equations 1 and 2):

    v_bar = round(clip(v / s, -Q_N, Q_P)),    v_hat = v_bar * s.

In the backward pass the gradient passes straight through to v inside the range and is zero outside it (Jacob et al.,
arXiv 1712.05877, section 3; Esser et al., equation 5). The gradient of s is that of equation 3, times
1 / sqrt(N * Q_P) (section 2.2) for the N weights that share s. Unlike in the paper, s is per group of columns or per
row, and grids may have a zero point z: then Q_N = z and Q_P = 2^bits - 1 - z, fixed while s is learned.

The paper's factor makes plain SGD change s by about the same fraction as it changes the weights. Adam cancels any
factor: it moves every parameter by its learning rate, which is a far larger fraction of s than of a weight. Here the
parameter is s in units of about s / rms(v) (:func:`scale_unit`, :func:`scale_from_units`), so that Adam also changes s
and the weights by the same fraction; plain SGD is unaffected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pqqp_lightning.algorithms.grid import SMALLEST_HALF, Grid

SMALLEST_STEP = 2.0**-100
"""Lower limit of a learned step size."""


def fake_quantize(weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Round ``weight`` [O, I] to its grid, with straight-through gradients to it and to ``scale``.

    Args:
        weight: [O, I].
        scale: [O, G], or [1, 1] for the whole matrix; above 0.
        zero: uint8 [O, G] zero points, or None for a symmetric grid.
        bits: 2 to 8.
    """
    shape = (1, 1, -1) if scale.numel() == 1 else (scale.shape[0], scale.shape[1], -1)
    grouped = weight.float().reshape(shape)  # [O, G, I / G]
    lowest = torch.full_like(scale, 2.0 ** (bits - 1)) if zero is None else zero.to(scale.dtype)  # [O, G], Q_N
    highest = 2**bits - 1 - lowest  # [O, G], Q_P
    factor = (grouped.shape[-1] * highest.clamp(min=1)).rsqrt()  # [O, G]; Q_P is 0 where all weights are negative
    rounded = _StraightThrough.apply(grouped, *(t.unsqueeze(-1) for t in (scale, lowest, highest, factor)))
    return rounded.reshape(weight.shape).to(weight.dtype)


def stored_scale(scale: Tensor) -> Tensor:
    """Round ``scale`` float32 [O, G] as a grid stores it: positive, and to float16 where that is precise enough.

    Training uses these rounded values and passes the gradient straight through, so that it trains what is stored.
    """
    positive = scale.abs().clamp(min=SMALLEST_STEP)
    fits = (positive >= SMALLEST_HALF) & (positive <= torch.finfo(torch.float16).max)
    rounded = torch.where(fits, positive.half().float(), positive)
    return positive + (rounded - positive).detach()


def scale_unit(scale: Tensor, weight: Tensor) -> Tensor:
    """Compute the unit [O, G] in which ``scale`` [O, G] is trained: about scale / rms(v) over the nonzero v.

    ``weight`` may be in any layout. The unit is a power of two, so that multiplying by it is exact.
    """
    nonzero = weight.float()[weight != 0]
    rms = nonzero.square().mean().sqrt() if nonzero.numel() else torch.ones((), device=weight.device)
    return torch.exp2(torch.log2(scale.float() / rms).round().clamp(-100, 100))


def scale_from_units(parameter: Tensor, unit: Tensor) -> Tensor:
    """Compute ``parameter * unit`` [O, G], with the gradient divided by ``unit``.

    Under plain SGD the product then moves as if it were the parameter.
    """
    product: Tensor = _ScaleFromUnits.apply(parameter, unit)
    return product


def grid_of(scale: Tensor, zero: Tensor | None, bits: int, columns: int) -> Grid:
    """Return the grid that :func:`fake_quantize` rounds to with :func:`stored_scale` of ``scale`` [O, G]."""
    stored = stored_scale(scale.detach().float())
    half = stored.half()
    exact = bool(stored.min() >= SMALLEST_HALF) and torch.equal(half.float(), stored)
    return Grid(bits, half if exact else stored, zero, columns)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, s: Tensor, lowest: Tensor, highest: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(v, s, lowest, highest, factor)
        return torch.clamp(v / s, -lowest, highest).round_().mul_(s)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        v, s, lowest, highest, factor = ctx.saved_tensors
        (gradient,) = gradients
        ratio = v / s
        inside = (ratio > -lowest) & (ratio < highest)
        scale_gradient = None
        if ctx.needs_input_grad[1]:
            # Equation 3: round(v / s) - v / s inside the range, -Q_N or Q_P at its ends.
            clipped = torch.clamp(ratio, -lowest, highest)
            slope = torch.where(inside, clipped.round() - ratio, clipped)
            scale_gradient = (gradient * slope).sum(-1, keepdim=True) * factor
        return gradient * inside, scale_gradient, None, None, None


class _ScaleFromUnits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, unit: Tensor) -> Tensor:
        ctx.save_for_backward(unit)
        return parameter * unit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (unit,) = ctx.saved_tensors
        return gradients[0] / unit, None
