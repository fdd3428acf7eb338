"""Round to nearest: every weight to the nearest point of its group's grid; the baseline of every quantizer."""

from __future__ import annotations

from torch import Tensor

from pqqp_lightning.algorithms.grid import Quantized, fit_grid, round_to_grid


def quantize_rtn(
    weight: Tensor, *, bits: int, group_size: int | None = None, symmetric: bool = True, per_tensor: bool = False
) -> Quantized:
    """Round ``weight`` [O, I] to its grid; zeros stay zero."""
    grid = fit_grid(weight, bits, group_size=group_size, symmetric=symmetric, per_tensor=per_tensor)
    return Quantized(round_to_grid(weight, grid), grid)
