"""Quantization grids: every entry is a scale times a level, and a code of ``bits`` bits selects the level.

Uniform grids: entry = ``scale * (code - zero)``. Symmetric ones have the 2^b levels -2^(b-1) .. 2^(b-1) - 1 and
scale = 2 * max|w| / (2^b - 1). Asymmetric ones span min(w, 0) .. max(w, 0) with an integer zero point (OPTQ, arXiv
2210.17323, and its code). Grids with a codebook: entry = ``scale * level[code]``, scale = max|w| (``codebook.py``).

0 is on every grid, so that pruned entries stay zero. Scales are stored, and therefore kept in float16 where that is
precise enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pqqp_lightning.algorithms.codebook import Codebook, bounds_of, levels_of

SMALLEST_HALF = 2.0**-14
"""The smallest normal float16. Smaller scales are kept in float32, since float16 loses precision there."""

CLIP_FACTORS = tuple(1 - step / 40 for step in range(-3, 21) if step)
"""Fractions of a group's range that the clipping search tries besides 1: 1.075 down to 0.5."""

CLIP_NORM = 2.4
"""Exponent of the clipping search's error (OPTQ's code)."""

PIECE = 2**18
"""Weights times trials that the clipping search handles at a time on a CPU: about what a cache holds."""

GPU_PIECE = 2**24
"""The same for a GPU: enough to keep it busy."""

SMALLEST_SCALE = 1e-38
"""Lower limit of a codebook's scale in divisions: a block of zeros has scale 0."""


@dataclass(frozen=True)
class Grid:
    """A quantization grid for a matrix [O, I].

    Attributes:
        bits: 2 to 8.
        scale: [O, G], or [1, 1] for the whole matrix; float16 or float32.
        zero: uint8 [O, G] zero points, or None for a symmetric grid (zero point ``2**(bits - 1)``).
        columns: I; ``columns / G`` is the group size.
        codebook: the name of the levels; None for integer levels.
    """

    bits: int
    scale: Tensor
    zero: Tensor | None
    columns: int
    codebook: Codebook | None = None

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.columns // self.scale.shape[1]

    @property
    def levels(self) -> int:
        """The highest code."""
        return 2**self.bits - 1

    def expanded_scale(self) -> Tensor:
        """Scales in float32, [O or 1, I or 1]: broadcasts against the matrix."""
        return self._expand(self.scale.float())

    def expanded_zero(self) -> Tensor | float:
        """Zero points in float32, [O or 1, I or 1], or the one zero point of a symmetric grid."""
        return self.middle if self.zero is None else self._expand(self.zero.float())

    @property
    def middle(self) -> float:
        """The zero point of a symmetric grid."""
        return 2.0 ** (self.bits - 1)

    def is_like(self, other: Grid) -> bool:
        """Whether both differ in their scales and zero points alone: same bits, levels, groups and symmetry."""
        shape = (self.bits, self.codebook, self.columns, self.scale.shape, self.zero is None)
        return shape == (other.bits, other.codebook, other.columns, other.scale.shape, other.zero is None)

    def to(self, device: torch.device) -> Grid:
        """Return the same grid on another device."""
        zero = None if self.zero is None else self.zero.to(device)
        return replace(self, scale=self.scale.to(device), zero=zero)

    def chunk(self, groups: int) -> list[Grid]:
        """Split the grid by rows, for a matrix that is split into ``groups`` row groups."""
        if self.scale.shape[0] == 1:  # one scale for all rows serves every group
            return [self] * groups
        zeros = [None] * groups if self.zero is None else self.zero.chunk(groups)
        return [replace(self, scale=s, zero=z) for s, z in zip(self.scale.chunk(groups), zeros, strict=True)]

    def nearest(self, weight: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
        """Return the nearest codes to float32 ``weight``, of float or integer dtype; scale and zero broadcast to it."""
        if self.codebook is None:
            return (weight / scale).round_().add_(zero).clamp_(0, self.levels)
        # Multiply by the reciprocal instead of dividing, as bitsandbytes does: the codes then agree bit for bit.
        return torch.bucketize(weight * scale.clamp(min=SMALLEST_SCALE).reciprocal(), bounds_of(self.codebook, weight))

    def values(self, codes: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
        """Decode ``codes`` to float32; scale and zero broadcast to them. Float codes are overwritten."""
        if self.codebook is None:
            return codes.sub_(zero).mul_(scale)
        levels = levels_of(self.codebook, codes)
        return levels.index_select(0, codes.flatten()).view(codes.shape).mul_(scale)

    def _expand(self, x: Tensor) -> Tensor:
        return x if x.shape[1] == 1 else x.repeat_interleave(self.group_size, dim=1)


@dataclass(frozen=True)
class Quantized:
    """Weights [O, I] that lie on ``grid``."""

    weight: Tensor
    grid: Grid


def fit_grid(
    weight: Tensor,
    bits: int,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    per_tensor: bool = False,
    clip: bool = False,
    importance: Tensor | None = None,
) -> Grid:
    """Fit a uniform grid to the range of ``weight``: per group of columns, per output row (the default) or as a whole.

    Args:
        weight: [O, I].
        bits: 2 to 8.
        group_size: columns that share a scale; None for whole rows.
        symmetric: use no zero points.
        per_tensor: one scale for the whole matrix.
        clip: search each scale among those of ranges scaled by :data:`CLIP_FACTORS` and 1. The search minimizes the sum
            of |w - q(w)|^2.4 (the ``mse`` search of OPTQ's code), or of importance * (w - q(w))^2 if ``importance`` is
            given. The sum is never larger than without the search.
        importance: [I], weight of each column's squared error.
    """
    columns = weight.shape[1]
    w = weight.float()
    grouped = w.reshape(1, 1, -1) if per_tensor else w.unflatten(1, (-1, group_size or columns))  # [O, G, size]
    lowest = grouped.amin(-1).clamp(max=0)
    highest = grouped.amax(-1).clamp(min=0)
    grid = _spanning(lowest, highest, bits, symmetric, columns)
    if not clip:
        return grid
    if importance is not None and per_tensor:
        importance = importance.expand_as(w).reshape(grouped.shape)  # [1, 1, O * I]
    elif importance is not None:
        importance = importance.view_as(grouped[:1])  # [1, G, size]
    factors = torch.tensor((1.0, *CLIP_FACTORS), device=w.device)[:, None, None]  # 1 first: argmin prefers it on ties
    trials = _spanning(lowest * factors, highest * factors, bits, symmetric, columns, grid.scale.dtype)
    best = factors.view(-1)[_clip_errors(grouped.contiguous(), trials, importance).argmin(0)]
    return _spanning(lowest * best, highest * best, bits, symmetric, columns, grid.scale.dtype)


def span_range(
    weight: Tensor, *, group_size: int | None = None, symmetric: bool = True, per_tensor: bool = False
) -> tuple[float, float]:
    """Return the smallest positive and the largest span of the groups that :func:`fit_grid` gives one scale each.

    Without a positive span both are what a group of zeros gets. Arguments as in :func:`fit_grid`.
    """
    w = weight.float()
    grouped = w.reshape(1, 1, -1) if per_tensor else w.unflatten(1, (-1, group_size or weight.shape[1]))
    span = _spans(grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0), symmetric)
    positive = span[span > 0]
    return (1.0, 1.0) if not len(positive) else (float(positive.min()), float(positive.max()))


def fit_codebook(weight: Tensor, codebook: Codebook, group_size: int | None = None) -> Grid:
    """Fit a codebook's grid to ``weight`` [O, I]: one scale max|w| for every ``group_size`` columns of a row.

    Scales are exact: they are float16 only if float16 represents all of them, as for float16 weights.
    """
    columns = weight.shape[1]
    scale = weight.float().abs().unflatten(1, (-1, group_size or columns)).amax(-1)
    half = scale.half()
    return Grid(4, half if torch.equal(half.float(), scale) else scale, None, columns, codebook)


def encode(weight: Tensor, grid: Grid) -> Tensor:
    """Return the nearest codes, uint8 [O, I], in 0 .. 2^bits - 1."""
    return grid.nearest(weight.float(), grid.expanded_scale(), grid.expanded_zero()).to(torch.uint8)


def decode(codes: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weights [O, I] that ``codes`` represent."""
    # A uniform grid computes with the codes; a codebook looks levels up by them.
    numbers = codes.to(torch.float32 if grid.codebook is None else torch.int32, copy=True)
    groups = numbers.unflatten(1, (grid.scale.shape[1], -1))  # [O, G, size]: scales broadcast without being repeated
    zero = grid.middle if grid.zero is None else grid.zero.float()[..., None]
    return grid.values(groups, grid.scale.float()[..., None], zero).flatten(1).to(dtype)


def round_to_grid(weight: Tensor, grid: Grid) -> Tensor:
    """Return the nearest weights on the grid, in the dtype of ``weight``."""
    return decode(encode(weight, grid), grid, weight.dtype)


def concatenate_columns(grids: Sequence[Grid]) -> Grid:
    """Join the grids of a matrix's column groups [O, G], left to right."""
    scale = torch.cat(_scales_of_one_dtype(grids), dim=1)
    zeros = [grid.zero for grid in grids if grid.zero is not None]
    zero = torch.cat(zeros, dim=1) if zeros else None
    return replace(grids[0], scale=scale, zero=zero, columns=sum(grid.columns for grid in grids))


def concatenate_rows(grids: Sequence[Grid], rows: Sequence[int]) -> Grid:
    """Join the grids of a matrix's row groups, top to bottom; group i has ``rows[i]`` rows."""
    if len(grids) == 1:
        return grids[0]
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    for grid, scale, count in zip(grids, _scales_of_one_dtype(grids), rows, strict=True):
        scales.append(scale.expand(count, -1))  # a group with one scale in total now has one for each row
        if grid.zero is not None:
            zeros.append(grid.zero.expand(count, -1))
    return replace(grids[0], scale=torch.cat(scales), zero=torch.cat(zeros) if zeros else None)


class ColumnGrid:
    """Rounds a matrix column by column; its groups may be added one by one, while a sweep runs.

    Args:
        columns: I.
        group_size: columns that share a scale; None for all.
        order: [I], the column at each position of the sweep; None for the original order.
    """

    def __init__(self, columns: int, group_size: int | None, order: Tensor | None = None) -> None:
        group_of = torch.arange(columns) // (group_size or columns)
        if order is not None:
            group_of = group_of[order.cpu()]
        self._group_of = group_of.tolist()
        self._groups: list[tuple[Grid, Tensor, Tensor | float]] = []  # grid, scale [O], zero point [O] or one number

    def add(self, grid: Grid) -> None:
        """Append the groups [O, G] of ``grid``."""
        scales = grid.scale.float().T.contiguous().unbind(0)
        zeros: Sequence[Tensor | float] = [grid.middle] * len(scales)
        if grid.zero is not None:
            zeros = grid.zero.float().T.contiguous().unbind(0)
        self._groups.extend((grid, scale, zero) for scale, zero in zip(scales, zeros, strict=True))

    @property
    def is_uniform(self) -> bool:
        """Whether the levels are integers: no codebook. Groups that are added during a sweep always are."""
        return not self._groups or self._groups[0][0].codebook is None

    def uniform(self, first: int, last: int, rows: int) -> tuple[Tensor, Tensor | float, int]:
        """Return the scales, zero points and highest code of the sweep's columns ``first`` to ``last``.

        Returns:
            Scales [last - first, rows]; zero points of the same shape, or one number for a symmetric grid; the highest
            code.
        """
        groups = [self._groups[group] for group in self._group_of[first:last]]
        grid, _, origin = groups[0]
        scale = self._stack_columns([scale for _, scale, _ in groups], rows)
        zeros = [zero for *_, zero in groups if isinstance(zero, Tensor)]
        return scale, self._stack_columns(zeros, rows) if zeros else origin, grid.levels

    @staticmethod
    def _stack_columns(columns: list[Tensor], rows: int) -> Tensor:
        # Columns of one group hold the same tensor: a view of it saves the copies.
        one_group = all(column is columns[0] for column in columns)
        stacked = columns[0][None] if one_group else torch.stack(columns)
        return stacked.expand(len(columns), rows)

    def round(self, i: int, column: Tensor) -> Tensor:
        """Round the i-th column of the sweep, [O], to the nearest points of its grid."""
        grid, scale, zero = self._groups[self._group_of[i]]
        if grid.codebook is None and not isinstance(zero, Tensor):
            # moving the bounds by the zero point saves adding and subtracting it
            return (column / scale).round_().clamp_(-zero, grid.levels - zero).mul_(scale)
        return grid.values(grid.nearest(column, scale, zero), scale, zero)


def _scales_of_one_dtype(grids: Sequence[Grid]) -> list[Tensor]:
    """The scales in the widest dtype among them: a joined grid has one dtype."""
    dtype = torch.float32 if any(grid.scale.dtype == torch.float32 for grid in grids) else torch.float16
    return [grid.scale.to(dtype) for grid in grids]


def _spanning(
    lowest: Tensor, highest: Tensor, bits: int, symmetric: bool, columns: int, dtype: torch.dtype | None = None
) -> Grid:
    """The uniform grid from ``lowest`` <= 0 to ``highest`` >= 0 [O, G].

    ``dtype`` is that of the scales; by default float16 if it is precise enough, else float32.
    """
    levels = 2**bits - 1
    span = _spans(lowest, highest, symmetric)
    scale = torch.where(span > 0, span / levels, torch.ones_like(span))  # a group of zeros needs a scale above 0
    scale = _in_storage_dtype(scale) if dtype is None else scale.to(dtype)
    zero = None
    if not symmetric:
        # From the scale as stored, since that is what the weights are decoded with.
        zero = (-lowest / scale.float()).round().clamp(0, levels).to(torch.uint8)
    return Grid(bits, scale, zero, columns)


def _spans(lowest: Tensor, highest: Tensor, symmetric: bool) -> Tensor:
    """The width of the range that each group's levels cover, from ``lowest`` <= 0 to ``highest`` >= 0."""
    return 2 * torch.maximum(highest, -lowest) if symmetric else highest - lowest


def _clip_errors(grouped: Tensor, trials: Grid, importance: Tensor | None) -> Tensor:
    """The error sums of the clipping search, for each trial and each group: [T, O, G].

    Args:
        grouped: weights [O, G, size].
        trials: scales [T, O, G] to try, all at once on one piece of the weights after another.
        importance: [1, G, size], or None.
    """
    scale = trials.scale.float()[..., None]
    zero = None if trials.zero is None else trials.zero.float()[..., None]
    piece = PIECE if scale.device.type == "cpu" else GPU_PIECE
    weights_at_once = max(1, piece // len(scale))
    if len(grouped) == 1:  # one scale for the whole matrix: split its only row
        parts = grouped.split(weights_at_once, dim=-1)
        importances = [None] * len(parts) if importance is None else importance.split(weights_at_once, dim=-1)
        errors = [
            _piece_errors(trials, part, scale, zero, part_importance)
            for part, part_importance in zip(parts, importances, strict=True)
        ]
        return torch.stack(errors).sum(0)
    rows = max(1, weights_at_once // grouped[0].numel())
    scales = scale.split(rows, dim=1)
    zeros = [None] * len(scales) if zero is None else zero.split(rows, dim=1)
    pieces = zip(grouped.split(rows), scales, zeros, strict=True)
    return torch.cat([_piece_errors(trials, *piece, importance) for piece in pieces], dim=1)


def _piece_errors(
    trials: Grid, grouped: Tensor, scale: Tensor, zero: Tensor | None, importance: Tensor | None
) -> Tensor:
    origin = trials.middle if zero is None else zero
    error = trials.values(trials.nearest(grouped, scale, origin), scale, origin).sub_(grouped)
    error = error.abs_().pow_(CLIP_NORM) if importance is None else error.square_().mul_(importance)
    return error.sum(-1)


def _in_storage_dtype(scale: Tensor) -> Tensor:
    """float16 if every scale is a normal float16, else float32."""
    fits = bool(scale.min() >= SMALLEST_HALF) and bool(scale.max() <= torch.finfo(torch.float16).max)
    return scale.half() if fits else scale
