"""Weights that torch.nn.utils computes from other tensors, and folding them into plain weights.

These are ``torch.nn.utils.parametrizations`` (weight_norm, spectral_norm, orthogonal, and classes of the user's own),
the older hooks ``torch.nn.utils.weight_norm`` and ``spectral_norm``, and the masks of ``torch.nn.utils.prune``. A stage
that writes such a weight would lose it at the next forward pass, which computes it anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.prune import remove as remove_prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from pqqp_lightning.network.constraints import Constraints, set_constraints
from pqqp_lightning.network.layers import is_layer, weight_matrix

_NAMES = {"_WeightNorm": "weight_norm", "_SpectralNorm": "spectral_norm", "_Orthogonal": "orthogonal"}
"""How torch's own parametrizations are called by the functions that register them."""


def parametrized_tensors(model: nn.Module) -> dict[str, str]:
    """Find the tensors that are computed from others in every forward pass.

    Returns:
        Name of the tensor (``blocks.0.up.weight``) to the name of the function that made it so (``weight_norm``).
    """
    found = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        found.update({f"{prefix}{tensor}": kind for tensor, kind in _tensors_of(module).items()})
    return found


def fold(model: nn.Module, names: Iterable[str]) -> None:
    """Replace the tensors in ``names`` (from :func:`parametrized_tensors`) by plain ones, in place.

    Outputs in evaluation mode stay equal, bit for bit. A tensor that is plain already is left alone. The mask of
    ``torch.nn.utils.prune`` on a layer's weight becomes the layer's constraint, so that its zeros stay zero.
    """
    owners = {name.rpartition(".")[0] for name in names}
    for name, module in list(model.named_modules()):
        if name not in owners:
            continue
        if is_parametrized(module):
            _fold_parametrizations(module)
        for tensor, kind in _tensors_of(module).items():
            _fold_hook(module, tensor, kind)
        # Plain layers have their weight before their bias.
        if (weight := module._parameters.pop("weight", None)) is not None:
            module._parameters = {"weight": weight, **module._parameters}


def _tensors_of(module: nn.Module) -> dict[str, str]:
    """The computed tensors of one module: name to kind."""
    found = {}
    if is_parametrized(module):
        lists: Any = module.parametrizations
        for tensor, parts in lists.items():
            kinds = [type(part).__name__ for part in parts]
            found[tensor] = " and ".join(_NAMES.get(kind, kind) for kind in kinds)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            found[hook.name] = "weight_norm"
        elif isinstance(hook, SpectralNorm):
            found[hook.name] = "spectral_norm"
        elif isinstance(hook, BasePruningMethod):
            found[hook._tensor_name] = "prune"
    return found


def _fold_parametrizations(module: nn.Module) -> None:
    lists: Any = module.parametrizations
    values: dict[str, Tensor] = {}
    with _in_evaluation_mode(lists), torch.no_grad():  # in training mode, spectral_norm would move its estimate
        for tensor in lists:
            values[tensor] = getattr(module, tensor).detach().clone()
    # torch's own remove_parametrizations takes the tensor from the class as well, which copies of the module share.
    plain_class = type_before_parametrizations(module)
    del module.parametrizations
    module.__class__ = plain_class
    for tensor, value in values.items():
        originals = list(lists[tensor].parameters(recurse=False))
        if originals:
            trained = any(original.requires_grad for original in originals)
            module.register_parameter(tensor, nn.Parameter(value, requires_grad=trained))
        else:
            module.register_buffer(tensor, value)


def _fold_hook(module: nn.Module, tensor: str, kind: str) -> None:
    trained = any(p.requires_grad for n, p in module.named_parameters(recurse=False) if n.startswith(f"{tensor}_"))
    if kind == "prune":
        mask: Tensor = module.get_buffer(f"{tensor}_mask")
        remove_prune(module, tensor)
        if tensor == "weight" and is_layer(module) and not mask.is_meta:
            _constrain(module, mask)
    elif kind == "weight_norm":
        remove_weight_norm(module, tensor)
    else:
        remove_spectral_norm(module, tensor)
    module.get_parameter(tensor).requires_grad_(trained)


def _constrain(layer: Any, mask: Tensor) -> None:
    """Make ``mask``, in the layout of the weight, the constraint of ``layer``."""
    weight = layer.weight.data
    layer.weight.data = mask.to(weight.dtype)  # so that it is laid out as a matrix in the way that weights are
    keep = weight_matrix(layer).bool()
    layer.weight.data = weight
    set_constraints(layer, Constraints((keep.shape[0], keep.shape[1])).with_mask(keep))


@contextmanager
def _in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
