"""QuaRot's rotation of a network, which keeps its function (Ashkboos et al., arXiv 2404.00456, section 4, stage 1).

The gains of the norms are folded into the layers that read them, and the residual stream x becomes x Q: a layer that
reads the stream gets the weight W Q, one that writes to it Q^T W and the bias b Q. RMSNorm commutes with Q. A LayerNorm
becomes an RMSNorm once the layers that write to the stream remove its mean (SliceGPT, arXiv 2401.15024, section 3.2).

Differs from the paper for a tied head: embedding and head stay one weight E Q, and the last norm's gain becomes a
separate layer behind the norm. Everything is computed in float64.
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
    """Rewrite a layer for transformed inputs, and transform its outputs.

    Args:
        weight: [O, I].
        bias: [O], or None.
        gain: [I], the gain of the norm in front, to fold in.
        shift: [I], the bias of the norm in front, to fold in.
        inputs: orthogonal maps that were applied to the inputs, in order.
        outputs: maps to apply to the outputs, in order.

    Returns:
        Weight [O, I] and bias [O] in float64; the bias is None if there is none.
    """
    weight = weight.double()
    if bias is not None:
        bias = bias.double()
    if shift is not None:  # before the gain: the norm adds its bias after scaling
        shift_output = weight @ shift.double()  # [O]
        bias = shift_output if bias is None else bias + shift_output
    if gain is not None:
        weight = weight * gain.double()
    for transform in inputs:
        weight = transform(weight)
    for transform in outputs:
        weight = transform(weight.T).T
        if bias is not None:
            bias = transform(bias)
    return weight, bias


def rotate_gain(rotation: Rotation, gain: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return weight [H, H] and bias [H] of the layer that does to x Q what x -> x * gain + shift does to x."""
    eye = torch.eye(rotation.order, dtype=torch.float64, device=rotation.factor.device)
    return rewrite_linear(eye, None, gain=gain, shift=shift, inputs=[rotation.apply], outputs=[rotation.apply])


def rotate_heads(rotation: Rotation) -> Map:
    """Return the map that rotates each head of [V, heads * head_dim] separately."""
    return lambda x: rotation.apply(x.unflatten(-1, (-1, rotation.order))).flatten(-2)


def rotate_across(rotation: Rotation, width: int) -> Map:
    """Return the map that mixes the n parts of [V, n * width]; with width 1 it is the rotation itself."""
    if width == 1:
        return rotation.apply
    return lambda x: rotation.apply(x.unflatten(-1, (-1, width)).transpose(-1, -2)).transpose(-1, -2).flatten(-2)


def centre(x: Tensor) -> Tensor:
    """Subtract the mean over the last dimension from ``x`` [V, H]."""
    return x - x.mean(dim=-1, keepdim=True)


def mean_direction(rotation: Rotation) -> Tensor:
    """Return the unit vector [H] along which x Q holds the mean of x."""
    ones = torch.full((rotation.order,), 1 / math.sqrt(rotation.order), dtype=torch.float64)
    return rotation.apply(ones.to(rotation.factor.device))
