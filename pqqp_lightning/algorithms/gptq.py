"""GPTQ / OPTQ: quantization with error feedback (Frantar et al., arXiv 2210.17323, Algorithm 1).

Differs from the published code in four things. A mask is held inside the column sweep: a pruned entry is set to
zero when its column comes up and its error is fed to the kept entries after it. A group's scale is always read from
weights that hold every earlier column's feedback (the published code misses the running block's for a group that
starts inside it). With activation order, the groups' grids are fitted beforehand in the original column order, so
that the stored format stays plain. The clipping search weighs the error of column i by 1 / U_ii^2, as the objective
does (the published code's ``mse`` looks at the weights alone).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pqqp_lightning.algorithms.column_sweep import sweep_columns
from pqqp_lightning.algorithms.grid import ColumnGrid, Grid, Quantized, beside, fit_grid, round_to_grid
from pqqp_lightning.algorithms.hessian import InverseFactor, factorize_inverse

STEP = 32


def quantize_gptq(
    weight: Tensor,
    hessian: Tensor | InverseFactor,
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    per_tensor: bool = False,
    clip: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
    activation_order: bool = False,
    mask: Tensor | None = None,
) -> Quantized:
    """Quantize ``weight`` [O, I].

    Args:
        weight: [O, I].
        hessian: X^T X [I, I]; or its factorized inverse where several matrices share it (``damping`` and
            ``activation_order`` are then its own).
        bits: 2 to 8.
        group_size: columns that share a scale; None for one scale an output row.
        symmetric: without zero points.
        per_tensor: one scale for the whole matrix.
        clip: search each scale, see :func:`~pqqp_lightning.algorithms.grid.fit_grid`; a column's error counts as in the
            objective, by 1 / U_ii^2.
        damping: fraction of the mean diagonal added to the diagonal.
        block_size: columns a block.
        activation_order: sweep the columns by descending diagonal of the Hessian.
        mask: keep-mask [O, I]; its zeros stay zero.

    Raises:
        ArithmeticError: the Hessian cannot be factorized.
    """
    if isinstance(hessian, Tensor):
        hessian = factorize_inverse(hessian, damping, activation_order=activation_order)
    order = hessian.order
    turn = slice(None) if order is None else order  # columns as they come up
    live = weight.float()[:, turn].masked_fill(hessian.dead, 0.0)
    groups = None if per_tensor else group_size
    follow = groups is not None and order is None  # a group's grid is fitted when the sweep reaches it
    fitted = live if order is None else live[:, order.argsort()]
    options: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "clip": clip}
    importance = hessian.factor.diagonal().pow(-2)
    importance = importance if order is None else importance[order.argsort()]
    static = None
    if not follow:
        static = fit_grid(fitted, group_size=groups, per_tensor=per_tensor, importance=importance, **options)
    columns_of_mask = None if mask is None else mask[:, turn].T.contiguous()
    columns = ColumnGrid(weight.shape[1], groups, order)
    fitter = _Fitter(options, columns, importance, static, columns_of_mask)
    swept = sweep_columns(
        live,
        hessian.factor,
        block_size=groups * max(1, block_size // groups) if follow and groups else block_size,
        step=groups if follow and groups else STEP,
        mask=columns_of_mask,
        grid=columns,
        on_step=fitter.fit if follow else None,
    )
    if order is not None:
        swept = swept[:, order.argsort()]
    grid = fitter.grid()
    rounded = round_to_grid(swept.to(weight.dtype), grid)
    return Quantized(rounded if mask is None else rounded.masked_fill(~mask, 0.0), grid)


class _Fitter:
    """Gives the sweep's ``columns`` their grid: one that is given, or fitted group by group as the sweep reaches it."""

    def __init__(
        self,
        options: dict[str, Any],
        columns: ColumnGrid,
        importance: Tensor,
        static: Grid | None,
        kept: Tensor | None,
    ) -> None:
        self._options, self._columns, self._static = options, columns, static
        self._importance, self._kept = importance, kept  # [I], [I, O]
        self._fitted: list[Grid] = []
        if static is not None:
            columns.add(static)

    def fit(self, start: int, stop: int, columns: Tensor) -> None:
        """Fit the grid of the group that ``columns`` [size, O] are."""
        kept = columns if self._kept is None else columns * self._kept[start:stop]
        self._fitted.append(fit_grid(kept.T, importance=self._importance[start:stop], **self._options))
        self._columns.add(self._fitted[-1])

    def grid(self) -> Grid:
        """The grid of the whole matrix."""
        return self._static or beside(self._fitted)
