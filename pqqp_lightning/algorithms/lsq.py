"""Fake quantization with a straight-through estimator and learned step sizes.

Rounding to a grid in the forward pass, for a weight v with step size s and codes from -Q_N to Q_P (Esser et al.,
Learned Step Size Quantization, arXiv 1902.08153, equations 1 and 2):

    v_bar = round(clip(v / s, -Q_N, Q_P)),    v_hat = v_bar * s.

Backward, the gradient passes straight through to v inside the range and stops outside of it (Jacob et al., arXiv
1712.05877, section 3; Esser et al., equation 5), and reaches s as equation 3 says, times 1 / sqrt(N * Q_P)
(section 2.2) for the N weights that share s. Unlike there, s is per group of columns or per row here, and grids may
have a zero point z: then Q_N = z and Q_P = 2^bits - 1 - z, fixed while s is learned.

The paper's factor makes plain SGD change s by about the same fraction as it changes the weights. Adam undoes any
factor: it moves every parameter by its learning rate, a far larger fraction of s than of a weight. Here the parameter
is s in units of about s / rms(v) (:func:`unit_of`, :func:`in_units`), so that Adam too changes s by the fraction by
which it changes the weights; plain SGD does as before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pqqp_lightning.algorithms.grid import SMALLEST_HALF, Grid

SMALLEST_STEP = 2.0**-100
"""A learned step size never falls below it."""


def fake_quantize(weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """``weight`` [O, I] rounded to its grid, with straight-through gradients to it and to ``scale``.

    Args:
        weight: [O, I].
        scale: [O, G], or [1, 1] for one in all; above 0.
        zero: uint8 [O, G] zero points, or None for a symmetric grid.
        bits: 2 to 8.
    """
    shape = (1, 1, -1) if scale.numel() == 1 else (scale.shape[0], scale.shape[1], -1)
    grouped = weight.float().reshape(shape)  # [O, G, I / G]
    lowest = torch.full_like(scale, 2.0 ** (bits - 1)) if zero is None else zero.to(scale.dtype)  # [O, G], Q_N
    highest = 2**bits - 1 - lowest  # [O, G], Q_P
    factor = (grouped.shape[-1] * highest.clamp(min=1)).rsqrt()  # [O, G]
    rounded = _StraightThrough.apply(grouped, *(t.unsqueeze(-1) for t in (scale, lowest, highest, factor)))
    return rounded.reshape(weight.shape).to(weight.dtype)


def stored_scale(scale: Tensor) -> Tensor:
    """``scale`` float32 [O, G] as a grid keeps it: positive, and to float16 precision where that is enough.

    The gradient passes straight through, so that what is trained is what is stored.
    """
    positive = scale.abs().clamp(min=SMALLEST_STEP)
    fits = (positive >= SMALLEST_HALF) & (positive <= torch.finfo(torch.float16).max)
    rounded = torch.where(fits, positive.half().float(), positive)
    return positive + (rounded - positive).detach()


def unit_of(scale: Tensor, weight: Tensor) -> Tensor:
    """The unit [O, G] that ``scale`` [O, G] is trained in: about scale / rms(v) over the nonzero v of ``weight``.

    ``weight`` may be in any layout. A power of two, so that nothing is lost in multiplying by it.
    """
    kept = weight.float()[weight != 0]
    size = kept.square().mean().sqrt() if kept.numel() else torch.ones((), device=weight.device)
    return torch.exp2(torch.log2(scale.float() / size).round().clamp(-100, 100))


def in_units(parameter: Tensor, unit: Tensor) -> Tensor:
    """``parameter * unit`` [O, G]; its gradient is divided by ``unit``, so that under plain SGD the product moves as if
    it were the parameter."""
    product: Tensor = _InUnits.apply(parameter, unit)
    return product


def grid_of(scale: Tensor, zero: Tensor | None, bits: int, columns: int) -> Grid:
    """The grid that :func:`fake_quantize` rounds to with :func:`stored_scale` of ``scale`` [O, G]."""
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
        to_scale = None
        if ctx.needs_input_grad[1]:
            clipped = torch.clamp(ratio, -lowest, highest)
            slope = torch.where(inside, clipped.round() - ratio, clipped)
            to_scale = (gradient * slope).sum(-1, keepdim=True) * factor
        return gradient * inside, to_scale, None, None, None


class _InUnits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, unit: Tensor) -> Tensor:
        ctx.save_for_backward(unit)
        return parameter * unit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (unit,) = ctx.saved_tensors
        return gradients[0] / unit, None
