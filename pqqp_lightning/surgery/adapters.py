"""Low-rank adapters: adds PEFT's wrappers to layers, rebuilds them from plain data, and removes them.

When ``q_proj`` is wrapped, the same object with its constraints becomes ``q_proj.base_layer``, next to
``q_proj.lora_A`` and ``q_proj.lora_B``. A layer may carry several adapters; all of them are active.
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
from pqqp_lightning.network.activation_hooks import leave_fast_path, move_transforms
from pqqp_lightning.network.constraints import Constraints, constraints_of
from pqqp_lightning.network.layers import Layer, mark_adapter, set_weight_matrix, to_weight, weight_matrix
from pqqp_lightning.network.layouts import as_matrix, default_layout

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

BASE = "base_layer"


@dataclass(frozen=True)
class Adapters:
    """The structure of one adapter on several layers, without its weights.

    Attributes:
        name: of the adapter, unique in the model.
        rank: columns of B and rows of A.
        alpha: the update is alpha / rank * B A.
        dropout: probability, on the adapters' input in training.
        layers: module names of the layers before this adapter wraps them.
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
    """Return the wrapper's name for a wrapped layer (``q_proj`` for ``q_proj.base_layer``), else ``name``."""
    parent, _, last = name.rpartition(".")
    return parent if last == BASE and is_wrapper(model.get_submodule(parent)) else name


def wrapper_of(name: str, model: nn.Module) -> LoraLayer:
    """Return the wrapper of the wrapped layer ``name``."""
    return model.get_submodule(wrapped_name(name, model))  # type: ignore[return-value]


def unused_name(model: nn.Module, wanted: str) -> str:
    """Return ``wanted``, with a number appended if the model has an adapter of that name."""
    taken: set[str] = set()
    for module in _wrappers(model):
        taken.update(module.lora_A)
    name = wanted
    number = 2
    while name in taken:
        name = f"{wanted}_{number}"
        number += 1
    return name


def inject(model: nn.Module, adapters: Adapters, initialization: str | bool | None = None) -> None:
    """Add the adapters to ``model``, active and trainable; all other parameters keep their ``requires_grad``.

    Args:
        model: changed in place; may be on the meta device if ``initialization`` is None.
        adapters: the adapters to add.
        initialization: PEFT's ``init_lora_weights``, which draws from the global random state; None sets zeros without
            drawing, for weights that are loaded afterwards.
    """
    with _quiet_bitsandbytes():
        from peft import LoraConfig, inject_adapter_in_model

    empty = initialization is None
    config = LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,  # type: ignore[arg-type]  # any number works
        lora_dropout=adapters.dropout,
        target_modules="|".join(re.escape(name) for name in adapters.layers),  # PEFT matches a list by suffix too
        init_lora_weights=True if empty else initialization,  # type: ignore[arg-type]
    )
    # PEFT deactivates the earlier adapters and changes ``requires_grad`` throughout the model: remember and restore.
    # Existing wrappers are known by id, since PEFT adds a further adapter to the same object.
    earlier = {id(module): list(module.active_adapters) for module in _wrappers(model)}
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    with _peft_config_hidden(model):
        inject_adapter_in_model(config, model, adapters.name, low_cpu_mem_usage=empty)
    for module in _wrappers(model):
        active = list(earlier.get(id(module), []))
        if adapters.name in module.lora_A and adapters.name not in active:
            active.append(adapters.name)
        module.set_adapter(active)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trainable)
    for name, layer in wrappers(model, adapters).items():
        _set_up(layer, adapters.name, empty)
        leave_fast_path(model, name)


def wrappers(model: nn.Module, adapters: Adapters) -> dict[str, LoraLayer]:
    """Return the wrapped layers by name."""
    return {name: model.get_submodule(name) for name in adapters.layers}  # type: ignore[misc]


def parameters_of(model: nn.Module, adapters: Adapters) -> list[nn.Parameter]:
    """Return A and B of every layer."""
    parameters: list[nn.Parameter] = []
    for layer in wrappers(model, adapters).values():
        for part in _parts(layer, adapters.name):
            parameters.extend(part.parameters())
    return parameters


def base_of(layer: LoraLayer) -> Layer:
    """Return the layer inside a wrapper."""
    return layer.get_base_layer()  # type: ignore[return-value]


def update_of(layer: LoraLayer, name: str) -> Tensor:
    """Compute what the adapter adds to its layer's matrix: float32 [O, I]."""
    a, b = _parts(layer, name)
    return low_rank_update(weight_matrix(a), weight_matrix(b), layer.scaling[name])  # type: ignore[arg-type]


def set_factors(layer: LoraLayer, name: str, a: Tensor, b: Tensor) -> tuple[Layer, Layer]:
    """Set an adapter to the update B A of its layer's matrix, and return the layers that hold A and B.

    Args:
        layer: the wrapper.
        name: of the adapter.
        a: A [r, I], in the columns of :func:`~pqqp_lightning.network.layers.weight_matrix`.
        b: B [O, r].
    """
    holds_a, holds_b = _parts(layer, name)
    set_weight_matrix(holds_a, a)  # type: ignore[arg-type]
    set_weight_matrix(holds_b, b / layer.scaling[name])  # type: ignore[arg-type]
    return holds_a, holds_b  # type: ignore[return-value]


def train_through_merge(model: nn.Module, adapters: Adapters) -> None:
    """Let the adapted layers compute with merged weights, as masked and rounded, until the adapters are removed."""
    for layer in wrappers(model, adapters).values():
        layer.lora_variant[adapters.name] = ThroughMerge()  # type: ignore[assignment]  # in place of PEFT's variants


class ThroughMerge:
    """Computes the output of one wrapper's adapter as after merging: masked, and rounded to the grid.

    The constraints are read at every step, since loading a checkpoint sets them after the structure.
    """

    def __init__(self) -> None:
        self._read: tuple[Constraints, torch.device, Tensor | None, Grid | None] | None = None

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **ignored: Any) -> Tensor:
        """Add the adapter's output to the ``result`` of the base layer and earlier adapters (PEFT calls this)."""
        a, b = _parts(module, active_adapter)
        x = module.lora_dropout[active_adapter](x)
        scaling = module.scaling[active_adapter]
        base = base_of(module)
        mask, grid = self._constraints(base)
        if mask is None and grid is None:
            return result + b(a(x)) * scaling
        update = low_rank_update(_as_matrix(a.weight), _as_matrix(b.weight), scaling)  # type: ignore[arg-type]
        change = change_through_merge(weight_matrix(base), update, mask, grid)
        change = change.to(x.dtype)
        if isinstance(base, nn.Conv2d):
            return result + F.conv2d(x, to_weight(base, change), None, base.stride, base.padding)
        return result + F.linear(x, change)

    def _constraints(self, layer: Layer) -> tuple[Tensor | None, Grid | None]:
        """Mask and grid on the layer's device; unpacked again only after the constraints or the device changed."""
        constraints = constraints_of(layer)
        device = layer.weight.device
        if self._read is None or self._read[0] is not constraints or self._read[1] != device:
            grid = None if constraints.grid is None else constraints.grid.to(device)
            self._read = constraints, device, constraints.mask(device), grid
        return self._read[2:]


def remove(model: nn.Module, adapters: Adapters) -> None:
    """Remove the adapters; a wrapper without other adapters is replaced by its base layer."""
    for name, layer in wrappers(model, adapters).items():
        if set(layer.lora_A) == {adapters.name}:
            parent, _, last = name.rpartition(".")
            model.get_submodule(parent)._modules[last] = base_of(layer)  # type: ignore[assignment]
            move_transforms(layer, base_of(layer))  # type: ignore[arg-type]
        else:
            # PEFT activates another adapter instead of the deleted one and makes it trainable: restore.
            trainable = {id(p) for p in layer.parameters() if p.requires_grad}  # type: ignore[attr-defined]
            layer.delete_adapter(adapters.name)
            for parameter in layer.parameters():  # type: ignore[attr-defined]
                parameter.requires_grad_(id(parameter) in trainable)


def _wrappers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_wrapper(module)]


def _as_matrix(weight: Tensor) -> Tensor:
    """The weight of an adapter's Linear or convolution as [O, I] like :func:`weight_matrix`, but differentiable."""
    return as_matrix(weight, default_layout(weight.dim()))


def _parts(layer: LoraLayer, name: str) -> tuple[nn.Module, nn.Module]:
    """A and B of one adapter."""
    return layer.lora_A[name], layer.lora_B[name]


def _set_up(layer: LoraLayer, name: str, empty: bool) -> None:
    """Set a new adapter's device, dtype, mark and ``requires_grad``; move the layer's transforms to the wrapper.

    On the wrapper the transforms change the input of both the layer and the adapter.
    """
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


@contextmanager
def _peft_config_hidden(model: nn.Module) -> Iterator[None]:
    """Hide the model's own ``peft_config`` from PEFT, which warns about it and overwrites it; restore it on exit."""
    before: Any = vars(model).pop("peft_config", None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups")
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # PEFT sets it for Conv1D
            yield
    finally:
        vars(model).pop("peft_config", None)
        if before is not None:
            vars(model)["peft_config"] = before


@contextmanager
def _quiet_bitsandbytes() -> Iterator[None]:
    """Silence bitsandbytes while PEFT imports it: it warns about a missing optional kernel that is not used here."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
