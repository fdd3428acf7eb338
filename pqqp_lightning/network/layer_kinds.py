"""The kinds of layers that stages compress, one entry each: how the weight holds its matrix, and what it multiplies."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pqqp_lightning.network.layouts import Layout
from pqqp_lightning.network.parameter_layers import Family, ParameterLayer


@dataclass(frozen=True)
class LayerKind:
    """A kind of layers.

    Attributes:
        name: for messages, in the plural.
        matches: whether an object is a layer of this kind.
        layout: how a weight holds its matrix.
        groups: the number of independent row groups.
        geometry: what determines the input rows besides the input.
        input_rows: the rows [groups, T, I], or [1, T, I] where groups get their inputs one by one, from an input.
        spatial: dimensions of the input behind the channels: 2 for images, 0 where the channels come last.
        called: whether the layer is a module that is called with its input, so that hooks see it.
        readable: whether calibration can read its inputs.
    """

    name: str
    matches: Callable[[object], bool]
    layout: Callable[[Any], Layout]
    groups: Callable[[Any], int] = lambda layer: 1
    geometry: Callable[[Any], tuple[object, ...]] = lambda layer: ("linear",)
    input_rows: Callable[[Any, Tensor], Tensor] = lambda layer, inputs: inputs.reshape(1, -1, inputs.shape[-1])
    spatial: int = 0
    called: bool = True
    readable: bool = True


def is_transposed_linear(module: object) -> bool:
    """Whether ``module`` is GPT-2's Conv1D, a Linear with a weight [I, O]; does not import transformers."""
    library = sys.modules.get("transformers.pytorch_utils")
    cls = getattr(library, "Conv1D", None)
    return cls is not None and isinstance(module, cls)


def _convolution(name: str, cls: type[nn.Module], spatial: int) -> LayerKind:
    return LayerKind(
        name,
        lambda layer: isinstance(layer, cls),
        layout=lambda layer: "channels_last",
        groups=lambda layer: layer.groups,
        geometry=_convolution_geometry,
        input_rows=_patches,
        spatial=spatial,
    )


def _convolution_geometry(layer: Any) -> tuple[object, ...]:
    return (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)


def _patches(layer: Any, inputs: Tensor) -> Tensor:
    """The patches [groups, T, I] that a convolution multiplies; I runs over kernel positions, then channels."""
    spatial = len(layer.kernel_size)
    if inputs.dim() == spatial + 1:  # a convolution also accepts one sample without a batch
        inputs = inputs[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)  # [B, C, *L]
    for dim, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        windows = windows.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]  # [B, C, *L, *k]
    batch, channels = windows.shape[:2]
    groups = layer.groups
    positions = windows.shape[2 : 2 + spatial].numel()
    windows = windows.reshape(batch, groups, channels // groups, positions, -1)  # [B, groups, C / groups, L, k]
    return windows.permute(1, 0, 3, 4, 2).reshape(groups, batch * positions, -1)


def _parameters(name: str, family: Family, readable: bool) -> LayerKind:
    return LayerKind(
        name,
        lambda layer: isinstance(layer, ParameterLayer) and layer.family == family,
        layout=_parameter_layout,
        groups=lambda layer: layer.groups,
        geometry=lambda layer: ("linear",) if layer.groups == 1 else ("groups", layer.groups),
        called=False,
        readable=readable,
    )


def _parameter_layout(layer: ParameterLayer) -> Layout:
    if layer.family != "experts":
        return "rows"
    return "stacked_transposed" if layer.transposed else "stacked"


KINDS = (
    LayerKind("Linear layers", lambda layer: isinstance(layer, nn.Linear), layout=lambda layer: "rows"),
    _convolution("Conv1d layers", nn.Conv1d, 1),
    _convolution("Conv2d layers", nn.Conv2d, 2),
    _convolution("Conv3d layers", nn.Conv3d, 3),
    LayerKind("Conv1D layers", is_transposed_linear, layout=lambda layer: "transposed"),
    _parameters("projections of nn.MultiheadAttention", "attention", readable=True),
    _parameters("recurrent weights", "recurrent", readable=False),
    _parameters("3-D expert weights", "experts", readable=True),
)


def kind_of(layer: object) -> LayerKind | None:
    """Return the kind of ``layer``, or None if it is not a layer that stages compress."""
    return next((kind for kind in KINDS if kind.matches(layer)), None)
