"""Weights that are rounded to a grid in every forward pass while the weights underneath go on training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from pqqp_lightning.algorithms.grid import Grid
from pqqp_lightning.algorithms.lsq import fake_quantize, grid_of, scale_from_units, scale_unit, stored_scale
from pqqp_lightning.network.layers import Layer, columns_of, to_weight


class FakeQuantize(nn.Module):
    """A parametrization of a layer's weight: its rounding to a grid, with straight-through gradients.

    Args:
        bits: 2 to 8.
        scales: [O, G] of the scales, [1, 1] for one in all; 1 each as yet.
        symmetric: without zero points.
        learn_scale: whether training moves the scales.
        device: of the weight.
    """

    zero: Tensor | None
    unit: Tensor

    def __init__(
        self, bits: int, scales: tuple[int, int], symmetric: bool, learn_scale: bool, device: torch.device
    ) -> None:
        super().__init__()
        self.bits = bits
        self.scale = nn.Parameter(torch.ones(scales, device=device), requires_grad=learn_scale)  # in units of `unit`
        self.register_buffer("unit", torch.ones(scales, device=device))
        self.register_buffer("zero", None if symmetric else torch.zeros(scales, dtype=torch.uint8, device=device))

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` [O, I] or [O, C, kh, kw] on the grid, in the same layout."""
        matrix = weight.permute(0, 2, 3, 1).flatten(1) if weight.dim() == 4 else weight
        rounded = fake_quantize(matrix, stored_scale(self._scale()), self.zero, self.bits)
        return to_weight(rounded, weight.shape)

    def grid(self, columns: int) -> Grid:
        """The grid that weights of ``columns`` columns are rounded to now."""
        return grid_of(self._scale(), self.zero, self.bits, columns)

    def start_from(self, grid: Grid, weight: Tensor) -> None:
        """Take over the scales and zero points of ``grid``, which was fitted to ``weight`` (in any layout)."""
        with torch.no_grad():
            self.unit.copy_(scale_unit(grid.scale, weight.detach()))
            self.scale.copy_(grid.scale.float() / self.unit)
            if self.zero is not None and grid.zero is not None:
                self.zero.copy_(grid.zero)

    def _scale(self) -> Tensor:
        return scale_from_units(self.scale.float(), self.unit.float())


def attach(layer: Layer, bits: int, scales: tuple[int, int], *, symmetric: bool, learn_scale: bool) -> FakeQuantize:
    """Let ``layer`` compute its weight by fake quantization with [O, G] = ``scales`` scales, all 1 as yet."""
    quantizer = FakeQuantize(bits, scales, symmetric, learn_scale, layer.weight.device)
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
