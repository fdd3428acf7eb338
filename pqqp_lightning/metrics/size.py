"""Counted size: what storing the model takes, from the constraints that its weights carry, never from intentions.

Codes, scales, zero points, masks or N:M positions, and everything untouched as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from pqqp_lightning.modules.constraints import constraints_of
from pqqp_lightning.modules.encoding import encode_weight, stored_tensors
from pqqp_lightning.modules.layers import LAYER_TYPES


@dataclass(frozen=True)
class LayerSize:
    """One targeted layer's weight.

    Attributes:
        name: module name.
        shape: (O, I).
        bits: bits of a stored value.
        zeros: entries that are zero.
        pruned: entries that the mask removes.
        size_bytes: bytes stored.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    zeros: int
    pruned: int
    size_bytes: int

    @property
    def entries(self) -> int:
        """Entries of the matrix."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class ModelSize:
    """The counted size of a model.

    Attributes:
        size_bytes: the whole model.
        layers: the targeted layers.
    """

    size_bytes: int
    layers: list[LayerSize]

    @property
    def entries(self) -> int:
        """Targeted weights in all."""
        return sum(layer.entries for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Zeros among the targeted weights."""
        return sum(layer.zeros for layer in self.layers) / max(1, self.entries)

    @property
    def pruned(self) -> float:
        """Fraction of the targeted weights that masks remove; further zeros come from rounding."""
        return sum(layer.pruned for layer in self.layers) / max(1, self.entries)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits (codes, scales, zero points and masks) for each targeted weight."""
        return 8 * sum(layer.size_bytes for layer in self.layers) / max(1, self.entries)

    def nominal_rate(self, original_bits: int) -> float:
        """Nominal C = B_orig / (B_Q * (1 - p)) over the targeted weights: without scales, masks and the rest."""
        stored = sum(layer.bits * (layer.entries - layer.pruned) for layer in self.layers)
        return original_bits * self.entries / stored if stored else 1.0


def measure_size(model: nn.Module, targeted: Iterable[str]) -> ModelSize:
    """Count ``model``; ``targeted`` names the layers that zeros and bits per weight are taken over."""
    tensors, _ = stored_tensors(model)
    modules = dict(model.named_modules())
    wanted = set(targeted)
    total, layers = 0, []
    for name, tensor in tensors.items():
        owner = name.removesuffix(".weight")
        layer = modules.get(owner)
        if not isinstance(layer, LAYER_TYPES) or owner == name:
            total += tensor.numel() * tensor.element_size()
            continue
        constraints = constraints_of(layer)
        bits = 8 * tensor.element_size()
        encoding = encode_weight(constraints, bits)
        total += encoding.size_bytes
        if owner in wanted:
            entries = tensor.numel()
            value_bits = bits if constraints.grid is None else constraints.grid.bits
            zeros = entries - int(tensor.count_nonzero())
            pruned = entries - constraints.kept()
            layers.append(LayerSize(owner, constraints.shape, value_bits, zeros, pruned, encoding.size_bytes))
    return ModelSize(total, layers)
