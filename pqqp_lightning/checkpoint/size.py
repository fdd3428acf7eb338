"""Counted size: the bytes that storing the model takes, computed from its weights and their actual constraints.

It counts codes, scales, zero points, masks or N:M positions, and every other tensor unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from pqqp_lightning.checkpoint.encoding import encode_weight, stored_constraints, stored_tensors
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.coverage import count_parameters
from pqqp_lightning.network.layers import is_adapter, stored_weights
from pqqp_lightning.network.offload import offload_of
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
        adapter: whether it belongs to an adapter, whose entries replace no dense weight.
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
        """Number of entries of the matrix."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class ModelSize:
    """The counted size of a model.

    Attributes:
        size_bytes: the whole model.
        layers: the targeted layers, or the layers that replaced them.
        entries: number of targeted weights of the dense model, to which fractions refer.
        parameters: number of all parameters of the dense model.
        parameter_bytes: bytes stored for all parameters, without buffers.
    """

    size_bytes: int
    layers: list[LayerSize]
    entries: int
    parameters: int = 0
    parameter_bytes: int = 0

    @property
    def sparsity(self) -> float:
        """Fraction of the targeted weights that are zero or removed."""
        return self._missing(sum(layer.entries - layer.zeros for layer in self.layers if not layer.adapter))

    @property
    def pruned(self) -> float:
        """Fraction of the targeted weights that masks or smaller shapes remove; further zeros come from rounding."""
        return self._missing(sum(layer.entries - layer.pruned for layer in self.layers if not layer.adapter))

    def _missing(self, remaining: int) -> float:
        """The fraction of the dense entries that is missing when ``remaining`` are left; 0 if no layer is targeted."""
        return max(0.0, 1 - remaining / self.entries) if self.entries else 0.0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits (codes, scales, zero points, masks, adapters) for each targeted weight of the dense model."""
        return 8 * sum(layer.size_bytes for layer in self.layers) / max(1, self.entries)

    def model_sparsity(self, nonzero: int) -> float:
        """Compute the fraction of the dense model's parameters that are zero or removed when ``nonzero`` are not."""
        return max(0.0, 1 - nonzero / self.parameters) if self.parameters else 0.0

    @property
    def model_bits_per_weight(self) -> float:
        """Stored bits of all parameters (with adapters) for each parameter of the dense model."""
        return 8 * self.parameter_bytes / max(1, self.parameters)

    def nominal_rate(self, original_bits: int) -> float:
        """Compute nominal C = B_orig / (B_Q * (1 - p)) over the targeted weights, without scales and masks."""
        stored = sum(layer.bits * (layer.entries - layer.pruned) for layer in self.layers)
        return original_bits * self.entries / stored if stored else 1.0


def measure_size(
    model: nn.Module,
    targeted: Iterable[str],
    dense_entries: int | None = None,
    dense_parameters: int | None = None,
) -> ModelSize:
    """Count the size of ``model``.

    Args:
        model: in its current state.
        targeted: names of the layers that sparsity and bits per weight refer to, with all layers below these names (the
            base layer and the adapter of ``q_proj``).
        dense_entries: number of their weights in the dense model; by default the number in ``model``.
        dense_parameters: number of all parameters of the dense model; by default the number in ``model``.
    """
    tensors, _ = stored_tensors(model)
    weights = stored_weights(model)
    targeted_names = set(targeted)
    total = 0
    layers = []
    for name, tensor in offload_of(model).visit(tensors.items()):
        if name not in weights:
            total += tensor.numel() * tensor.element_size()
            continue
        owner, layer, hidden = weights[name]
        constraints = stored_constraints(constraints_of(layer), hidden)
        bits = 8 * tensor.element_size()
        encoding = encode_weight(constraints, bits)
        total += encoding.size_bytes
        if is_within(owner, targeted_names):
            entries = tensor.numel()
            layers.append(
                LayerSize(
                    owner,
                    constraints.shape,
                    bits=bits if constraints.grid is None else constraints.grid.bits,
                    zeros=entries - int(tensor.count_nonzero()),
                    pruned=entries - constraints.kept(),
                    size_bytes=encoding.size_bytes,
                    adapter=is_adapter(layer),
                )
            )
    if dense_entries is None:
        dense_entries = sum(layer.entries for layer in layers)
    if dense_parameters is None:
        dense_parameters = count_parameters(model)
    parameter_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = [tensor for name, tensor in tensors.items() if name not in parameter_names]
    buffer_bytes = sum(tensor.numel() * tensor.element_size() for tensor in buffers)
    return ModelSize(total, layers, dense_entries, dense_parameters, total - buffer_bytes)


def is_within(name: str, parents: set[str]) -> bool:
    """Whether ``name`` is one of ``parents`` or lies below one."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in parents for end in range(len(parts), 0, -1))


def size_numbers(size: ModelSize, original_bits: int, nonzero: int) -> SizeNumbers:
    """What a record keeps of a size.

    Args:
        size: of the model.
        original_bits: bits of a dense weight.
        nonzero: number of parameters of the model that are not zero, without adapters.
    """
    return {
        "size_bytes": size.size_bytes,
        "nominal_rate": round(size.nominal_rate(original_bits), 6),
        "sparsity": size.sparsity,
        "pruned": size.pruned,
        "bits_per_weight": size.bits_per_weight if size.layers else float(original_bits),
        "model_sparsity": size.model_sparsity(nonzero),
        "model_bits_per_weight": size.model_bits_per_weight,
    }


def layer_table(size: ModelSize) -> list[dict[str, Any]]:
    """Return the counted size of each layer as plain data."""
    return [asdict(layer) | {"shape": list(layer.shape)} for layer in size.layers]
