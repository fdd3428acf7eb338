"""How a weight holds its matrix [O, I]: the layouts of the layer kinds, both ways.

Letters: O rows (outputs), I columns (inputs), C input channels, E groups (experts), k kernel positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

Layout = Literal["rows", "channels_last", "transposed", "stacked", "stacked_transposed"]
"""Of a weight: ``rows`` [O, I], ``channels_last`` [O, C, *k], ``transposed`` [I, O], ``stacked`` [E, O, I], and
``stacked_transposed`` [E, I, O]. The rows of a stacked weight's matrix [E * O, I] are those of the first expert, then
those of the second."""


def default_layout(dimensions: int) -> Layout:
    """Return the layout of a Linear (two dimensions) or of a convolution (more)."""
    return "rows" if dimensions == 2 else "channels_last"


def as_matrix(weight: Tensor, layout: Layout) -> Tensor:
    """Return ``weight`` as a matrix [O, I], differentiable: a view where the layout allows it, else a copy."""
    return _TO_MATRIX[layout](weight)


def as_weight(matrix: Tensor, shape: Sequence[int], layout: Layout) -> Tensor:
    """Return the matrix [O, I] as a weight of ``shape``: the inverse of :func:`as_matrix`."""
    return _TO_WEIGHT[layout](matrix, shape)


def _as_channels_last_weight(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    out, channels, *kernel = shape
    # Copy to the standard strides of this shape. torch takes a permuted 1x1 kernel for both contiguous and
    # channels_last, and oneDNN's strided backward pass then writes beyond its buffers (torch 2.15 on AVX2).
    return matrix.view(out, *kernel, channels).movedim(-1, 1).flatten().view(*shape)


def _as_stacked_transposed_weight(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    groups, columns, rows = shape
    return matrix.reshape(groups, rows, columns).transpose(1, 2).contiguous()


_TO_MATRIX: dict[Layout, Callable[[Tensor], Tensor]] = {
    "rows": lambda weight: weight,
    "channels_last": lambda weight: weight.movedim(1, -1).flatten(1),
    "transposed": lambda weight: weight.t().contiguous(),
    "stacked": lambda weight: weight.flatten(0, 1),
    "stacked_transposed": lambda weight: weight.transpose(1, 2).flatten(0, 1),
}
_TO_WEIGHT: dict[Layout, Callable[[Tensor, Sequence[int]], Tensor]] = {
    "rows": lambda matrix, shape: matrix,
    "channels_last": _as_channels_last_weight,
    "transposed": lambda matrix, shape: matrix.t().contiguous(),
    "stacked": lambda matrix, shape: matrix.reshape(*shape),
    "stacked_transposed": _as_stacked_transposed_weight,
}
