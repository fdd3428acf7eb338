"""Linear and Conv2d layers as matrices: a weight [O, I] and calibration inputs [groups, T, I].

A convolution's columns run over (kernel row, kernel column, input channel), channels last, so that N:M patterns and
quantization groups lie along input channels, as sparse hardware wants them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv2d
LAYER_TYPES = (nn.Linear, nn.Conv2d)
_ADAPTER = "_pqqp_adapter"


def mark_adapter(module: nn.Module) -> None:
    """Make ``module`` and all below it an adapter: kept apart from the weights that it adapts, saved and counted, but
    left alone by later stages."""
    for part in module.modules():
        part.__dict__[_ADAPTER] = True


def is_adapter(module: nn.Module) -> bool:
    """Whether ``module`` belongs to an adapter."""
    return module.__dict__.get(_ADAPTER, False)


def weight_matrix(layer: Layer) -> Tensor:
    """The weight as [O, I]; a view of a Linear's, a copy of a Conv2d's."""
    weight = layer.weight.detach()
    return weight.permute(0, 2, 3, 1).flatten(1) if isinstance(layer, nn.Conv2d) else weight


def to_weight(matrix: Tensor, shape: torch.Size | list[int]) -> Tensor:
    """The matrix [O, I] in the layout of a weight of ``shape``: the inverse of :func:`weight_matrix`.

    A convolution's has the strides of a weight that was made in this shape: with a permuted 1x1 kernel, which torch
    calls contiguous and takes for channels_last, oneDNN's strided backward pass writes beyond its buffers (torch 2.15
    on AVX2).
    """
    if len(shape) == 2:
        return matrix
    out, channels, height, width = shape
    return matrix.view(out, height, width, channels).permute(0, 3, 1, 2).flatten().view(shape)


def is_packed(layer: Layer) -> bool:
    """Whether the weight is not its matrix but codes that only the layer's own kernels read, as in bitsandbytes'."""
    weight = layer.weight
    return not weight.is_floating_point() or (isinstance(layer, nn.Linear) and weight.shape[0] != layer.out_features)


def set_weight_matrix(layer: Layer, matrix: Tensor) -> None:
    """Write ``matrix`` [O, I] into the layer's weight, in place."""
    with torch.no_grad():
        layer.weight.copy_(to_weight(matrix, layer.weight.shape))


def columns_of(layer: Layer) -> int:
    """I: input features of the matrix."""
    return layer.weight[0].numel()


def groups_of(layer: Layer) -> int:
    """Independent row groups: a grouped convolution's groups, else 1."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def geometry(layer: Layer) -> tuple[object, ...]:
    """What decides the input rows of a layer besides its input: two layers with equal geometry share statistics."""
    if isinstance(layer, nn.Linear):
        return ("linear",)
    return (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)


def input_rows(layer: Layer, inputs: Tensor) -> Tensor:
    """The rows [groups, T, I] that the layer multiplies its matrix with, from its input."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(1, -1, inputs.shape[-1])
    patches = _unfold(layer, inputs)  # [B, C * kh * kw, L]
    batch, _, positions = patches.shape
    groups, kernel = layer.groups, layer.kernel_size[0] * layer.kernel_size[1]
    patches = patches.view(batch, groups, -1, kernel, positions)  # [B, groups, C / groups, kernel, L]
    return patches.permute(1, 0, 4, 3, 2).reshape(groups, batch * positions, -1)


def _unfold(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    inputs = inputs if inputs.dim() == 4 else inputs[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    return F.unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)


def row_groups(*tensors: Tensor | None, groups: int) -> list[list[Any]]:
    """Tensors [O, ...] cut into ``groups`` row groups: for each group one part of each tensor (None stays None)."""
    cut = [[None] * groups if t is None else list(t.chunk(groups)) for t in tensors]
    return [list(parts) for parts in zip(*cut, strict=True)]
