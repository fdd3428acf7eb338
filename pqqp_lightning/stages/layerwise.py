"""The base of methods that compress one layer at a time: the walk, row groups, constraints and writing back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from pqqp_lightning.algorithms.grid import Grid, concatenate_rows
from pqqp_lightning.algorithms.selection import Pattern
from pqqp_lightning.calibration.collect import Reading
from pqqp_lightning.calibration.statistics import Statistic
from pqqp_lightning.checkpoint.expected import ExpectedWeights
from pqqp_lightning.checkpoint.finished_blocks import Part
from pqqp_lightning.network.constraints import constraints_of, set_constraints
from pqqp_lightning.network.layers import (
    Layer,
    groups_of,
    has_readable_inputs,
    row_groups,
    set_weight_matrix,
    weight_matrix,
)
from pqqp_lightning.stages.stage import Context, Plan, Stage

UNREACHED = object()
"""In place of the statistic of a layer or an expert that no calibration row reached."""

Found = Callable[[str], None]
"""Adds a finding about the current layers to the stage's record."""


@dataclass(frozen=True)
class LayerInputs:
    """The inputs of ``compress_layer``: the weight of one layer, or of one group of a grouped one.

    Attributes:
        name: the layer's.
        weight: [O, I], in the layer's dtype.
        statistic: the result of :meth:`LayerwiseStage.prepare`; None without calibration.
        mask: the keep-mask [O, I] of earlier stages, or None.
        grid: the grid of an earlier stage, or None.
        dense: the weight [O, I] in the dense model, for a stage that ``needs_dense``; else None.
        shares_scale: the grid's only scale is also that of the layer's other groups.
    """

    name: str
    weight: Tensor
    statistic: Any = None
    mask: Tensor | None = None
    grid: Grid | None = None
    dense: Tensor | None = None
    shares_scale: bool = False


@dataclass(frozen=True)
class Compressed:
    """A new weight [O, I] with its new constraints.

    Attributes:
        weight: [O, I].
        mask: the keep-mask [O, I], within the earlier one; None keeps the earlier one.
        pattern: (N, M) if the mask keeps at most N of every M columns.
        grid: the grid of the weight; None keeps the earlier one.
    """

    weight: Tensor
    mask: Tensor | None = None
    pattern: Pattern | None = None
    grid: Grid | None = None


class LayerwiseStage(Stage):
    """A stage that compresses layer by layer. A method writes :meth:`compress_layer`.

    ``compress_layer`` gets the whole weight of a layer. With a ``statistic`` it gets a layer with groups (a grouped
    convolution, experts) group by group, because each group has its own inputs.

    A run that is killed in the middle of such a stage resumes at the first block that it had not finished. Other stages
    (BasisSharing, SLEB, LoRA, ...) begin anew, and so does one whose attributes besides its arguments are anything but
    plain data and CPU tensors.

    Args:
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    compresses = True
    statistic: ClassVar[type[Statistic] | None] = None
    """The statistic of each layer's calibration inputs to collect: ``SquaredNorm``, ``Hessian`` or None."""

    without_statistics: ClassVar[str] = "left as it was, since no calibration token reached it"
    """What the record says about a layer or an expert that no calibration row reached."""

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        """Whether the method names a statistic."""
        return self.statistic is not None

    def reason_to_leave(self, layer: Layer) -> str:
        if self.needs_calibration and not has_readable_inputs(layer):
            return "cannot read their inputs, which it calibrates on"
        return ""

    def expected_weights(self, model: LightningModule, weights: ExpectedWeights) -> ExpectedWeights:
        """Other values, with the masks and grids as they were."""
        return weights.values_changed(self.find_layers(model))

    def compress_layer(self, inputs: LayerInputs) -> Compressed:
        """The method itself: the new weight, which keeps the mask and the grid in ``inputs``."""
        raise NotImplementedError(f"{type(self).__name__} defines no compress_layer")

    def compress_unreached(self, inputs: LayerInputs) -> Compressed:
        """The method for a layer or an expert that no calibration row reached, without a statistic.

        Pruning stages remove the smallest weights, quantization stages round to nearest; others leave the weight alone.
        """
        return Compressed(inputs.weight)

    def prepare(self, statistic: Tensor, found: Found) -> Sequence[Any]:
        """The statistic that ``compress_layer`` gets for each group, computed once for all layers that share an input.

        Args:
            statistic: the collected value; the first dimension is groups.
            found: called with anything unusual, for the record.
        """
        return list(statistic)

    def compress(self, model: LightningModule, context: Context) -> Plan:
        self.compress_layers(model, self.find_layers(model), context)
        return {}

    def compress_layers(self, model: LightningModule, layers: dict[str, Layer], context: Context) -> None:
        """Compress ``layers`` in place, calibrated on the current ``model``; a resumed run leaves finished ones out."""
        kept = context.part(self)
        if kept.restore_all(layers):
            return
        if self.statistic is None:
            for name, layer in context.each(layers):
                if not kept.restore({name: layer}):
                    self._compress_groups(name, layer, [None], self._dense_of(layer, context))
                    kept.keep({name: layer})
        else:
            self._calibrate(model, layers, context, kept)
        kept.finish()

    def _calibrate(self, model: LightningModule, layers: dict[str, Layer], context: Context, kept: Part) -> None:
        """Compress ``layers`` in place, each with the statistic of its inputs."""
        assert self.statistic is not None

        def compress(reading: Reading) -> None:
            reached = reading.statistic.counts.ne(0)
            value = reading.statistic.value()
            value = value if bool(reached.all()) else value[reached]
            prepared = iter(self.prepare(value, lambda what: context.found(what, reading.layers)))
            statistics = [next(prepared) if own else UNREACHED for own in reached.tolist()]
            for name, layer in reading.layers.items():
                self._compress_groups(name, layer, statistics, self._dense_of(layer, context))
                for number, own in enumerate(reached.tolist()):
                    if not own:
                        context.found(self.without_statistics, [f"{name}[{number}]"])

        def unreached(missed: dict[str, Layer]) -> None:
            for name, layer in missed.items():
                self._compress_groups(name, layer, [UNREACHED] * groups_of(layer), None)
            context.found(self.without_statistics, missed)

        context.calibrate(self.find_blocks(model), layers, self.statistic, compress, unreached, kept)

    def _dense_of(self, layer: Layer, context: Context) -> Tensor | None:
        return context.dense(layer) if self.needs_dense else None

    def _compress_groups(self, name: str, layer: Layer, statistics: Sequence[Any], dense: Tensor | None) -> None:
        """Compress one layer in one row group for each statistic."""
        constraints, matrix, count = constraints_of(layer), weight_matrix(layer), len(statistics)
        # each group gets its rows of the mask and of the grid
        grids: Sequence[Grid | None] = [None] * count
        shares_scale = False
        if constraints.grid is not None:
            grids = constraints.grid.to(matrix.device).chunk(count)
            shares_scale = count > 1 and len(constraints.grid.scale) == 1
        groups = row_groups(matrix, constraints.mask(matrix.device), dense, groups=count)
        parts = []
        for (weight, mask, dense_part), statistic, grid in zip(groups, statistics, grids, strict=True):
            if statistic is UNREACHED:
                inputs = LayerInputs(name, weight, None, mask, grid, shares_scale=shares_scale)
                parts.append(self.compress_unreached(inputs))
            else:
                inputs = LayerInputs(name, weight, statistic, mask, grid, dense_part, shares_scale)
                parts.append(self.compress_layer(inputs))
        write_back(layer, _joined(parts))


def write_back(layer: Layer, compressed: Compressed) -> None:
    """Write a layer's new weight, zero outside its mask, and store the mask and the grid as its constraints."""
    weight, constraints = compressed.weight, constraints_of(layer)
    if compressed.mask is not None:
        weight = weight.masked_fill(~compressed.mask, 0.0)
        constraints = constraints.with_mask(compressed.mask, compressed.pattern)
    if compressed.grid is not None:
        constraints = constraints.with_grid(compressed.grid)
    set_weight_matrix(layer, weight)
    set_constraints(layer, constraints)


def _joined(parts: list[Compressed]) -> Compressed:
    """Concatenate the row groups of one matrix."""
    if len(parts) == 1:
        return parts[0]
    masks = [part.mask for part in parts if part.mask is not None]
    grids = [part.grid for part in parts if part.grid is not None]
    return Compressed(
        torch.cat([part.weight for part in parts]),
        mask=torch.cat(masks) if masks else None,
        pattern=parts[0].pattern,
        grid=concatenate_rows(grids, [len(part.weight) for part in parts]) if grids else None,
    )
