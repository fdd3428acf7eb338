"""How a forward pass in evaluation mode uses each layer, as observed on a probe batch and marked in the model.

The marks are copied with the module (``copy.deepcopy``, pickling). A layer without a mark counts as called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

LayerUse = Literal["called", "functional", "unused"]
"""Called as a module; its weight passed to a function, so that its forward and its hooks never run; or not used."""

_USE = "_pqqp_use"


def mark_uses(model: nn.Module, uses: Mapping[str, LayerUse]) -> None:
    """Mark the layers of ``model`` with their uses, by name."""
    for name, use in uses.items():
        model.get_submodule(name).__dict__[_USE] = use


def marked_uses(model: nn.Module) -> dict[str, LayerUse]:
    """Return the marks of a model's layers, by name."""
    return {name: vars(module)[_USE] for name, module in model.named_modules() if _USE in vars(module)}


def use_of(layer: Any) -> LayerUse:
    """Return how the forward pass uses a layer, as far as it is known; without a mark it counts as called."""
    if not isinstance(layer, nn.Module):
        return "functional"
    # torch's attention makes its output projection of this class, and passes its weight to a function
    known: LayerUse = "functional" if isinstance(layer, NonDynamicallyQuantizableLinear) else "called"
    return layer.__dict__.get(_USE, known)
