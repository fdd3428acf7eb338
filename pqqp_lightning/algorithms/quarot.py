"""QuaRot's rewriting of a network that changes no function (Ashkboos et al., arXiv 2404.00456, section 4, stage 1).

The norms' gains go into the layers that read them, the residual stream x becomes x Q: a layer y = x W^T + b on it
reads with W Q and writes with Q^T W and b Q. RMSNorm commutes with Q; a LayerNorm is an RMSNorm on a stream whose mean
was taken out by its writers (SliceGPT, arXiv 2401.15024, section 3.2). Differs from the paper in a tied head: embedding
and head stay one weight E Q, and the last norm's gain becomes a layer of its own behind it. Everything in float64.
Shapes: O out, I in, H hidden, V any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pqqp_lightning.algorithms.hadamard import Rotation

Map = Callable[[Tensor], Tensor]
"""A linear map of row vectors along the last dimension."""


def rewrite_linear(
    weight: Tensor,
    bias: Tensor | None,
    *,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    inputs: Sequence[Map] = (),
    outputs: Sequence[Map] = (),
) -> tuple[Tensor, Tensor | None]:
    """The layer that does on changed inputs what the old one did, with its outputs changed: float64 weight and bias.

    Args:
        weight: [O, I].
        bias: [O], or None.
        gain: [I], of the norm in front, to be folded in.
        shift: [I], the norm's bias, to be folded in.
        inputs: orthogonal maps that the inputs have gone through, in order.
        outputs: maps to apply to the outputs, in order.
    """
    weight, bias = weight.double(), None if bias is None else bias.double()
    if shift is not None:
        moved = weight @ shift.double()  # [O]
        bias = moved if bias is None else bias + moved
    if gain is not None:
        weight = weight * gain.double()
    for change in inputs:
        weight = change(weight)
    for change in outputs:
        weight = change(weight.T).T
        bias = None if bias is None else change(bias)
    return weight, bias


def rotate_gain(rotation: Rotation, gain: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight [H, H] and bias [H] of the layer that does to x Q what x -> x * gain + shift does to x."""
    eye = torch.eye(rotation.order, dtype=torch.float64, device=rotation.factor.device)
    return rewrite_linear(eye, None, gain=gain, shift=shift, inputs=[rotation.apply], outputs=[rotation.apply])


def rotate_heads(rotation: Rotation) -> Map:
    """The map that rotates each head of [V, heads * head_dim] by itself."""
    return lambda x: rotation.apply(x.unflatten(-1, (-1, rotation.order))).flatten(-2)


def rotate_across(rotation: Rotation, width: int) -> Map:
    """The map that mixes the n parts of [V, n * width] with one another; with width 1, the rotation itself."""
    if width == 1:
        return rotation.apply
    return lambda x: rotation.apply(x.unflatten(-1, (-1, width)).transpose(-1, -2)).transpose(-1, -2).flatten(-2)


def centre(x: Tensor) -> Tensor:
    """``x`` [V, H] without its mean."""
    return x - x.mean(dim=-1, keepdim=True)


def mean_direction(rotation: Rotation) -> Tensor:
    """The direction [H], of length 1, along which the mean of x lies in x Q."""
    ones = torch.full((rotation.order,), 1 / math.sqrt(rotation.order), dtype=torch.float64)
    return rotation.apply(ones.to(rotation.factor.device))
