"""Fake quantization: every forward pass rounds the weight to a grid, while training updates the unrounded weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from pqqp_lightning.algorithms.grid import Grid
from pqqp_lightning.algorithms.lsq import fake_quantize, grid_of, scale_from_units, scale_unit, stored_scale
from pqqp_lightning.network.layers import Layer, columns_of, layout_of, weight_place
from pqqp_lightning.network.layouts import Layout, as_matrix, as_weight


class FakeQuantize(nn.Module):
    """A parametrization of a layer's weight: its rounding to a grid, with straight-through gradients.

    Args:
        bits: 2 to 8.
        layout: how the weight holds its matrix.
        scales: shape of the scales, [O, G], or [1, 1] for one in total; all start at 1.
        symmetric: use no zero points.
        learn_scale: whether training updates the scales.
        device: of the weight.
    """

    zero: Tensor | None
    unit: Tensor

    def __init__(
        self,
        bits: int,
        layout: Layout,
        scales: tuple[int, int],
        symmetric: bool,
        learn_scale: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.bits, self.layout = bits, layout
        self.later_parameters: list[str] = []
        """The names of the module's parameters behind the weight, in order."""
        self.scale = nn.Parameter(torch.ones(scales, device=device), requires_grad=learn_scale)  # in units of `unit`
        self.register_buffer("unit", torch.ones(scales, device=device))
        self.register_buffer("zero", None if symmetric else torch.zeros(scales, dtype=torch.uint8, device=device))

    def forward(self, weight: Tensor) -> Tensor:
        """Round ``weight`` to the grid, in the same layout."""
        matrix = as_matrix(weight, self.layout)
        rounded = fake_quantize(matrix, stored_scale(self._scale()), self.zero, self.bits)
        return as_weight(rounded, weight.shape, self.layout)

    def grid(self, columns: int) -> Grid:
        """Return the current grid for weights with ``columns`` columns."""
        return grid_of(self._scale(), self.zero, self.bits, columns)

    def start_from(self, grid: Grid, weight: Tensor) -> None:
        """Start from the scales and zero points of ``grid``, which was fitted to ``weight`` (in any layout)."""
        with torch.no_grad():
            self.unit.copy_(scale_unit(grid.scale, weight.detach()))
            self.scale.copy_(grid.scale.float() / self.unit)
            if self.zero is not None and grid.zero is not None:
                self.zero.copy_(grid.zero)

    def _scale(self) -> Tensor:
        return scale_from_units(self.scale.float(), self.unit.float())


def attach(layer: Layer, bits: int, scales: tuple[int, int], *, symmetric: bool, learn_scale: bool) -> FakeQuantize:
    """Let ``layer`` compute its weight by fake quantization; ``scales`` is the shape [O, G] of the scales, all 1."""
    quantizer = FakeQuantize(bits, layout_of(layer), scales, symmetric, learn_scale, layer.weight.device)
    module, name = weight_place(layer)
    names = list(module._parameters)
    quantizer.later_parameters = names[names.index(name) + 1 :]
    register_parametrization(module, name, quantizer)
    return quantizer


def quantizer_of(layer: Layer) -> FakeQuantize:
    """Return the fake quantization that :func:`attach` added to ``layer``."""
    module, name = weight_place(layer)
    parametrizations: Any = module.parametrizations
    return parametrizations[name][0]


def detach(layer: Layer) -> Grid:
    """Remove the fake quantization and return its grid; the weight keeps its unrounded values."""
    quantizer = quantizer_of(layer)
    grid = quantizer.grid(columns_of(layer))
    module, weight = weight_place(layer)
    remove_parametrizations(module, weight, leave_parametrized=False)
    # That puts the weight behind the bias. Restore the order, since optimizers match their state to it.
    for name in quantizer.later_parameters:
        if name in module._parameters:  # else it is fake-quantized itself
            module._parameters[name] = module._parameters.pop(name)
    return grid
