"""Codebooks of 4-bit grids: sorted levels in [-1, 1], 0 among them.

- ``nf4``: NormalFloat (Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3 and appendix E): quantiles of a normal
  distribution on both sides of an exact zero, which has code 7.
- ``fp4``: one sign bit, two exponent bits and one mantissa bit, as in bitsandbytes: 0, 1/16, 2, 3, 4, 6, 8 and 12,
  divided by 12. The two zeros are one level here, so it has 15 levels.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

Codebook = Literal["nf4", "fp4"]

_NF4_BELOW = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
)
_NF4_ABOVE = (
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_ABOVE = (0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)


def levels_of(codebook: Codebook, like: Tensor) -> Tensor:
    """Return the levels, float32, ascending, on the device of ``like``."""
    return _tables(codebook, like.device)[0]


def bounds_of(codebook: Codebook, like: Tensor) -> Tensor:
    """Return the midpoints between neighbouring levels; a value on a midpoint is rounded down."""
    return _tables(codebook, like.device)[1]


@cache
@torch.inference_mode(False)  # the cached tensors outlive this call, and training cannot use inference tensors
def _tables(codebook: Codebook, device: torch.device) -> tuple[Tensor, Tensor]:
    if codebook == "nf4":
        levels = torch.tensor([*_NF4_BELOW, 0.0, *_NF4_ABOVE], dtype=torch.float32, device="cpu")
    else:
        above = torch.tensor(_FP4_ABOVE, dtype=torch.float32, device="cpu") / 12.0
        levels = torch.cat([-above.flip(0), above.new_zeros(1), above])
    return levels.to(device), ((levels[:-1] + levels[1:]) / 2).to(device)
