"""Keeping pruned entries of weights at zero while the model trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from pqqp_lightning.network.layers import Layer, weight_place


class HoldZeros:
    """Keeps chosen entries of weights at exactly zero.

    Gradient hooks remove the gradients of these entries. That alone does not stop momentum or weight decay from moving
    them, so the caller also calls :meth:`zero` after every optimizer step.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._handles: list[Any] = []

    def hold(self, weight: Tensor, pruned: Tensor) -> None:
        """Hold the entries of ``weight`` where ``pruned`` (of its shape) is True, instead of those held so far."""
        key = id(weight)
        if key not in self._held and weight.requires_grad:
            # The hook looks the mask up on every call, since a later call of ``hold`` may replace it.
            self._handles.append(weight.register_hook(lambda gradient: gradient.masked_fill(self._held[key][1], 0)))
        self._held[key] = (weight, pruned)

    def zero(self) -> None:
        """Set the held entries to zero."""
        with torch.no_grad():
            for weight, pruned in self._held.values():
                weight.masked_fill_(pruned, 0)

    def release(self) -> None:
        """Stop holding any entries."""
        for handle in self._handles:
            handle.remove()
        self._held = {}
        self._handles = []


def trained_weight(layer: Layer) -> Tensor:
    """Return the parameter that training moves: the weight, or the original of a parametrized weight."""
    module, name = weight_place(layer)
    if not is_parametrized(module, name):
        return layer.weight
    parametrizations: Any = module.parametrizations
    return parametrizations[name].original
