"""The dense model's weights, for stages that win back what earlier stages lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from pqqp_lightning.calibration.batch_norm import batch_norms
from pqqp_lightning.network.layers import (
    Layer,
    layout_of,
    matrix_shape,
    named_layers,
    set_weight_matrix,
    weight_matrix,
    weight_place,
)
from pqqp_lightning.network.layouts import as_matrix
from pqqp_lightning.network.offload import offload_of
from pqqp_lightning.storage.disk_tensors import DiskTensors

_NAME = "_pqqp_dense_name"
AS_STORED = ("rows", "transposed", "stacked")
"""Layouts whose matrix is a view of the weight."""
_STATISTICS = ("running_mean", "running_var")
"""Of a BatchNorm; stages estimate them again."""


def mark_layers(model: nn.Module) -> None:
    """Store each layer's name in the layer while the model is dense: removing blocks renumbers the others."""
    for name, layer in [*named_layers(model), *batch_norms(model).items()]:
        vars(layer)[_NAME] = name


class DenseWeights:
    """The weight matrices of all layers of a dense model, mapped from a temporary file, and its BatchNorm statistics.

    Args:
        model: dense; its layers are marked (:func:`mark_layers`).
        folder: on a disk with space for a copy of the weights.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self._disk = DiskTensors(folder)
        self._weights: dict[str, Tensor] = {}
        self._statistics: dict[str, list[Tensor]] = {}
        offload = offload_of(model)
        for _, layer in named_layers(model):
            if _NAME not in vars(layer):
                continue
            # The file that an offloaded model is mapped from has its dense weights already.
            original = offload.original(layer.weight) if layout_of(layer) in AS_STORED else None
            if original is not None:
                self._weights[vars(layer)[_NAME]] = as_matrix(original, layout_of(layer))
                continue
            holder, _ = weight_place(layer)
            with offload.turn(holder, read_only=True):
                self._weights[vars(layer)[_NAME]] = self._disk.put(weight_matrix(layer).clone())
        for norm in batch_norms(model).values():
            if _NAME in vars(norm):
                self._statistics[vars(norm)[_NAME]] = [getattr(norm, name).clone() for name in _STATISTICS]

    def of(self, layer: Layer) -> Tensor | None:
        """The matrix [O, I] that ``layer`` had, on its device; None if the layer is new or of another shape."""
        weight = self._weights.get(vars(layer).get(_NAME, ""))
        if weight is None or tuple(weight.shape) != matrix_shape(layer):
            return None
        return self._disk.copy(weight, layer.weight.device)

    @contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        """Inside, the layers and BatchNorms in ``module`` have the dense weights and statistics.

        They are written in place: a weight that is used functionally is recognised by its place in memory.
        """
        kept: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for _, layer in named_layers(module):
                if (dense := self.of(layer)) is not None:
                    kept.append((layer.weight, layer.weight.detach().clone()))
                    set_weight_matrix(layer, dense)
            for norm in batch_norms(module).values():
                for name, value in zip(_STATISTICS, self._statistics.get(vars(norm).get(_NAME, ""), ()), strict=False):
                    buffer = getattr(norm, name)
                    kept.append((buffer, buffer.clone()))
                    buffer.copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)
