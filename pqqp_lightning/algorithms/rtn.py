"""Round to nearest: round every weight to the nearest point of its group's grid; the baseline of every quantizer.

Includes the formats of bitsandbytes, whose scale is the absolute maximum of a block: on the levels of a codebook (NF4,
FP4; QLoRA, arXiv 2305.14314, equations 1 to 3), or on the integers from -127 to 127 (LLM.int8(), arXiv 2208.07339,
equation 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pqqp_lightning.algorithms.codebook import Codebook
from pqqp_lightning.algorithms.grid import Grid, Quantized, decode, fit_codebook, fit_grid, round_to_grid


def quantize_rtn(
    weight: Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    per_tensor: bool = False,
    clip: bool = False,
) -> Quantized:
    """Round ``weight`` [O, I] to a uniform grid; zeros stay zero. Arguments as in :func:`fit_grid`."""
    grid = fit_grid(weight, bits, group_size=group_size, symmetric=symmetric, per_tensor=per_tensor, clip=clip)
    return Quantized(round_to_grid(weight, grid), grid)


def quantize_codebook(weight: Tensor, codebook: Codebook, group_size: int | None = None) -> Quantized:
    """Round ``weight`` [O, I] to a codebook's levels, scaled by the largest |w| of every ``group_size`` columns."""
    grid = fit_codebook(weight, codebook, group_size)
    return Quantized(round_to_grid(weight, grid), grid)


def quantize_int8(weight: Tensor) -> Quantized:
    """Round ``weight`` [O, I] to 8 bits with one scale max|w| / 127 per row: codes 1 to 255, 128 is zero."""
    largest = weight.abs().amax(1, keepdim=True).float()
    largest = torch.where(largest > 0, largest, 127.0)  # a row of zeros gets scale 1
    codes = (weight.float() * (127.0 / largest)).round_().add_(128).to(torch.uint8)
    grid = Grid(8, largest / 127, None, weight.shape[1])
    return Quantized(decode(codes, grid, weight.dtype), grid)
