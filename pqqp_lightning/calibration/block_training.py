"""Trains the compressed layers of one block so that its outputs match given ones, within their masks and grids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pqqp_lightning.algorithms.block_matching import cosine_decay, root_mean_square, start_in_cells
from pqqp_lightning.algorithms.grid import SMALLEST_HALF, Grid, round_to_grid
from pqqp_lightning.algorithms.lsq import SMALLEST_STEP, fake_quantize, scale_from_units, scale_unit, stored_scale
from pqqp_lightning.calibration.batch_norm import BlockNorms
from pqqp_lightning.calibration.statistics import sum_over_ranks
from pqqp_lightning.calibration.token_mask import TokenMask, positions_of
from pqqp_lightning.calibration.walk import BlockPass
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.layers import Layer, to_weight, weight_matrix, weight_place


@dataclass(frozen=True)
class Matched:
    """What the training of one block found.

    Attributes:
        weights: the best weights [O, I] of each layer, by name, with their grid; empty if none were better.
        before: squared error of the outputs on all calibration samples, as a fraction of the targets' square.
        after: the same with these weights; never above ``before``.
    """

    weights: dict[str, tuple[Tensor, Grid | None]]
    before: float
    after: float


class TrainedLayer:
    """The weights of one compressed layer in training: float32, rounded to the layer's grid in every forward pass.

    Args:
        layer: with a mask, a grid, or both.
        dense: its weight in the dense model [O, I].
        scales: train the scales of a uniform grid, too. Zero points and the scales of a codebook stay.
    """

    def __init__(self, layer: Layer, dense: Tensor, scales: bool) -> None:
        self.layer = layer
        matrix = weight_matrix(layer)
        constraints = constraints_of(layer)
        self._mask = constraints.mask(matrix.device)
        self._grid = None if constraints.grid is None else constraints.grid.to(matrix.device)
        start = matrix.float().clone()
        if self._grid is not None:
            start = start_in_cells(matrix, dense, self._grid)
        if self._mask is not None:
            start = start.masked_fill(~self._mask, 0.0)
        self.size = root_mean_square(matrix)
        """The root mean square of the weights that are not zero."""
        self.values = nn.Parameter(start)  # [O, I]
        self.parameters = [self.values]
        self._scale: nn.Parameter | None = None
        if scales and self._grid is not None and self._grid.codebook is None:
            # in units in which Adam moves a scale by the same fraction as the weights
            self._scale_unit = scale_unit(self._grid.scale, matrix)
            self._scale = nn.Parameter(self._grid.scale.float() / self._scale_unit)  # [O, G]
            self.parameters.append(self._scale)

    def weight(self) -> Tensor:
        """The rounded weight in the layer's layout and dtype, with straight-through gradients."""
        values: Tensor = self.values
        grid = self._grid
        if grid is not None and grid.codebook is not None:
            values = values + (round_to_grid(values, grid) - values).detach()
        elif grid is not None:
            scale = grid.scale.float()
            if self._scale is not None:
                scale = self._trained_scale(self._scale, grid)
            values = fake_quantize(values, scale, grid.zero, grid.bits)
        if self._mask is not None:
            values = values.masked_fill(~self._mask, 0.0)
        return to_weight(self.layer, values).to(self.layer.weight.dtype)

    def _trained_scale(self, parameter: Tensor, grid: Grid) -> Tensor:
        """The scale [O, G] that ``parameter`` stands for, float32, as ``grid`` stores it: in the same precision."""
        scale = scale_from_units(parameter, self._scale_unit).abs()
        if grid.scale.dtype == torch.float32:
            return scale.clamp(min=SMALLEST_STEP)
        return stored_scale(scale.clamp(SMALLEST_HALF, torch.finfo(torch.float16).max))

    @torch.no_grad()
    def stored(self) -> tuple[Tensor, Grid | None]:
        """The weight [O, I] as the layer would store it, with its grid."""
        values: Tensor = self.values
        grid = self._grid
        if grid is not None:
            if self._scale is not None:
                grid = replace(grid, scale=self._trained_scale(self._scale, grid).to(grid.scale.dtype))
            values = round_to_grid(values, grid)
        if self._mask is not None:
            values = values.masked_fill(~self._mask, 0.0)
        return values.to(self.layer.weight.dtype, copy=True), grid


@dataclass
class BlockTraining:
    """Trains one block. Call it in ``calibrating()``.

    Attributes:
        run: the block's forward pass.
        trained: its compressed layers, by name.
        targets: what the block shall compute, for each calibration batch.
        masks: the positions of each batch that count.
        norms: the BatchNorm layers whose statistics follow the weights; None leaves the statistics as they are. They
            are estimated again before each pass, and are fixed during it.
        after_step: called after every step.
    """

    run: BlockPass
    trained: Mapping[str, TrainedLayer]
    targets: Sequence[Tensor]
    masks: Sequence[TokenMask | None]
    norms: BlockNorms | None = None
    after_step: Callable[[], object] = lambda: None

    def train(self, passes: int, step: float) -> Matched:
        """Train for ``passes`` over the calibration samples, and return the best of the states after each pass.

        Adam takes a step for each batch, of all ranks together. Its size is ``step`` at first and falls to 0 on a
        cosine; it counts in units of the root mean square of each layer's weights.

        Raises:
            ArithmeticError: the outputs hold NaN or infinite values.
        """
        paths = self._paths()
        layers = self.trained.values()
        parameters = [parameter for item in layers for parameter in item.parameters]
        optimizer = torch.optim.Adam([{"params": item.parameters, "lr": step * item.size} for item in layers])
        length = self._longest()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: cosine_decay(done, passes * length))
        square = self._target_square()
        before = self._error({})
        best = Matched({}, before / square, before / square)
        if before == 0:
            return best
        for _ in range(passes):
            for i in range(length):
                # in units of a batch's mean error, so that Adam's epsilon does not matter
                gradients = self._gradients(i, paths, parameters, before / length)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = sum_over_ranks(gradient)
                optimizer.step()
                schedule.step()
                self.after_step()
            stored = {name: item.stored() for name, item in self.trained.items()}
            tensors = {}
            for name, (weight, _) in stored.items():
                tensors[paths[name]] = to_weight(self.trained[name].layer, weight)
            error = self._error(tensors) / square
            if error < best.after:
                best = Matched(stored, best.before, error)
        return best

    def _gradients(self, i: int, paths: Mapping[str, str], parameters: Sequence[Tensor], unit: float) -> list[Tensor]:
        """The gradients of the squared error on batch ``i``, as a multiple of ``unit``, with respect to ``parameters``.

        They are zero where this rank has no such batch, and for a layer that the batch does not reach (an expert).
        """
        gradients: Sequence[Tensor | None] = [None] * len(parameters)
        if i < len(self.targets):
            with torch.enable_grad():
                tensors = {paths[name]: item.weight() for name, item in self.trained.items()}
                error = self._batch_error(i, tensors) / unit
            if error.requires_grad:
                gradients = torch.autograd.grad(error, parameters, allow_unused=True)
        filled = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            filled.append(torch.zeros_like(parameter) if gradient is None else gradient)
        return filled

    def _paths(self) -> dict[str, str]:
        """The name in the block of each layer's weight."""
        modules = {module: path for path, module in self.run.block.named_modules()}
        paths = {}
        for name, item in self.trained.items():
            module, parameter = weight_place(item.layer)
            paths[name] = f"{modules[module]}.{parameter}" if modules[module] else parameter
        return paths

    def _longest(self) -> int:
        """The number of batches of the rank that has most: every rank takes as many steps."""
        count = torch.tensor(len(self.targets), device=self.targets[0].device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
        return int(count)

    def _target_square(self) -> float:
        """The sum of the targets' squares, over all batches of all ranks."""
        total = torch.zeros((), dtype=torch.float64, device=self.targets[0].device)
        for target, mask in zip(self.targets, self.masks, strict=True):
            total += positions_of(target, mask).double().square().sum()
        return max(float(sum_over_ranks(total)), torch.finfo(torch.float64).tiny)

    def _batch_error(self, i: int, tensors: Mapping[str, Tensor]) -> Tensor:
        """The squared error of the block's outputs on one batch, with ``tensors`` in place of its own weights."""
        difference = self.run(i, tensors=tensors).float() - self.targets[i].float()
        return positions_of(difference, self.masks[i]).square().sum()

    def _error(self, tensors: Mapping[str, Tensor]) -> float:
        """The squared error on all batches of all ranks."""
        if self.norms is not None:
            self.norms.recalibrate(self.run, tensors=tensors)
        total = torch.zeros((), dtype=torch.float64, device=self.targets[0].device)
        for i in range(len(self.targets)):
            total += self._batch_error(i, tensors).detach().double()
        sum_over_ranks(total)
        if not bool(torch.isfinite(total)):
            raise ArithmeticError("its outputs, or those of the dense block, hold NaN or infinite values")
        return float(total)
