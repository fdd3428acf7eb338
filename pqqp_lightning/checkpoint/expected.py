"""The size that a model will have after stages, from shapes and arguments, before anything runs.

A stage changes the expected weights as it will change the real ones (``Stage.expected_weights``). The bytes then come
from the same encoding as the counted size. Two things are left to the data:

- Scales are float16 unless one of a layer is smaller than the smallest normal float16. Of a layer that earlier stages
  left alone this is read from the dense weights. Of others float32 is expected where the dense scales come within
  :data:`MARGIN` of that limit.
- A mask on a mask, an allocation of bits or sparsities: the number is then an upper bound, or exact up to rounding,
  and ``exact`` is False.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pqqp_lightning.algorithms.codebook import Codebook
from pqqp_lightning.algorithms.grid import SMALLEST_HALF, fit_codebook, span_range
from pqqp_lightning.algorithms.packing import packed_bytes
from pqqp_lightning.algorithms.selection import Pattern
from pqqp_lightning.checkpoint.encoding import encode_numbers, stored_tensors
from pqqp_lightning.checkpoint.size import is_within
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.layers import Layer, matrix_shape, named_layers, stored_weights, weight_matrix

MARGIN = 4.0
"""How far a stage may shrink a layer's smallest scale before its scales need float32 unexpectedly."""
LARGEST_HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class ExpectedGrid:
    """The grid that a weight will be on.

    Attributes:
        bits: of a code; an average where the data chooses them.
        scales: number of scales.
        scale_bytes: bytes of one scale.
        zero_bits: bits of one zero point; 0 for a symmetric grid.
    """

    bits: float
    scales: int
    scale_bytes: int
    zero_bits: int = 0


@dataclass(frozen=True)
class ExpectedWeight:
    """What will be stored of one weight matrix [O, I].

    Attributes:
        shape: (O, I).
        entry_bits: bits of an entry without a grid.
        source: name of the dense layer that it comes from; None for a layer that a stage has made.
        changed: whether a stage may have changed its values.
        kept: entries that the mask keeps; None without a mask.
        row_kept: entries that it keeps of every row, if that is the same number for all.
        pattern: (N, M) of the mask.
        grid: the grid, or None.
        exact: whether ``kept`` and ``grid`` are what will be counted, and not an upper bound.
    """

    shape: tuple[int, int]
    entry_bits: int
    source: str | None = None
    changed: bool = False
    kept: int | None = None
    row_kept: int | None = None
    pattern: Pattern | None = None
    grid: ExpectedGrid | None = None
    exact: bool = True

    @property
    def entries(self) -> int:
        """Number of entries of the matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def stored(self) -> int:
        """Number of entries that are stored."""
        return self.entries if self.kept is None else self.kept

    def size_bytes(self, hidden: bool = False) -> int:
        """Bytes of the stored weight; ``hidden`` for the original of a parametrized one, which is on no grid."""
        pattern = self.pattern if self.exact else None  # positions need exactly N of every M
        grid = None if hidden else self.grid
        if grid is None:
            return encode_numbers(self.entries, self.kept, pattern, self.entry_bits).size_bytes
        scale, zero = grid.scales * grid.scale_bytes, packed_bytes(grid.scales, grid.zero_bits)
        return encode_numbers(self.entries, self.kept, pattern, grid.bits, scale, zero).size_bytes

    def with_pattern(self, pattern: Pattern) -> ExpectedWeight:
        """The weight after pruning to N of every M columns."""
        n, m = pattern
        row = self.shape[1] * n // m
        most = row * self.shape[0]
        if self.kept is None or (self.pattern == pattern and self.kept == most):
            return replace(self, kept=most, row_kept=row, pattern=pattern, changed=True)
        return replace(
            self, kept=min(self.kept, most), row_kept=None, pattern=pattern, changed=True, exact=False
        )  # fmt: skip

    def with_sparsity(self, sparsity: float, parts: int) -> ExpectedWeight:
        """The weight after pruning; each of ``parts`` equal parts loses the same number of entries.

        Entries that an earlier mask removed count, so a part keeps the smaller of both numbers.
        """
        size = self.entries // parts
        most = size - round(sparsity * size)  # of a part
        by_row = parts == self.shape[0]
        if self.kept is None:
            return replace(self, kept=most * parts, row_kept=most if by_row else None, changed=True)
        if parts == 1:
            kept = min(self.kept, most)
            return replace(self, kept=kept, row_kept=self.row_kept if kept == self.kept else None, changed=True)
        if self.row_kept is None:
            return replace(self, kept=min(self.kept, most * parts), changed=True, exact=False)
        before = self.row_kept * (self.shape[0] // parts)
        if before <= most:
            return replace(self, changed=True)
        return replace(self, kept=most * parts, row_kept=most if by_row else None, changed=True)

    def resized(self, shape: tuple[int, int]) -> ExpectedWeight:
        """The weight with fewer rows and columns, as ``Constraints.select`` leaves its constraints."""
        if shape == self.shape:
            return self
        grid = self.grid
        if grid is not None and grid.scales > 1:
            grid = replace(grid, scales=grid.scales // self.shape[0] * shape[0])
        new = replace(self, shape=shape, grid=grid, changed=True)
        if self.kept is None:
            return new
        if shape[1] == self.shape[1] and self.row_kept is not None:
            return replace(new, kept=self.row_kept * shape[0])
        pattern = self.pattern if shape[1] == self.shape[1] else None
        return replace(new, kept=min(self.kept, new.entries), row_kept=None, pattern=pattern, exact=False)


@dataclass
class DenseScales:
    """The scales that the dense model's weights would get, read once for each kind of grid.

    Attributes:
        layers: of the dense model, by name.
    """

    layers: Mapping[str, Layer]
    _known: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def bytes_of(
        self, weight: ExpectedWeight, bits: int, group_size: int | None, *, symmetric: bool, per_tensor: bool
    ) -> tuple[int, bool]:
        """Bytes of one scale of a uniform grid, and whether that is certain."""
        if weight.source is None:
            return 4, False

        def measure(matrix: Tensor) -> tuple[float, float]:
            if group_size is not None and matrix.shape[1] % group_size:  # narrower now than in the dense model
                return span_range(matrix, symmetric=symmetric)
            return span_range(matrix, group_size=group_size, symmetric=symmetric, per_tensor=per_tensor)

        smallest, largest = self._once((weight.source, group_size, symmetric, per_tensor), measure)
        levels = torch.tensor(2**bits - 1)
        scales = torch.tensor([smallest, largest]) / levels  # float32, as fit_grid computes them
        lowest, highest = float(scales[0]), float(scales[1])
        if not weight.changed:
            return (2 if lowest >= SMALLEST_HALF and highest <= LARGEST_HALF else 4), True
        is_near = lowest < MARGIN * SMALLEST_HALF or highest > LARGEST_HALF / MARGIN
        return (4, False) if is_near else (2, True)

    def codebook_bytes_of(self, weight: ExpectedWeight, codebook: Codebook, group_size: int) -> tuple[int, bool]:
        """Bytes of one scale of a codebook's grid, and whether that is certain."""
        if weight.source is None:
            return 4, weight.entry_bits == 32

        def measure(matrix: Tensor) -> int:
            if matrix.shape[1] % group_size:
                return 4
            return fit_codebook(matrix, codebook, group_size).scale.element_size()

        dense_bytes = self._once((weight.source, codebook, group_size), measure)
        if not weight.changed:
            return dense_bytes, True
        return 4, dense_bytes == 4

    def _once(self, key: tuple[Any, ...], measure: Any) -> Any:
        if key not in self._known:
            self._known[key] = measure(weight_matrix(self.layers[key[0]]))
        return self._known[key]


@dataclass(frozen=True)
class ExpectedWeights:
    """The weights of a model's layers after some stages.

    Attributes:
        weights: by the layer's name.
        dense: the dense model's scales.
        exact: False if a stage's structure depends on the data.
    """

    weights: Mapping[str, ExpectedWeight]
    dense: DenseScales
    exact: bool = True

    def changed(self, weights: Mapping[str, ExpectedWeight], exact: bool = True) -> ExpectedWeights:
        """These weights with some of them replaced; ``exact`` is False if the data decides more than they say."""
        return replace(self, weights={**self.weights, **weights}, exact=self.exact and exact)

    def all_changed(self) -> ExpectedWeights:
        """These weights with values that are not the dense ones."""
        return self.values_changed(self.weights)

    def values_changed(self, names: Iterable[str]) -> ExpectedWeights:
        """These weights with other values in the layers ``names``, whose masks and grids stay."""
        return self.changed({name: replace(self.weights[name], changed=True) for name in names})

    def moved(self, before: Mapping[str, Layer], model: nn.Module) -> ExpectedWeights:
        """The weights after ``model`` got another structure.

        Args:
            before: its layers by name before the change; a layer that is still there keeps what is known of it.
            model: with its new structure.
        """
        names = {id(layer): name for name, layer in before.items()}
        weights = {}
        for name, layer in named_layers(model):
            if id(layer) in names:
                weights[name] = self.weights[names[id(layer)]].resized(matrix_shape(layer))
            else:
                weights[name] = ExpectedWeight(matrix_shape(layer), 8 * layer.weight.element_size(), changed=True)
        return replace(self, weights=weights)


@dataclass(frozen=True)
class ExpectedSize:
    """The expected size of a model.

    Attributes:
        size_bytes: of the whole model.
        layer_bytes: of the targeted layers' weights.
        exact: whether the counted size will be the same; otherwise the numbers are upper bounds, or exact up to the
            rounding to whole bytes where an allocation has one total.
    """

    size_bytes: int
    layer_bytes: int
    exact: bool


class Structure:
    """The tensors of a model: its layers' weights, and the bytes of everything else.

    Args:
        model: may be weightless.
        targeted: names of the layers of the dense model that stages act on; layers below these names count to them.
    """

    def __init__(self, model: nn.Module, targeted: set[str]) -> None:
        tensors, _ = stored_tensors(model)
        found = stored_weights(model)
        self._weights: list[tuple[str, bool, bool]] = []  # (layer, hidden, targeted)
        self._rest_bytes = 0
        for name, tensor in tensors.items():
            if name in found:
                layer, _, hidden = found[name]
                self._weights.append((layer, hidden, is_within(layer, targeted)))
            else:
                self._rest_bytes += tensor.numel() * tensor.element_size()

    def size(self, expected: ExpectedWeights) -> ExpectedSize:
        """The size with ``expected`` weights."""
        total, layers, exact = self._rest_bytes, 0, expected.exact
        for name, hidden, within in self._weights:
            weight = expected.weights[name]
            size_bytes = weight.size_bytes(hidden)
            total += size_bytes
            layers += size_bytes if within else 0
            exact = exact and weight.exact
        return ExpectedSize(total, layers, exact)


def dense_weights(model: nn.Module) -> ExpectedWeights:
    """The weights of ``model`` as they are."""
    layers = dict(named_layers(model))
    weights = {}
    for name, layer in layers.items():
        held = constraints_of(layer)
        grid = None
        if held.grid is not None:
            zero_bits = 0 if held.grid.zero is None else held.grid.bits
            scale = held.grid.scale
            grid = ExpectedGrid(held.grid.bits, scale.numel(), scale.element_size(), zero_bits)
        kept = None if held.mask_bits is None else held.kept()
        bits = 8 * layer.weight.element_size()
        weights[name] = ExpectedWeight(held.shape, bits, name, kept=kept, pattern=held.pattern, grid=grid)
    return ExpectedWeights(weights, DenseScales(layers))
