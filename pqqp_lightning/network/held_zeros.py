"""Entries of weights that stay zero while the model trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized


class HoldZeros:
    """Chosen entries of weights stay exactly zero: their gradients are removed, and they are set to zero on demand.

    The second, after every step, makes it hold under any optimizer, weight decay and momentum included.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._handles: list[Any] = []

    def hold(self, weight: Tensor, pruned: Tensor) -> None:
        """From now on hold the entries of ``weight`` where ``pruned`` (of its shape) is True, and no others."""
        key = id(weight)
        if key not in self._held and weight.requires_grad:
            self._handles.append(weight.register_hook(lambda gradient: gradient.masked_fill(self._held[key][1], 0)))
        self._held[key] = (weight, pruned)

    def zero(self) -> None:
        """Set what is held to zero."""
        with torch.no_grad():
            for weight, pruned in self._held.values():
                weight.masked_fill_(pruned, 0)

    def release(self) -> None:
        """Hold nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._held, self._handles = {}, []


def trained_weight(layer: Any) -> Tensor:
    """The parameter that training moves: the weight, or what lies under one that is computed (``parametrize``)."""
    return layer.parametrizations.weight.original if is_parametrized(layer, "weight") else layer.weight
