"""The cost of compressing each layer, measured on the calibration data; allocations minimize it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pqqp_lightning.algorithms.allocation import output_error
from pqqp_lightning.calibration.collect import Reading, watching_inputs
from pqqp_lightning.calibration.functional import FunctionalReader
from pqqp_lightning.calibration.statistics import Hessian, sum_over_ranks
from pqqp_lightning.calibration.token_mask import TokenMask, positions_of
from pqqp_lightning.calibration.walk import Walk, calibrating, gradients_kept, samples_in
from pqqp_lightning.errors import Problem, RecipeError, shorten
from pqqp_lightning.network.blocks import Blocks
from pqqp_lightning.network.layers import Layer, groups_of, rows_of, spatial_dimensions, weight_matrix
from pqqp_lightning.stages.stage import Context

Sensitivity = Literal["loss", "output"]
"""The measure of a layer's change: its estimated effect on the loss, or its relative output error."""

Trials = Callable[[str, Layer, Tensor], Iterable[Tensor]]
"""(name, layer, Hessians [groups, I, I]) -> the matrix [O, I] under each option."""


def measure_costs(
    context: Context, blocks: Blocks, layers: dict[str, Layer], trials: Trials, sensitivity: Sensitivity
) -> dict[str, list[float]]:
    """The cost of each option of each layer on the current model; weights do not change.

    It takes one calibration walk, and for ``"loss"`` also one backward pass over the calibration batches.

    A layer without a gradient or without a calibration row gets the costs of the relative change of its weight, in the
    units of the others: it counts as sensitive as they are on average.

    Args:
        context: the stage's.
        blocks: to calibrate one by one.
        layers: by name.
        trials: makes each layer's matrix under each option.
        sensitivity: "loss" weighs each output's squared error by the mean squared gradient of the loss; "output"
            divides the squared error by the squared output.

    Raises:
        RecipeError: the loss has no gradient for any layer, or one that is not finite.
    """
    importance: dict[str, Tensor] = {}
    if sensitivity == "loss":
        try:
            importance = mean_squared_gradients(context.walk(blocks), layers)
        except RecipeError as error:
            raise RecipeError([problem.within(f"stages.{context.title}") for problem in error.problems]) from error
    costs: dict[str, list[float]] = {}
    changes: dict[str, list[float]] = {}  # relative to the weight, whatever the inputs

    def measure(reading: Reading) -> None:
        hessians = _filled(reading.statistic.value(), reading.statistic.counts)
        for name, layer in reading.layers.items():
            matrix = weight_matrix(layer).float()
            weigh = importance.get(name)
            errors, changes[name] = _errors_and_changes(matrix, trials(name, layer, hessians), hessians, weigh)
            if sensitivity == "output":
                whole = _error(matrix, hessians, None)
                errors = [error / whole if whole else 0.0 for error in errors]
            if sensitivity == "output" or weigh is not None:
                costs[name] = errors

    def unreached(missed: dict[str, Layer]) -> None:
        for name, layer in missed.items():
            matrix = weight_matrix(layer).float()
            width = matrix.shape[1]
            alike = torch.eye(width, device=matrix.device).expand(groups_of(layer), width, width)
            _, changes[name] = _errors_and_changes(matrix, trials(name, layer, alike), alike, None)

    context.calibrate(blocks, layers, Hessian, measure, unreached)
    if unmeasured := [name for name in layers if name not in costs]:
        context.found("assumed to be as sensitive as the other layers: no calibration token shows it", unmeasured)
        costs |= _assumed(unmeasured, costs, changes)
    return {name: costs[name] for name in layers}


def _assumed(
    unmeasured: list[str], costs: dict[str, list[float]], changes: dict[str, list[float]]
) -> dict[str, list[float]]:
    """Costs from the relative ``changes`` of the weights, in the units of the other layers' ``costs``."""
    change_of_others = sum(sum(changes[name]) for name in costs)
    scale = sum(map(sum, costs.values())) / change_of_others if change_of_others else 1.0
    return {name: [scale * change for change in changes[name]] for name in unmeasured}


def mean_squared_gradients(walk: Walk, layers: dict[str, Layer]) -> dict[str, Tensor]:
    """The mean squared gradient [O] of a sample's loss with respect to each layer's outputs, over all tokens.

    The loss is that of the module's ``training_step``, in evaluation mode. Only activations get gradients, so that the
    memory needed is that of one batch's activations. Layers without a gradient are left out.
    """
    assert walk.loss is not None, "the walk has no loss"
    sums: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}  # of each output: the experts of a fused weight see different ones
    for name, layer in layers.items():
        sums[name] = torch.zeros(rows_of(layer), device=layer.weight.device)
        rows[name] = torch.zeros(rows_of(layer), device=layer.weight.device)

    def add(samples: int, mask: TokenMask | None, name: str, gradient: Tensor, part: int | None, parts: int) -> None:
        spatial = spatial_dimensions(layers[name])
        if not spatial:
            gradient = positions_of(gradient, mask)
        channels = gradient.dim() - 1 - spatial
        flat = gradient.float().mul(samples).movedim(channels, -1)  # the loss is a mean
        if parts > 1 and part is None:  # [parts, T, O / parts]
            sums[name] += flat.square().sum(dim=1).flatten()
            rows[name] += flat.shape[1]
            return
        flat = flat.flatten(0, -2)  # [T, O]
        each = len(sums[name]) // parts
        chosen = slice((part or 0) * each, (part or 0) * each + each)
        sums[name][chosen] += flat.square().sum(dim=0)
        rows[name][chosen] += flat.shape[0]

    with calibrating(walk.model), walk.forward_context(), torch.enable_grad():
        for batch, mask in walk.masked_batches():
            with _watching(walk.model, layers, partial(add, samples_in(batch), mask)):
                loss = walk.loss(batch)
                if loss.requires_grad:
                    loss.backward()
    for total in (*sums.values(), *rows.values()):
        sum_over_ranks(total)
    measured = [name for name, counts in rows.items() if int(counts.sum())]
    if not measured:
        text = f"the loss has no gradient for {shorten(layers)}"
        raise RecipeError(Problem(text=text, way_out="Add them to ignore."))
    if odd := [name for name, total in sums.items() if not bool(torch.isfinite(total).all())]:
        text = f"the loss has NaN or infinite gradients for {shorten(odd)}"
        raise RecipeError(Problem(text=text, way_out="Check the model and the data."))
    return {name: sums[name] / rows[name].clamp(min=1) for name in measured}


@contextmanager
def _watching(
    model: nn.Module, layers: dict[str, Layer], add: Callable[[str, Tensor, int | None, int], None]
) -> Iterator[None]:
    """Call ``add`` with the gradient of each layer's output, and restore the gradients of the weights on exit.

    A layer's output has a gradient if its input has one. The first layers' inputs have none; there the weight requires
    one instead.
    """

    def before(name: str, inputs: Tensor, part: int | None = None, parts: int = 1) -> None:
        if not inputs.requires_grad:
            layers[name].weight.requires_grad_(True)

    def after(name: str, output: Tensor, part: int | None = None, parts: int = 1) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: add(name, gradient, part, parts))

    reader = FunctionalReader(layers, before, after)
    with gradients_kept(model), reader.beside_calls(layers), watching_inputs(layers, before):
        model.requires_grad_(False)
        handles: list[Any] = []
        for name, layer in layers.items():
            if isinstance(layer, nn.Module):
                handles.append(layer.register_forward_hook(lambda _, __, output, name=name: after(name, output)))
        try:
            with reader:
                yield
        finally:
            for handle in handles:
                handle.remove()


def _filled(hessians: Tensor, counts: Tensor) -> Tensor:
    """The Hessians [groups, I, I], with the mean of the others for an expert that no calibration row reached."""
    reached = counts.ne(0)
    if bool(reached.all()):
        return hessians
    mean = hessians[reached].mean(dim=0)
    return torch.where(reached[:, None, None], hessians, mean)


def _errors_and_changes(
    matrix: Tensor, trials: Iterable[Tensor], hessians: Tensor, importance: Tensor | None
) -> tuple[list[float], list[float]]:
    """Each trial's output error, and its change relative to the weight: ||difference||^2 / ||matrix||^2."""
    size = matrix.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    errors = []
    changes = []
    for trial in trials:
        difference = trial.float() - matrix
        errors.append(_error(difference, hessians, importance))
        changes.append(float(difference.square().sum() / size))
    return errors, changes


def _error(change: Tensor, hessians: Tensor, importance: Tensor | None) -> float:
    groups = len(hessians)
    weights = [None] * groups if importance is None else list(importance.chunk(groups))
    parts = zip(change.chunk(groups), hessians, weights, strict=True)
    return sum(output_error(part, hessian, weight) for part, hessian, weight in parts)
