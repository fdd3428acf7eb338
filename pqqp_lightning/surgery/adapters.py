"""Low-rank adapters in a model: PEFT's wrappers put around layers, rebuilt from plain data, and taken out again.

A wrapped layer ``q_proj`` is ``q_proj.base_layer``, the same object with its constraints, next to ``q_proj.lora_A`` and
``q_proj.lora_B``. A layer may carry several adapters; all of them are active.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pqqp_lightning.algorithms.grid import Grid
from pqqp_lightning.algorithms.lora import change_through_merge, low_rank_update
from pqqp_lightning.network.activation_hooks import move_transforms
from pqqp_lightning.network.constraints import Constraints, constraints_of
from pqqp_lightning.network.layers import Layer, mark_adapter, to_weight, weight_matrix

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

BASE = "base_layer"


@dataclass(frozen=True)
class Adapters:
    """One adapter on each of some layers: all that is needed to build them, values aside.

    Attributes:
        name: of the adapter, unique in the model.
        rank: columns of B and rows of A.
        alpha: the update is alpha / rank * B A.
        dropout: on the adapters' input, in training.
        layers: module names of the layers, as they are without this adapter's wrapper.
    """

    name: str
    rank: int
    alpha: float
    dropout: float
    layers: list[str]


def is_wrapper(module: nn.Module) -> bool:
    """Whether ``module`` is PEFT's wrapper of a layer."""
    return type(module).__module__.startswith("peft.") and hasattr(module, "lora_A")


def wrapped_name(name: str, model: nn.Module) -> str:
    """``q_proj`` for the ``q_proj.base_layer`` of a layer that is wrapped already, else ``name``."""
    parent, _, last = name.rpartition(".")
    return parent if last == BASE and is_wrapper(model.get_submodule(parent)) else name


def unused_name(model: nn.Module, wanted: str) -> str:
    """``wanted``, or with a number behind it where the model has an adapter of that name."""
    taken = {name for module in _wrappers(model) for name in module.lora_A}
    names = [wanted, *(f"{wanted}_{number}" for number in range(2, len(taken) + 2))]
    return next(name for name in names if name not in taken)


def inject(model: nn.Module, adapters: Adapters, initialization: str | bool | None = None) -> None:
    """Put the adapters into ``model``, active and trainable; everything else keeps its ``requires_grad``.

    Args:
        model: changed in place; may be on the meta device without an initialization.
        adapters: what to put where.
        initialization: PEFT's ``init_lora_weights``, drawn from the global random state; None draws nothing and
            leaves zeros, for weights that are loaded afterwards.
    """
    with _quiet_bitsandbytes():
        from peft import LoraConfig, inject_adapter_in_model

    empty = initialization is None
    config = LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,  # type: ignore[arg-type]  # any number works
        lora_dropout=adapters.dropout,
        target_modules="|".join(re.escape(name) for name in adapters.layers),  # a list would match suffixes too
        init_lora_weights=True if empty else initialization,  # type: ignore[arg-type]
    )
    active, trained = _active(model), {id(p) for p in model.parameters() if p.requires_grad}
    with _keeping(model, "peft_config"):
        inject_adapter_in_model(config, model, adapters.name, low_cpu_mem_usage=empty)
    _activate(model, active, adapters.name)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    for layer in wrappers(model, adapters).values():
        _settle(layer, adapters.name, empty)


def wrappers(model: nn.Module, adapters: Adapters) -> dict[str, LoraLayer]:
    """The wrapped layers by name."""
    return {name: model.get_submodule(name) for name in adapters.layers}  # type: ignore[misc]


def parameters_of(model: nn.Module, adapters: Adapters) -> list[nn.Parameter]:
    """A and B of every layer."""
    parts = [p for layer in wrappers(model, adapters).values() for p in _parts(layer, adapters.name)]
    return [parameter for part in parts for parameter in part.parameters()]


def base_of(layer: LoraLayer) -> Layer:
    """The layer inside a wrapper."""
    return layer.get_base_layer()  # type: ignore[return-value]


def update_of(layer: LoraLayer, name: str) -> Tensor:
    """What the adapter adds to the matrix [O, I] of its layer, float32."""
    a, b = (weight_matrix(part) for part in _parts(layer, name))  # type: ignore[arg-type]
    return low_rank_update(a, b, layer.scaling[name])


def train_through_merge(model: nn.Module, adapters: Adapters) -> None:
    """Let the adapted layers compute with the weights as merging would leave them, until the adapters are removed."""
    for layer in wrappers(model, adapters).values():
        layer.lora_variant[adapters.name] = ThroughMerge()  # type: ignore[assignment]  # in place of PEFT's variants


class ThroughMerge:
    """Computes one wrapper's adapter as merging would leave it: masked, and rounded to the grid.

    Constraints are read at every step, since a checkpoint brings them after the structure.
    """

    def __init__(self) -> None:
        self._read: tuple[Constraints, torch.device, Tensor | None, Grid | None] | None = None

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **ignored: Any) -> Tensor:
        """``result`` of the layers below, and what the adapter adds to it; the interface of PEFT's variants."""
        a, b = _parts(module, active_adapter)
        x, scaling, base = module.lora_dropout[active_adapter](x), module.scaling[active_adapter], base_of(module)
        mask, grid = self._constraints(base)
        if mask is None and grid is None:
            return result + b(a(x)) * scaling
        update = low_rank_update(_as_matrix(a.weight), _as_matrix(b.weight), scaling)  # type: ignore[arg-type]
        change = change_through_merge(weight_matrix(base), update, mask, grid)
        weight = to_weight(change.to(x.dtype), base.weight.shape)
        if isinstance(base, nn.Conv2d):
            return result + F.conv2d(x, weight, None, base.stride, base.padding)
        return result + F.linear(x, weight)

    def _constraints(self, layer: Layer) -> tuple[Tensor | None, Grid | None]:
        """Mask and grid on the layer's device."""
        constraints, device = constraints_of(layer), layer.weight.device
        if self._read is None or self._read[0] is not constraints or self._read[1] != device:
            grid = None if constraints.grid is None else constraints.grid.to(device)
            self._read = constraints, device, constraints.mask(device), grid
        return self._read[2:]


def remove(model: nn.Module, adapters: Adapters) -> None:
    """Take the adapters out; a layer that carries no other one is put back as it was."""
    for name, layer in wrappers(model, adapters).items():
        if set(layer.lora_A) == {adapters.name}:
            parent, _, last = name.rpartition(".")
            model.get_submodule(parent)._modules[last] = base_of(layer)
            move_transforms(layer, base_of(layer))  # type: ignore[arg-type]
        else:
            trained = {id(p) for p in layer.parameters() if p.requires_grad}  # type: ignore[attr-defined]
            layer.delete_adapter(adapters.name)
            for parameter in layer.parameters():  # type: ignore[attr-defined]
                parameter.requires_grad_(id(parameter) in trained)


def _wrappers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_wrapper(module)]


def _as_matrix(weight: Tensor) -> Tensor:
    """[O, I], in the order of :func:`weight_matrix`, with its gradient."""
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.dim() == 4 else weight


def _parts(layer: LoraLayer, name: str) -> tuple[nn.Module, nn.Module]:
    return layer.lora_A[name], layer.lora_B[name]


def _settle(layer: LoraLayer, name: str, empty: bool) -> None:
    """Give a new adapter its device, dtype, mark and gradient, and the input that the layer gets."""
    weight = base_of(layer).weight
    move_transforms(base_of(layer), layer)  # type: ignore[arg-type]
    for part in _parts(layer, name):
        if empty and not weight.is_meta:
            part.to_empty(device=weight.device)
            for parameter in part.parameters():
                nn.init.zeros_(parameter)
        part.to(weight.device, weight.dtype)
        part.requires_grad_(True)
        mark_adapter(part)


def _active(model: nn.Module) -> dict[int, list[str]]:
    """Which adapters each wrapper uses; by id, since its name does not change."""
    return {id(module): list(module.active_adapters) for module in _wrappers(model)}


def _activate(model: nn.Module, earlier: dict[int, list[str]], name: str) -> None:
    """The new adapter besides the earlier ones, which PEFT has switched off."""
    for module in _wrappers(model):
        new = [name] if name in module.lora_A else []
        module.set_adapter(list(dict.fromkeys([*earlier.get(id(module), []), *new])))


@contextmanager
def _keeping(model: nn.Module, attribute: str) -> Iterator[None]:
    """PEFT leaves its settings on the model, and warns of those that it finds."""
    before: Any = vars(model).pop(attribute, None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups")
            yield
    finally:
        vars(model).pop(attribute, None)
        if before is not None:
            vars(model)[attribute] = before


@contextmanager
def _quiet_bitsandbytes() -> Iterator[None]:
    """PEFT imports bitsandbytes, which warns of an optional kernel that is of no use here."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
