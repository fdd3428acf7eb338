"""Counted size: what storing the model takes, from the constraints that its weights carry, never from intentions.

Codes, scales, zero points, masks or N:M positions, and everything untouched as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from pqqp_lightning.checkpoint.encoding import encode_weight, stored_constraints, stored_tensors, weight_owner
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.layers import LAYER_TYPES, is_adapter
from pqqp_lightning.storage.reports import SizeNumbers


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
        adapter: whether it stands beside a layer and none of its entries takes the place of a dense weight.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    zeros: int
    pruned: int
    size_bytes: int
    adapter: bool = False

    @property
    def entries(self) -> int:
        """Entries of the matrix."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class ModelSize:
    """The counted size of a model.

    Attributes:
        size_bytes: the whole model.
        layers: the targeted layers, or what has come in their place.
        entries: targeted weights of the dense model: what fractions are taken of.
    """

    size_bytes: int
    layers: list[LayerSize]
    entries: int

    @property
    def sparsity(self) -> float:
        """Fraction of the targeted weights that are zero or gone."""
        return self._missing(sum(layer.entries - layer.zeros for layer in self.layers if not layer.adapter))

    @property
    def pruned(self) -> float:
        """Fraction of the targeted weights that masks or smaller shapes remove; further zeros come from rounding."""
        return self._missing(sum(layer.entries - layer.pruned for layer in self.layers if not layer.adapter))

    def _missing(self, left: int) -> float:
        """What ``left`` entries lack of the dense ones; nothing where no layer is targeted."""
        return max(0.0, 1 - left / self.entries) if self.entries else 0.0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits (codes, scales, zero points, masks, adapters) for each targeted weight of the dense model."""
        return 8 * sum(layer.size_bytes for layer in self.layers) / max(1, self.entries)

    def nominal_rate(self, original_bits: int) -> float:
        """Nominal C = B_orig / (B_Q * (1 - p)) over the targeted weights: without scales, masks and the rest."""
        stored = sum(layer.bits * (layer.entries - layer.pruned) for layer in self.layers)
        return original_bits * self.entries / stored if stored else 1.0


def measure_size(model: nn.Module, targeted: Iterable[str], dense_entries: int | None = None) -> ModelSize:
    """Count ``model``.

    Args:
        model: as it is.
        targeted: names of the layers that zeros and bits per weight are taken over; what lies below such a name (the
            base layer and the adapter of ``q_proj``) counts as it.
        dense_entries: their weights in the dense model; by default those that are found.
    """
    tensors, _ = stored_tensors(model)
    modules = dict(model.named_modules())
    wanted = set(targeted)
    total, layers = 0, []
    for name, tensor in tensors.items():
        owner, hidden = weight_owner(name)
        layer = modules.get(owner)
        if not isinstance(layer, LAYER_TYPES) or owner == name:
            total += tensor.numel() * tensor.element_size()
            continue
        constraints = stored_constraints(constraints_of(layer), hidden)
        bits = 8 * tensor.element_size()
        encoding = encode_weight(constraints, bits)
        total += encoding.size_bytes
        if _is_within(owner, wanted):
            entries = tensor.numel()
            value_bits = bits if constraints.grid is None else constraints.grid.bits
            zeros = entries - int(tensor.count_nonzero())
            pruned = entries - constraints.kept()
            counts = (value_bits, zeros, pruned, encoding.size_bytes)
            layers.append(LayerSize(owner, constraints.shape, *counts, adapter=is_adapter(layer)))
    return ModelSize(total, layers, sum(layer.entries for layer in layers) if dense_entries is None else dense_entries)


def _is_within(name: str, wanted: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in wanted for end in range(len(parts), 0, -1))


def size_numbers(size: ModelSize, original_bits: int) -> SizeNumbers:
    """What a record keeps of a size.

    Args:
        size: of the model.
        original_bits: bits of a dense weight.
    """
    return {
        "size_bytes": size.size_bytes,
        "nominal_rate": round(size.nominal_rate(original_bits), 6),
        "sparsity": size.sparsity,
        "pruned": size.pruned,
        "bits_per_weight": size.bits_per_weight if size.layers else float(original_bits),
    }


def layer_table(size: ModelSize) -> list[dict[str, Any]]:
    """The counted size layer by layer, as plain data."""
    return [asdict(layer) | {"shape": list(layer.shape)} for layer in size.layers]
