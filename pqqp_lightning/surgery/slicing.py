"""Layers with fewer rows and columns: new parameters of the smaller shape, and the numbers that a layer keeps of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pqqp_lightning.network.constraints import Constraints, constraints_of, set_constraints
from pqqp_lightning.network.layers import LAYER_TYPES

SLICED_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm)


def is_depthwise(layer: nn.Conv2d) -> bool:
    """Whether each channel of a convolution has filters of its own: it loses rows alone."""
    return layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels


def resize(module: nn.Module, rows: int | None, columns: int | None) -> None:
    """Give a layer or norm new parameters and buffers of the smaller shape, values unset, and adjust its numbers.

    Args:
        module: Linear, Conv2d, BatchNorm or LayerNorm; its tensors' device, dtype and ``requires_grad`` stay.
        rows: output features or channels; None leaves them.
        columns: input features or channels; None leaves them.
    """
    _replace(module, lambda tensor: tensor.new_empty(_shape(tensor, rows, columns)))
    for attribute, value in _numbers(module, rows, columns).items():
        setattr(module, attribute, value)


def keep(module: nn.Module, rows: Tensor | None, columns: Tensor | None) -> list[str]:
    """Keep these rows and columns of a layer or norm, and its constraints with them.

    Args:
        module: as in :func:`resize`.
        rows: ascending indices, or None for all.
        columns: ascending indices of input features or channels, or None for all.

    Returns:
        what of its constraints could not be kept.
    """
    left, lost = _sliced_constraints(module, rows, columns)

    def sliced(tensor: Tensor) -> Tensor:
        if rows is not None:
            tensor = tensor.index_select(0, rows.to(tensor.device))
        if columns is not None and tensor.dim() > 1:
            tensor = tensor.index_select(1, columns.to(tensor.device))
        return tensor.contiguous()

    _replace(module, sliced)
    for attribute, value in _numbers(module, _length(rows), _length(columns)).items():
        setattr(module, attribute, value)
    if left is not None:
        set_constraints(module, left)
    return lost


def matrix_columns(layer: nn.Module, columns: Tensor) -> Tensor:
    """The columns of a layer's weight matrix [O, I] that belong to these input features or channels."""
    if not isinstance(layer, nn.Conv2d):
        return columns
    kernel, channels = layer.kernel_size[0] * layer.kernel_size[1], layer.weight.shape[1]
    return (torch.arange(kernel)[:, None] * channels + columns.cpu()[None]).flatten()


def _sliced_constraints(
    module: nn.Module, rows: Tensor | None, columns: Tensor | None
) -> tuple[Constraints | None, list[str]]:
    """(the constraints of the smaller weight, what of them is lost)."""
    if not isinstance(module, LAYER_TYPES):
        return None, []
    constraints, lost = constraints_of(module), []
    if constraints.mask_bits is None and constraints.grid is None:
        return None, []
    picked = None if columns is None else matrix_columns(module, columns)
    if constraints.pattern is not None and picked is not None:
        lost.append(f"its mask is not {constraints.pattern[0]}:{constraints.pattern[1]} any more")
    try:
        return constraints.select(rows, picked), lost
    except ValueError as error:
        without = Constraints(constraints.shape, constraints.mask_bits, constraints.pattern)
        return without.select(rows, picked), [*lost, str(error)]


def _replace(module: nn.Module, change: Any) -> None:
    """Put ``change(tensor)`` in the place of every parameter and buffer of ``module`` that has a width."""
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = nn.Parameter(change(parameter.detach()), requires_grad=parameter.requires_grad)
                module._parameters[name] = made
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dim():
                module._buffers[name] = change(buffer)


def _shape(tensor: Tensor, rows: int | None, columns: int | None) -> list[int]:
    shape = list(tensor.shape)
    if rows is not None:
        shape[0] = rows
    if columns is not None and len(shape) > 1:
        shape[1] = columns
    return shape


def _numbers(module: nn.Module, rows: int | None, columns: int | None) -> dict[str, Any]:
    """The attributes in which a layer or norm keeps its widths."""
    if isinstance(module, nn.LayerNorm):
        found: dict[str, Any] = {"normalized_shape": None if rows is None else (rows,)}
    elif isinstance(module, nn.Linear):
        found = {"out_features": rows, "in_features": columns}
    elif isinstance(module, nn.Conv2d) and is_depthwise(module):
        found = {"out_channels": rows, "in_channels": rows, "groups": rows}
    elif isinstance(module, nn.Conv2d):
        found = {"out_channels": rows, "in_channels": columns}
    else:
        found = {"num_features": rows}
    return {name: value for name, value in found.items() if value is not None}


def _length(index: Tensor | None) -> int | None:
    return None if index is None else len(index)
