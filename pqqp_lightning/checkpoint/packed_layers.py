"""Layers that keep a weight as the checkpoint stores it, and unpack it while they run.

The class of such a layer is a subclass of its own (``PackedLinear`` of ``Linear``). Its weight is no parameter: reading
the attribute unpacks it. So whatever reads ``layer.weight`` works, and gets a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pqqp_lightning.checkpoint.packing import unpack_values
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.layers import Layer, weight_place
from pqqp_lightning.network.parameter_layers import ParameterLayer

PACKED = "packed_weights"
"""The child of a packed layer that holds its weights by parameter name."""
WAY_OUT = "Load it without packed=True."


class PackedWeight(nn.Module):
    """One weight, packed.

    Its parts are buffers, so that they move with the model. They are not in the state dict, which has the weight.

    Args:
        entry: the weight's entry in the manifest.
        parts: its tensors in the checkpoint.
        requires_grad: of the parameter. torch chooses its kernels by that, too: without it, a product may differ in its
            last bit.
    """

    def __init__(self, entry: dict[str, Any], parts: dict[str, Tensor], requires_grad: bool = True) -> None:
        super().__init__()
        self.entry = entry
        self.requires_grad = requires_grad
        self.dtype: torch.dtype = getattr(torch, entry["dtype"])
        for name, part in parts.items():
            self.register_buffer(name, part)

    def forward(self) -> Tensor:
        """The weight, unpacked. A backward pass that reaches it is refused."""
        # As a parameter would be, not an inference tensor, whose views require no gradient.
        with torch.inference_mode(False), torch.no_grad():
            weight = unpack_values(self.entry, self._parts()).to(self.dtype)
        weight.requires_grad_(self.requires_grad)
        if weight.requires_grad and torch.is_grad_enabled():
            weight.register_hook(refuse_training)
        return weight

    def extra_repr(self) -> str:
        """What is stored: shape, bits of a value, bytes."""
        bits = self.entry["bits"] or 8 * self.dtype.itemsize
        size_bytes = sum(part.nbytes for part in self._parts().values())
        return f"{list(self.entry['shape'])}, bits={bits}, size_bytes={size_bytes}"

    def _parts(self) -> dict[str, Tensor]:
        return {name: part for name, part in self._buffers.items() if part is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Move the parts; a new dtype is that of the unpacked weight, since a scale in it would be another scale."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, part in self._parts().items():
            if name == "scale":
                self._buffers[name] = fn(part.view(torch.uint8)).view(part.dtype)
            else:
                self._buffers[name] = fn(part)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: the layer writes the weight."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the layer refuses the weight."""


class PackedLayer(nn.Module):
    """Mixed into the class of a layer, or of a module with :class:`ParameterLayer` weights, to read packed weights."""

    def __getattr__(self, name: str) -> Any:
        """The unpacked weight; kept until the end of a forward pass, which may read it several times."""
        packed = self.__dict__.get("_modules", {}).get(PACKED)
        if packed is None or name not in packed:
            return super().__getattr__(name)
        if self.training and torch.is_grad_enabled():
            refuse_training()
        unpacked: dict[str, Tensor] | None = self.__dict__.get("_unpacked")
        if unpacked is None:
            return packed[name]()
        if name not in unpacked:
            unpacked[name] = packed[name]()
        return unpacked[name]

    def __setattr__(self, name: str, value: Any) -> None:
        """As in any module, except that a packed weight cannot be replaced."""
        packed = self.__dict__.get("_modules", {}).get(PACKED)
        if packed is not None and name in packed:
            raise RecipeError(f"{name} of a {type(self).__name__} is packed and cannot be replaced. {WAY_OUT}")
        super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own, with weights that are unpacked at their first use."""
        self.__dict__["_unpacked"] = {}
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            del self.__dict__["_unpacked"]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time: a pickle names the class that it was made from."""
        return _new_layer, (type(self).__bases__[1],), self.__dict__

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, weight in _packed_weights(self).items():
            destination[f"{prefix}{name}"] = weight().detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = [f"{prefix}{name}" for name in _packed_weights(self) if f"{prefix}{name}" in state_dict]
        if given:
            error_msgs.append(f"{', '.join(given)} is packed and cannot be overwritten. {WAY_OUT}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def can_pack(layer: Layer) -> bool:
    """Whether the module of ``layer`` reads the weight as an attribute; recurrent modules keep a list of their own."""
    return not (isinstance(layer, ParameterLayer) and layer.family == "recurrent")


def pack_layer(layer: Layer, weight: PackedWeight) -> None:
    """Let the module of ``layer`` read ``weight`` instead of its parameter."""
    module, parameter = weight_place(layer)
    del module._parameters[parameter]
    if not isinstance(module, PackedLayer):
        layer_class: Any = type(module)
        module.__class__ = _packed_class(layer_class)
        module._modules[PACKED] = nn.ModuleDict()
    _packed_weights(module)[parameter] = weight


def is_packed_model(model: nn.Module) -> bool:
    """Whether any layer of ``model`` keeps its weight packed."""
    return any(isinstance(module, PackedLayer) for module in model.modules())


def refuse_training(*args: Any, **kwargs: Any) -> NoReturn:
    """Say that packed weights cannot be trained, and what to do."""
    raise RecipeError(f"A model with packed weights cannot be trained or compressed. {WAY_OUT}")


@cache
def _packed_class(layer_class: Any) -> type[nn.Module]:
    return type(f"Packed{layer_class.__name__}", (PackedLayer, layer_class), {"__doc__": PackedLayer.__doc__})


def _packed_weights(layer: nn.Module) -> Any:
    """The packed weights of a packed layer by parameter name: a ModuleDict."""
    return layer._modules[PACKED]


def _new_layer(layer_class: Any) -> nn.Module:
    cls = _packed_class(layer_class)
    return cls.__new__(cls)
