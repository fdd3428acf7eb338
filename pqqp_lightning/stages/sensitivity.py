"""The cost of compressing each layer, measured on the calibration data; allocations minimize it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pqqp_lightning.algorithms.allocation import output_error
from pqqp_lightning.calibration.collect import Reading
from pqqp_lightning.calibration.statistics import Hessian, sum_over_ranks
from pqqp_lightning.calibration.token_mask import TokenMask, positions_of
from pqqp_lightning.calibration.walk import Walk, calibrating, gradients_kept, samples_in
from pqqp_lightning.errors import Problem, RecipeError, shorten
from pqqp_lightning.network.blocks import Blocks
from pqqp_lightning.network.layers import Layer, rows_of, spatial_dimensions, weight_matrix
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

    Args:
        context: the stage's.
        blocks: to calibrate one by one.
        layers: by name.
        trials: makes each layer's matrix under each option.
        sensitivity: "loss" weighs each output's squared error by the mean squared gradient of the loss; "output"
            divides the squared error by the squared output.

    Raises:
        RecipeError: the loss has no finite gradient for some layer.
    """
    importance: dict[str, Tensor] = {}
    if sensitivity == "loss":
        try:
            importance = mean_squared_gradients(context.walk(blocks), layers)
        except RecipeError as error:
            raise RecipeError([problem.within(f"stages.{context.title}") for problem in error.problems]) from error
    costs: dict[str, list[float]] = {}

    def measure(reading: Reading) -> None:
        hessians = reading.statistic.value()
        for name, layer in reading.layers.items():
            matrix = weight_matrix(layer).float()
            errors = [_error(t.float() - matrix, hessians, importance.get(name)) for t in trials(name, layer, hessians)]
            whole = 1.0 if sensitivity == "loss" else _error(matrix, hessians, None)
            costs[name] = [e / whole if whole else 0.0 for e in errors]

    context.calibrate(blocks, layers, Hessian, measure)
    return {name: costs[name] for name in layers}


def mean_squared_gradients(walk: Walk, layers: dict[str, Layer]) -> dict[str, Tensor]:
    """The mean squared gradient [O] of a sample's loss with respect to each layer's outputs, over all tokens.

    The loss is that of the module's ``training_step``, in evaluation mode. Only activations get gradients, so that the
    memory needed is that of one batch's activations.
    """
    assert walk.loss is not None, "the walk has no loss"
    sums = {name: torch.zeros(rows_of(layer), device=layer.weight.device) for name, layer in layers.items()}
    rows = {name: torch.zeros((), device=layer.weight.device) for name, layer in layers.items()}

    def add(samples: int, mask: TokenMask | None, name: str, gradient: Tensor) -> None:
        spatial = spatial_dimensions(layers[name])
        if not spatial:
            gradient = positions_of(gradient, mask)
        channels = gradient.dim() - 1 - spatial
        flat = gradient.float().mul(samples).movedim(channels, -1).flatten(0, -2)  # [T, O]; the loss is a mean
        sums[name] += flat.square().sum(dim=0)
        rows[name] += flat.shape[0]

    with calibrating(walk.model), walk.forward_context(), torch.enable_grad():
        with torch.no_grad():
            masks = walk.masks()
        pairs = zip(walk.batches, masks, strict=True)
        bar = tqdm(pairs, total=len(masks), desc=walk.title, unit="batch", disable=not walk.progress, leave=False)
        for batch, mask in bar:
            with _watching(walk.model, layers, partial(add, samples_in(batch), mask)):
                walk.loss(batch).backward()
    for total in (*sums.values(), *rows.values()):
        sum_over_ranks(total)
    if missed := [name for name, count in rows.items() if not int(count)]:
        text = f"the loss has no gradient for {shorten(missed)}"
        raise RecipeError(Problem(text=text, way_out="Add them to ignore."))
    if odd := [name for name, total in sums.items() if not bool(torch.isfinite(total).all())]:
        text = f"the loss has NaN or infinite gradients for {shorten(odd)}"
        raise RecipeError(Problem(text=text, way_out="Check the model and the data."))
    return {name: sums[name] / rows[name] for name in layers}


@contextmanager
def _watching(model: nn.Module, layers: dict[str, Layer], add: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``add`` with the gradient of each layer's output, and restore the gradients of the weights on exit.

    A layer's output has a gradient if its input has one. The first layers' inputs have none; there the weight requires
    one instead.
    """

    def before(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if not args[0].requires_grad:
            layer.weight.requires_grad_(True)  # type: ignore[union-attr]

    def after(name: str, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: add(name, gradient))

    with gradients_kept(model):
        model.requires_grad_(False)
        handles: list[Any] = []
        for name, layer in layers.items():
            assert isinstance(layer, nn.Module)
            handles.append(layer.register_forward_pre_hook(before))
            handles.append(layer.register_forward_hook(lambda _, __, output, name=name: after(name, output)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _error(change: Tensor, hessians: Tensor, importance: Tensor | None) -> float:
    groups = len(hessians)
    weights = [None] * groups if importance is None else list(importance.chunk(groups))
    parts = zip(change.chunk(groups), hessians, weights, strict=True)
    return sum(output_error(part, hessian, weight) for part, hessian, weight in parts)
