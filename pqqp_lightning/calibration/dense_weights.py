"""The layers' weights in the dense model, for stages that win back what earlier stages lost."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from pqqp_lightning.network.layers import Layer, matrix_shape, named_layers, weight_matrix
from pqqp_lightning.storage.disk_tensors import DiskTensors

_NAME = "_pqqp_dense_name"


def mark_layers(model: nn.Module) -> None:
    """Store each layer's name in the layer while the model is dense: removing blocks renumbers the others."""
    for name, layer in named_layers(model):
        vars(layer)[_NAME] = name


class DenseWeights:
    """The weight matrices of all layers of a dense model, mapped from a temporary file.

    Args:
        model: dense; its layers are marked (:func:`mark_layers`).
        folder: on a disk with space for a copy of the weights.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self._disk = DiskTensors(folder)
        self._weights: dict[str, Tensor] = {}
        for _, layer in named_layers(model):
            if _NAME in vars(layer):
                self._weights[vars(layer)[_NAME]] = self._disk.put(weight_matrix(layer).clone())

    def of(self, layer: Layer) -> Tensor | None:
        """The matrix [O, I] that ``layer`` had, on its device; None if the layer is new or of another shape."""
        weight = self._weights.get(vars(layer).get(_NAME, ""))
        if weight is None or tuple(weight.shape) != matrix_shape(layer):
            return None
        return weight.to(layer.weight.device)
