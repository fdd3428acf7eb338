"""Linear and Conv2d layers as matrices: a weight [O, I] and calibration inputs [groups, T, I].

The columns of a convolution run over (kernel row, kernel column, input channel). With the channels last, N:M patterns
and quantization groups lie along input channels, as sparse hardware requires.
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
    """Mark ``module`` and its submodules as an adapter: it is saved and counted, but later stages do not touch it."""
    for part in module.modules():
        part.__dict__[_ADAPTER] = True


def is_adapter(module: nn.Module) -> bool:
    """Whether ``module`` belongs to an adapter."""
    return module.__dict__.get(_ADAPTER, False)


def weight_matrix(layer: Layer) -> Tensor:
    """Return the weight as a matrix [O, I]: a view for a Linear, a copy for a Conv2d."""
    weight = layer.weight.detach()
    return weight.permute(0, 2, 3, 1).flatten(1) if isinstance(layer, nn.Conv2d) else weight


def to_weight(matrix: Tensor, shape: torch.Size | list[int]) -> Tensor:
    """Return the matrix [O, I] in the layout of a weight of ``shape``: the inverse of :func:`weight_matrix`."""
    if len(shape) == 2:
        return matrix
    out, channels, height, width = shape
    # Copy to the standard strides of this shape. torch takes a permuted 1x1 kernel for both contiguous and
    # channels_last, and oneDNN's strided backward pass then writes beyond its buffers (torch 2.15 on AVX2).
    return matrix.view(out, height, width, channels).permute(0, 3, 1, 2).flatten().view(shape)


def is_packed(layer: Layer) -> bool:
    """Whether the weight holds codes that only the layer's own kernels read, as in bitsandbytes layers."""
    weight = layer.weight
    return not weight.is_floating_point() or (isinstance(layer, nn.Linear) and weight.shape[0] != layer.out_features)


def set_weight_matrix(layer: Layer, matrix: Tensor) -> None:
    """Write ``matrix`` [O, I] into the layer's weight, in place."""
    with torch.no_grad():
        layer.weight.copy_(to_weight(matrix, layer.weight.shape))


def columns_of(layer: Layer) -> int:
    """Return I, the columns of the weight matrix."""
    return layer.weight[0].numel()


def groups_of(layer: Layer) -> int:
    """Return the number of independent row groups: the groups of a convolution, else 1."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def is_depthwise(layer: nn.Module) -> bool:
    """Whether ``layer`` is a depthwise convolution: each filter reads one channel, so that it has few weights."""
    groups = getattr(layer, "groups", 1)
    return groups > 1 and groups == getattr(layer, "in_channels", None)


def geometry(layer: Layer) -> tuple[object, ...]:
    """Return what determines a layer's input rows besides its input: layers of equal geometry share statistics."""
    if isinstance(layer, nn.Linear):
        return ("linear",)
    return (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)


def input_rows(layer: Layer, inputs: Tensor) -> Tensor:
    """Return the rows [groups, T, I] that the layer multiplies its matrix with, from its input."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(1, -1, inputs.shape[-1])
    if inputs.dim() == 3:  # Conv2d also accepts one image without a batch
        inputs = inputs[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)  # [B, C * kh * kw, L]
    batch, _, positions = patches.shape
    groups = layer.groups
    kernel = layer.kernel_size[0] * layer.kernel_size[1]
    patches = patches.view(batch, groups, -1, kernel, positions)  # [B, groups, C / groups, kernel, L]
    # The columns of the weight matrix run over kernel positions, then channels.
    return patches.permute(1, 0, 4, 3, 2).reshape(groups, batch * positions, -1)


def row_groups(*tensors: Tensor | None, groups: int) -> list[list[Any]]:
    """Split tensors [O, ...] into ``groups`` row groups: for each group one part of each tensor (None stays None)."""
    chunks = [[None] * groups if tensor is None else list(tensor.chunk(groups)) for tensor in tensors]
    return [list(parts) for parts in zip(*chunks, strict=True)]
