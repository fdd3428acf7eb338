"""Importance of channels on calibration data: mean squared activations, and first-order Taylor terms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pqqp_lightning.algorithms.channels import sum_by_channel, taylor_terms
from pqqp_lightning.calibration.collect import watching_inputs
from pqqp_lightning.calibration.functional import FunctionalReader
from pqqp_lightning.calibration.statistics import sum_over_ranks
from pqqp_lightning.calibration.token_mask import TokenMask, positions_of
from pqqp_lightning.calibration.walk import Walk, calibrating, gradients_kept
from pqqp_lightning.errors import Problem, RecipeError, shorten

Parts = dict[str, int]
"""Module name to a dimension of its weight: 0 for rows, 1 for columns."""


def mean_squared_inputs(walk: Walk, layers: Iterable[str]) -> dict[str, Tensor]:
    """Compute the mean squared input of each channel of ``layers`` over the calibration data.

    The whole model runs once on every batch in evaluation mode; only one number per channel is kept.

    Returns:
        Layer name to [I]; without the layers that the calibration data never reaches.
    """
    modules: dict[str, Any] = {name: walk.model.get_submodule(name) for name in layers}
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}

    def add(mask: TokenMask | None, name: str, inputs: Tensor, part: int | None = None, parts: int = 1) -> None:
        if isinstance(modules[name], nn.Linear):
            inputs = positions_of(inputs, mask)
        dim = inputs.dim() - 3 if isinstance(modules[name], nn.Conv2d) else inputs.dim() - 1
        total = sum_by_channel(inputs.detach().float().square(), dim)
        rows = torch.tensor(inputs.numel() // inputs.shape[dim], device=total.device)
        sums[name] = sums[name] + total if name in sums else total
        counts[name] = counts[name] + rows if name in counts else rows

    with calibrating(walk.model), walk.forward_context():
        for batch, mask in walk.masked_batches():
            see = partial(add, mask)
            reader = FunctionalReader(modules, see)
            with reader.beside_calls(modules), watching_inputs(modules, see), reader:
                walk.run(batch)
    means = {}
    for name, module in modules.items():
        width = module.in_channels if isinstance(module, nn.Conv2d) else module.weight.shape[-1]
        total = sums.get(name, torch.zeros(width, device=module.weight.device))  # on another rank it may have rows
        count = counts.get(name, torch.zeros((), dtype=torch.int64, device=total.device))
        sum_over_ranks(total)
        if int(sum_over_ranks(count)):
            means[name] = total / count
    return means


def taylor_by_channel(walk: Walk, parts: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Tensor]:
    """|weight * gradient| of the module's training loss, summed over each row or column of weights: (name, dim) to [C].

    Averaged over the calibration batches, one gradient each. Runs in evaluation mode and leaves the model's own
    gradients alone. Weights without a gradient (experts that no token takes) are left out.

    Raises:
        RecipeError: the loss depends on none of the weights, or a gradient is NaN or infinite.
    """
    assert walk.loss is not None, "the walk has no loss"
    wanted = list(parts)
    weights = {name: walk.model.get_parameter(f"{name}.weight") for name, _ in wanted}
    sums: dict[tuple[str, int], Tensor] = {}
    used = {name: torch.zeros((), dtype=torch.int64, device=weight.device) for name, weight in weights.items()}
    for name, dim in wanted:
        weight = weights[name]
        sums[name, dim] = weight.new_zeros(weight.shape[dim], dtype=torch.float32)
    with calibrating(walk.model), walk.forward_context(), torch.enable_grad(), _alone_trainable(walk.model, weights):
        for batch in tqdm(walk.batches, desc=walk.title, unit="batch", disable=not walk.progress, leave=False):
            loss = walk.loss(batch)
            if loss.requires_grad:
                loss.backward()
            for name, dim in wanted:
                gradient = weights[name].grad
                if gradient is None:  # an expert without a token in this batch
                    continue
                used[name] += 1
                sums[name, dim] += sum_by_channel(taylor_terms(weights[name].detach(), gradient), dim)
            for weight in weights.values():  # else the next batch's gradient would be added to it
                weight.grad = None
    for count in used.values():
        sum_over_ranks(count)
    if not any(used.values()):
        text = f"the loss has no gradient for {shorten(weights)}"
        raise RecipeError(Problem(text=text, way_out="Add them to ignore."))
    if odd := [name for (name, _), total in sums.items() if not bool(torch.isfinite(total).all())]:
        text = f"the loss has NaN or infinite gradients for {shorten(dict.fromkeys(odd))}"
        raise RecipeError(Problem(text=text, way_out="Check the data."))
    batches = sum_over_ranks(torch.tensor(len(walk.batches), device=next(iter(weights.values())).device))
    terms = {part: sum_over_ranks(total) / batches for part, total in sums.items()}
    return {(name, dim): term for (name, dim), term in terms.items() if used[name]}


@contextmanager
def _alone_trainable(model: nn.Module, weights: dict[str, Any]) -> Iterator[None]:
    """Inside, only ``weights`` get gradients; restores ``requires_grad`` and ``grad`` of every parameter on exit."""
    chosen = {id(weight) for weight in weights.values()}
    with gradients_kept(model):
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
            parameter.grad = None
        yield
