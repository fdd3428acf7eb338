"""The layers of a model, and each as a matrix: a weight [O, I] and calibration inputs [groups, T, I].

A layer is a module (Linear, a convolution, GPT-2's Conv1D) or a :class:`ParameterLayer`. The kinds are listed in
:mod:`~pqqp_lightning.network.layer_kinds`. The columns of a convolution run over kernel positions, then input channels.
With the channels last, N:M patterns and quantization groups lie along input channels, as sparse hardware requires.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from pqqp_lightning.network.layer_kinds import LayerKind, kind_of
from pqqp_lightning.network.layouts import Layout, as_matrix, as_weight
from pqqp_lightning.network.parameter_layers import ParameterLayer, parameter_layers

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | ParameterLayer
"""GPT-2's Conv1D is a layer too, but its class cannot be named without importing transformers."""
_ADAPTER = "_pqqp_adapter"


def mark_adapter(module: nn.Module) -> None:
    """Mark ``module`` and its submodules as an adapter: it is saved and counted, but later stages do not touch it."""
    for part in module.modules():
        part.__dict__[_ADAPTER] = True


def is_adapter(module: nn.Module | ParameterLayer) -> bool:
    """Whether ``module`` belongs to an adapter."""
    return module.__dict__.get(_ADAPTER, False)


def named_layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Yield (name, layer) of every layer of ``model``, each once, in the order of the modules.

    The name is that of the module, or the dotted path of the parameter of a :class:`ParameterLayer`.
    """
    for name, module in model.named_modules():
        if kind_of(module) is not None:
            yield name, module  # type: ignore[misc]
        for layer in parameter_layers(module):
            yield f"{name}.{layer.parameter}" if name else layer.parameter, layer


def is_layer(module: object) -> bool:
    """Whether ``module`` is a layer that stages compress."""
    return kind_of(module) is not None


def is_called(layer: Layer) -> bool:
    """Whether ``layer`` is a module, which hooks can watch; else its owner uses its weight without a call."""
    return _kind(layer).called


def has_readable_inputs(layer: Layer) -> bool:
    """Whether calibration can read the inputs of ``layer``."""
    return _kind(layer).readable


def kind_name(layer: Layer) -> str:
    """Return the name of the layer's kind, in the plural, for messages."""
    return _kind(layer).name


def weight_place(layer: Layer) -> tuple[nn.Module, str]:
    """Return the module that holds the weight, and the weight's name in it."""
    return (layer.owner, layer.parameter) if isinstance(layer, ParameterLayer) else (layer, "weight")


def stored_weights(model: nn.Module) -> dict[str, tuple[str, Layer, bool]]:
    """Find the layers by the names of their weights in the state dict.

    Returns:
        Name of the tensor to (name of the layer, layer, whether the tensor is the original of a parametrized weight,
        from which ``torch.nn.utils.parametrize`` computes the weight).
    """
    found: dict[str, tuple[str, Layer, bool]] = {}
    for name, layer in named_layers(model):
        module, parameter = weight_place(layer)
        parent = name.removesuffix(parameter).removesuffix(".") if isinstance(layer, ParameterLayer) else name
        hidden = is_parametrized(module, parameter)
        path = f"parametrizations.{parameter}.original" if hidden else parameter
        found[f"{parent}.{path}" if parent else path] = name, layer, hidden
    return found


def layout_of(layer: Layer) -> Layout:
    """Return how the weight of ``layer`` holds its matrix."""
    return _kind(layer).layout(layer)


def weight_matrix(layer: Layer) -> Tensor:
    """Return the weight as a matrix [O, I]: a view where the layout allows it, else a copy."""
    return as_matrix(layer.weight.detach(), layout_of(layer))


def to_weight(layer: Layer, matrix: Tensor) -> Tensor:
    """Return a matrix [O, I] in the layout of the layer's weight: the inverse of :func:`weight_matrix`."""
    return as_weight(matrix, layer.weight.shape, layout_of(layer))


def set_weight_matrix(layer: Layer, matrix: Tensor) -> None:
    """Write ``matrix`` [O, I] into the layer's weight, in place."""
    with torch.no_grad():
        layer.weight.copy_(to_weight(layer, matrix))


def is_packed(layer: Layer) -> bool:
    """Whether the weight holds codes that only the layer's own kernels read, as in bitsandbytes layers."""
    weight = layer.weight
    return not weight.is_floating_point() or (isinstance(layer, nn.Linear) and weight.shape[0] != layer.out_features)


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """Return (O, I), the shape of the weight matrix."""
    shape = layer.weight.shape
    layout = layout_of(layer)
    if layout == "transposed":
        return shape[1], shape[0]
    if layout == "stacked":
        return shape[0] * shape[1], shape[2]
    if layout == "stacked_transposed":
        return shape[0] * shape[2], shape[1]
    return shape[0], shape[1:].numel()


def rows_of(layer: Layer) -> int:
    """Return O, the rows of the weight matrix."""
    return matrix_shape(layer)[0]


def columns_of(layer: Layer) -> int:
    """Return I, the columns of the weight matrix."""
    return matrix_shape(layer)[1]


def channels_of(layer: Layer) -> int:
    """Return the consecutive columns that an N:M pattern must divide: a convolution's input channels, else I."""
    return layer.weight.shape[1] if spatial_dimensions(layer) else columns_of(layer)


def spatial_dimensions(layer: Layer) -> int:
    """Return the dimensions of the layer's input behind its channels: 2 for a Conv2d, 0 where channels come last."""
    return _kind(layer).spatial


def groups_of(layer: Layer) -> int:
    """Return the number of independent row groups: the groups of a convolution, or the experts, else 1."""
    return _kind(layer).groups(layer)


def is_depthwise(layer: Layer | nn.Module) -> bool:
    """Whether ``layer`` is a depthwise convolution: each filter reads one channel, so that it has few weights."""
    groups = getattr(layer, "groups", 1)
    return groups > 1 and groups == getattr(layer, "in_channels", None)


def geometry(layer: Layer) -> tuple[object, ...]:
    """Return what determines a layer's input rows besides its input: layers of equal geometry share statistics."""
    return _kind(layer).geometry(layer)


def input_rows(layer: Layer, inputs: Tensor) -> Tensor:
    """Return the rows [groups, T, I] that the layer multiplies its matrix with, from its input.

    The groups of a :class:`ParameterLayer` read inputs of different lengths; ``inputs`` is then that of one group, and
    the rows are [1, T, I].
    """
    return _kind(layer).input_rows(layer, inputs)


def row_groups(*tensors: Tensor | None, groups: int) -> list[list[Any]]:
    """Split tensors [O, ...] into ``groups`` row groups: for each group one part of each tensor (None stays None)."""
    chunks = [[None] * groups if tensor is None else list(tensor.chunk(groups)) for tensor in tensors]
    return [list(parts) for parts in zip(*chunks, strict=True)]


def _kind(layer: Layer) -> LayerKind:
    kind = kind_of(layer)
    if kind is None:
        raise TypeError(f"{type(layer).__name__} is not a layer that stages compress")
    return kind
