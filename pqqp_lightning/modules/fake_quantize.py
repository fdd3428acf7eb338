"""Weights that are rounded to a grid in every forward pass while the weights underneath go on training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from pqqp_lightning.algorithms.grid import Grid
from pqqp_lightning.algorithms.lsq import fake_quantize, grid_of, stored_scale
from pqqp_lightning.modules.layers import Layer, columns_of, to_weight


class FakeQuantize(nn.Module):
    """A parametrization of a layer's weight: its rounding to a grid, with straight-through gradients.

    Args:
        bits: 2 to 8.
        scale: float32 [O, G], or [1, 1] for the whole matrix.
        zero: uint8 [O, G] zero points, or None for a symmetric grid.
        learn_scale: whether training moves the scale.
    """

    zero: Tensor | None

    def __init__(self, bits: int, scale: Tensor, zero: Tensor | None, learn_scale: bool) -> None:
        super().__init__()
        self.bits = bits
        self.scale = nn.Parameter(scale, requires_grad=learn_scale)
        self.register_buffer("zero", zero)

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` [O, I] or [O, C, kh, kw] on the grid, in the same layout."""
        matrix = weight.permute(0, 2, 3, 1).flatten(1) if weight.dim() == 4 else weight
        rounded = fake_quantize(matrix, stored_scale(self.scale.float()), self.zero, self.bits)
        return to_weight(rounded, weight.shape).contiguous()

    def grid(self, columns: int) -> Grid:
        """The grid that weights of ``columns`` columns are rounded to now."""
        return grid_of(self.scale, self.zero, self.bits, columns)

    def start_from(self, grid: Grid) -> None:
        """Take over the scales and zero points of ``grid``."""
        with torch.no_grad():
            self.scale.copy_(grid.scale)
            if self.zero is not None and grid.zero is not None:
                self.zero.copy_(grid.zero)


def attach(layer: Layer, bits: int, scales: tuple[int, int], *, symmetric: bool, learn_scale: bool) -> FakeQuantize:
    """Let ``layer`` compute its weight by fake quantization with [O, G] = ``scales`` scales, all 1 as yet."""
    device = layer.weight.device
    zero = None if symmetric else torch.zeros(scales, dtype=torch.uint8, device=device)
    quantizer = FakeQuantize(bits, torch.ones(scales, device=device), zero, learn_scale)
    register_parametrization(layer, "weight", quantizer)
    return quantizer


def quantizer_of(layer: Layer) -> FakeQuantize:
    """The fake quantization that :func:`attach` gave ``layer``."""
    parametrizations: Any = layer.parametrizations
    return parametrizations.weight[0]


def detach(layer: Layer) -> Grid:
    """Take the fake quantization away, leaving the weight underneath as it is, and return its grid."""
    grid = quantizer_of(layer).grid(columns_of(layer))
    remove_parametrizations(layer, "weight", leave_parametrized=False)
    for name in [name for name in layer._parameters if name != "weight"]:  # optimizers go by the parameters' order
        layer._parameters[name] = layer._parameters.pop(name)
    return grid
