"""What the quantization stages share: their knobs, their checks, and writing a grid into a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule

from pqqp_lightning.algorithms.grid import Grid, Quantized
from pqqp_lightning.errors import shorten
from pqqp_lightning.modules.constraints import constraints_of, set_constraints
from pqqp_lightning.modules.layers import Layer, columns_of, set_weight_matrix
from pqqp_lightning.modules.naming import value_for, values_of
from pqqp_lightning.stage import Stage

GroupSize = int | Literal["channel", "tensor"]


class QuantizationStage(Stage):
    """A stage that rounds weights to a grid.

    Args:
        bits: 2 to 8; or name pattern to bits.
        group_size: input columns that share a scale; "channel" for one scale an output channel, "tensor" for one in
            all; or name pattern to size.
        symmetric: without zero points; False for asymmetric grids.
        kwargs: see :class:`~pqqp_lightning.stage.Stage`.
    """

    compresses = True

    def __init__(
        self,
        bits: int | dict[str, int] = 4,
        group_size: GroupSize | dict[str, GroupSize] = "channel",
        symmetric: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric

    def grid_options(self, name: str) -> dict[str, Any]:
        """Bits and granularity for one layer, as the algorithms take them."""
        size = value_for(name, self.group_size)
        return {
            "bits": value_for(name, self.bits),
            "group_size": size if isinstance(size, int) else None,
            "per_tensor": size == "tensor",
            "symmetric": self.symmetric,
        }

    def check_knobs(self) -> list[str]:
        problems = super().check_knobs()
        problems += [f"bits={b} is not between 2 and 8." for b in values_of(self.bits) if not 2 <= b <= 8]
        for size in values_of(self.group_size):
            if isinstance(size, int) and size < 1:
                problems.append(f"group_size={size} is not above 0. Use 'channel' for one scale an output channel.")
        return problems

    def check(self, model: LightningModule, data: Any, earlier: Sequence[Stage]) -> list[str]:
        problems, layers = super().check(model, data, earlier), self.find_layers(model)
        problems += self.check_patterns("bits", layers) + self.check_patterns("group_size", layers)
        problems += self._check_divisible(layers)
        if not self.allow_undo:
            problems += self._check_overlap(model, layers, earlier)
        return problems

    def write_grid(self, layer: Layer, quantized: Quantized) -> None:
        """Write the quantized weights and remember their grid."""
        set_weight_matrix(layer, quantized.weight)
        set_constraints(layer, constraints_of(layer).with_grid(quantized.grid))

    def _check_divisible(self, layers: dict[str, Layer]) -> list[str]:
        odd: dict[tuple[int, int], list[str]] = {}
        for name, layer in layers.items():
            size = value_for(name, self.group_size)
            if isinstance(size, int) and size > 0 and columns_of(layer) % size:
                odd.setdefault((size, columns_of(layer)), []).append(name)
        return [
            f"group_size={size} does not divide in_features={columns} of {shorten(names)}. "
            f"Use {_divisors_near(columns, size)}, or add them to ignore."
            for (size, columns), names in odd.items()
        ]

    def _check_overlap(self, model: LightningModule, layers: dict[str, Layer], earlier: Sequence[Stage]) -> list[str]:
        problems = []
        for stage in earlier:
            if isinstance(stage, QuantizationStage) and (both := set(layers) & set(stage.find_layers(model))):
                problems.append(
                    f"{shorten(sorted(both))} would leave the grid of stage '{stage.name}'. Give the stages disjoint "
                    "targets, drop one, or set allow_undo: true to replace the earlier grid."
                )
        return problems


def merge_rows(parts: list[Quantized]) -> Quantized:
    """The row groups of one matrix as one: weights and grids stacked."""
    if len(parts) == 1:
        return parts[0]
    grids = [p.grid for p in parts]
    dtype = torch.float32 if any(g.scale.dtype == torch.float32 for g in grids) else grids[0].scale.dtype
    rows = [p.weight.shape[0] for p in parts]
    scale = torch.cat([g.scale.to(dtype).expand(n, -1) for g, n in zip(grids, rows, strict=True)])
    zeros = [g.zero.expand(n, -1) for g, n in zip(grids, rows, strict=True) if g.zero is not None]
    grid = Grid(grids[0].bits, scale, torch.cat(zeros) if zeros else None, grids[0].columns)
    return Quantized(torch.cat([p.weight for p in parts]), grid)


def _divisors_near(columns: int, size: int) -> str:
    """``"32, 64, 96 or 192"``: up to four divisors of ``columns``, the nearest to ``size``; multiples of 8 first."""
    divisors = [d for d in range(2, columns + 1) if columns % d == 0]
    round_ones = [d for d in divisors if d % 8 == 0] or divisors
    near = sorted(sorted(round_ones, key=lambda d: abs(d - size))[:4])
    return " or ".join(filter(None, [", ".join(map(str, near[:-1])), str(near[-1])]))
