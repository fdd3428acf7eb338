"""Removes rows and columns of layers and norms: smaller parameters, and the attributes that state their widths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pqqp_lightning.network.constraints import Constraints, constraints_of, set_constraints

SLICED_LAYERS = (nn.Linear, nn.Conv2d)
SLICED_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm)


def is_depthwise(layer: nn.Conv2d) -> bool:
    """Whether a convolution filters each channel separately: its rows are its input channels too."""
    return layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels


def resize(module: nn.Module, rows: int | None, columns: int | None) -> None:
    """Give a layer or norm uninitialised parameters and buffers of a smaller shape, and adjust its attributes.

    Args:
        module: Linear, Conv2d, BatchNorm or LayerNorm; its tensors keep device, dtype and ``requires_grad``.
        rows: number of output features or channels; None keeps them.
        columns: number of input features or channels; None keeps them.
    """

    def resized(tensor: Tensor) -> Tensor:
        shape = list(tensor.shape)
        if rows is not None:
            shape[0] = rows
        if columns is not None and len(shape) > 1:
            shape[1] = columns
        return tensor.new_empty(shape)

    _replace_tensors(module, resized)
    _set_widths(module, rows, columns)


def slice_module(module: nn.Module, rows: Tensor | None, columns: Tensor | None) -> list[str]:
    """Keep only these rows and columns of a layer or norm and of its constraints.

    Args:
        module: as in :func:`resize`.
        rows: ascending indices, or None for all.
        columns: ascending indices of input features or channels, or None for all.

    Returns:
        Descriptions of the constraints that were lost.
    """
    constraints, lost = _sliced_constraints(module, rows, columns)

    def sliced(tensor: Tensor) -> Tensor:
        if rows is not None:
            tensor = tensor.index_select(0, rows.to(tensor.device))
        if columns is not None and tensor.dim() > 1:
            tensor = tensor.index_select(1, columns.to(tensor.device))
        return tensor.contiguous()

    _replace_tensors(module, sliced)
    _set_widths(module, None if rows is None else len(rows), None if columns is None else len(columns))
    if constraints is not None:
        set_constraints(module, constraints)
    return lost


def matrix_columns(layer: nn.Module, columns: Tensor) -> Tensor:
    """Return the columns of a layer's weight matrix [O, I] that belong to these input features or channels."""
    if not isinstance(layer, nn.Conv2d):
        return columns
    # A matrix's columns run over kernel positions, then channels.
    kernel = layer.kernel_size[0] * layer.kernel_size[1]
    channels = layer.weight.shape[1]
    return (torch.arange(kernel)[:, None] * channels + columns.cpu()[None]).flatten()


def _sliced_constraints(
    module: nn.Module, rows: Tensor | None, columns: Tensor | None
) -> tuple[Constraints | None, list[str]]:
    """The constraints of the smaller weight (None for none), and descriptions of those that are lost."""
    if not isinstance(module, SLICED_LAYERS):
        return None, []
    constraints = constraints_of(module)
    if constraints.mask_bits is None and constraints.grid is None:
        return None, []
    lost = []
    kept_columns = None if columns is None else matrix_columns(module, columns)
    if constraints.pattern is not None and kept_columns is not None:
        lost.append(f"its mask is not {constraints.pattern[0]}:{constraints.pattern[1]} any more")
    try:
        return constraints.select(rows, kept_columns), lost
    except ValueError as error:  # columns of a grid with groups of columns: keep the mask alone
        without_grid = Constraints(constraints.shape, constraints.mask_bits, constraints.pattern)
        return without_grid.select(rows, kept_columns), [*lost, str(error)]


def _replace_tensors(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter and buffer of ``module`` by ``change(tensor)``, except scalars (a batch counter)."""
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                changed = change(parameter.detach())
                module._parameters[name] = nn.Parameter(changed, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dim():
                module._buffers[name] = change(buffer)


def _set_widths(module: nn.Module, rows: int | None, columns: int | None) -> None:
    """Set the attributes in which a layer or norm keeps its numbers of rows and columns; None leaves them."""
    if isinstance(module, nn.LayerNorm):
        widths: dict[str, Any] = {"normalized_shape": None if rows is None else (rows,)}
    elif isinstance(module, nn.Linear):
        widths = {"out_features": rows, "in_features": columns}
    elif isinstance(module, nn.Conv2d) and is_depthwise(module):
        widths = {"out_channels": rows, "in_channels": rows, "groups": rows}
    elif isinstance(module, nn.Conv2d):
        widths = {"out_channels": rows, "in_channels": columns}
    else:
        widths = {"num_features": rows}
    for attribute, value in widths.items():
        if value is not None:
            setattr(module, attribute, value)
