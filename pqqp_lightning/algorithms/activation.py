"""Dynamic quantization of activations: the scale is computed from the activations at run time.

Each token (each sample of an image) has its own scale. Symmetric grids have the 2^b - 1 levels
-(2^(b-1) - 1) .. 2^(b-1) - 1 and scale = clip * max|x| / (2^(b-1) - 1), as in LLM.int8() (arXiv 2208.07339, section
2.1) and QuaRot (arXiv 2404.00456, section 4); asymmetric ones span clip * min(x, 0) .. clip * max(x, 0) in 2^b levels
with an integer zero point, so that 0 stays 0. Values are returned dequantized.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_activation(
    x: Tensor,
    bits: int,
    *,
    dims: tuple[int, ...] = (-1,),
    symmetric: bool = True,
    clip: float = 1.0,
    outliers: float | None = None,
    column_dim: int = -1,
) -> Tensor:
    """Round ``x`` to the nearest levels.

    Args:
        x: activations of any shape.
        bits: 2 to 8.
        dims: the dimensions that share a scale: (-1,) for one scale per token, (1, 2, 3) for one per image.
        symmetric: use no zero point.
        clip: fraction of the largest value that the grid reaches, in (0, 1]; larger values are clamped.
        outliers: columns that hold a value beyond this threshold are not rounded; None rounds every column.
        column_dim: the dimension of the columns.

    Returns:
        The rounded activations, in the shape and dtype of ``x``; computed in float32.
    """
    values = x.float()
    if outliers is None:
        return _round(values, bits, dims, symmetric, clip).to(x.dtype)
    kept = outlier_columns(x, outliers, column_dim)
    # Outliers are zeroed before rounding, so that they do not widen the scale of the other columns.
    rounded = _round(values.masked_fill(kept, 0.0), bits, dims, symmetric, clip).to(x.dtype)
    return torch.where(kept, x, rounded)


def outlier_columns(x: Tensor, threshold: float, dim: int = -1) -> Tensor:
    """Mark the columns that hold a value beyond ``threshold`` (LLM.int8(), section 3.2).

    Returns:
        bool, of size 1 in every dimension but ``dim``: broadcasts against ``x``.
    """
    other_dims = [d for d in range(x.dim()) if d != dim % x.dim()]
    return x.abs().amax(dim=other_dims, keepdim=True) > threshold


def _round(x: Tensor, bits: int, dims: tuple[int, ...], symmetric: bool, clip: float) -> Tensor:
    tiny = torch.finfo(torch.float32).tiny  # keeps an all-zero token from dividing by zero
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = (x.abs().amax(dim=dims, keepdim=True) * clip / top).clamp_(min=tiny)
        return (x / scale).round_().clamp_(-top, top).mul_(scale)
    top = 2**bits - 1
    lowest = x.amin(dim=dims, keepdim=True).clamp_(max=0) * clip
    highest = x.amax(dim=dims, keepdim=True).clamp_(min=0) * clip
    scale = ((highest - lowest) / top).clamp_(min=tiny)
    zero = (-lowest / scale).round_()
    return ((x / scale).round_() + zero).clamp_(0, top).sub_(zero).mul_(scale)
