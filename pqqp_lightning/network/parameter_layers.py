"""Layers that are plain parameters of a module: projections of attention, recurrent weights, experts in one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

Family = Literal["attention", "recurrent", "experts"]

_ATTRIBUTE = "_pqqp_parameter_layers"
"""The attribute of a module that holds its layers: copied and pickled with it, not part of its state dict."""


@dataclass(frozen=True)
class Form:
    """How a parameter holds its matrix.

    Attributes:
        family: what kind of module uses it.
        groups: row groups with inputs of their own: 3 for the joint projection of queries, keys and values, the number
            of experts for experts in one tensor, else 1.
        transposed: whether a 3-D parameter is [E, I, O] instead of [E, O, I].
    """

    family: Family
    groups: int = 1
    transposed: bool = False


class ParameterLayer:
    """A layer whose weight its module holds as a plain parameter, and uses without calling a submodule.

    There is one such object for each parameter, as long as its module lives, so that constraints can hang on it. It is
    copied with the module (``copy.deepcopy``, pickling). Its name in a model is the dotted path of the parameter.

    Attributes:
        owner: the module that holds the parameter.
        parameter: the parameter's name in ``owner``.
        family: "attention", "recurrent" or "experts".
        groups: see :class:`Form`.
        transposed: see :class:`Form`.
    """

    def __init__(self, owner: nn.Module, parameter: str, form: Form) -> None:
        self.owner, self.parameter = owner, parameter
        self.family, self.groups, self.transposed = form.family, form.groups, form.transposed

    @property
    def weight(self) -> Tensor:
        """The parameter itself, or what a parametrization computes from it."""
        return getattr(self.owner, self.parameter)

    def __repr__(self) -> str:
        return f"ParameterLayer({type(self.owner).__name__}.{self.parameter}, {self.family}, groups={self.groups})"


def parameter_layers(owner: nn.Module) -> Iterator[ParameterLayer]:
    """Yield the layers that are direct parameters of ``owner``, always the same objects."""
    forms = _forms_of(owner)
    if not forms:
        return
    kept: dict[str, ParameterLayer] = owner.__dict__.setdefault(_ATTRIBUTE, {})
    if any(layer.owner is not owner for layer in kept.values()):  # after copy.copy, which shares the dict
        kept = owner.__dict__[_ATTRIBUTE] = {name: _moved(layer, owner) for name, layer in kept.items()}
    for name, form in forms.items():
        if name not in kept:
            kept[name] = ParameterLayer(owner, name, form)
        yield kept[name]


def _moved(layer: ParameterLayer, owner: nn.Module) -> ParameterLayer:
    """A layer of ``owner`` with the constraints of ``layer``."""
    moved = ParameterLayer.__new__(ParameterLayer)
    moved.__dict__.update(vars(layer), owner=owner)
    return moved


def _forms_of(owner: nn.Module) -> dict[str, Form]:
    """The parameters of ``owner`` that are layers, by name."""
    if isinstance(owner, nn.MultiheadAttention):
        joint = {"in_proj_weight": Form("attention", groups=3)}  # queries, keys and values may read different inputs
        apart = dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), Form("attention"))
        return {name: form for name, form in (joint | apart).items() if _holds(owner, name)}
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase):
        names: Any = getattr(owner, "_flat_weights_names", ("weight_ih", "weight_hh"))  # cells have no list
        weights = [name for name in names if name.startswith("weight_") and name in owner._parameters]
        return dict.fromkeys(weights, Form("recurrent"))
    return _expert_forms(owner)


def _holds(owner: nn.Module, name: str) -> bool:
    return owner._parameters.get(name) is not None or is_parametrized(owner, name)


_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_experts")
_STREAM_WIDTHS = ("hidden_size", "hidden_dim", "embed_dim", "d_model", "dim")
_WRITERS = ("down", "w2", "out")
"""Parts of the names of the experts' last projections, which write the stream of hidden states."""


def _expert_forms(owner: nn.Module) -> dict[str, Form]:
    """The 3-D parameters of a module that computes with experts; those whose orientation is unknown are left out."""
    stacked = {name: weight for name, weight in _named_weights(owner) if weight.dim() == 3}
    if not stacked or not _holds_experts(owner):
        return {}
    stacked = {name: weight for name, weight in stacked.items() if _is_one_for_each_expert(owner, weight)}
    forms = {}
    for name, parameter in stacked.items():
        transposed = _is_transposed(owner, stacked, name)
        if transposed is not None:
            forms[name] = Form("experts", parameter.shape[0], transposed)
    return forms


def _named_weights(owner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The direct parameters of ``owner``, and the originals of parametrized ones, which are not computed."""
    for name, parameter in owner._parameters.items():
        if parameter is not None:
            yield name, parameter
    parametrized: Any = owner._modules.get("parametrizations") or {}
    for name in parametrized:
        original = getattr(parametrized[name], "original", None)
        if original is not None:  # several originals make one weight in orthogonal or weight_norm
            yield name, original


def _holds_experts(owner: nn.Module) -> bool:
    """Whether the module says that it computes with experts: other 3-D parameters are positions, tokens or kernels."""
    return _number(owner, _EXPERT_COUNTS) is not None or isinstance(getattr(owner, "is_transposed", None), bool)


def _is_one_for_each_expert(owner: nn.Module, weight: Tensor) -> bool:
    """Whether a 3-D parameter holds one matrix for each expert."""
    count = _number(owner, _EXPERT_COUNTS)
    return weight.is_floating_point() and min(weight.shape[1:]) > 1 and count in (None, weight.shape[0])


def _is_transposed(owner: nn.Module, stacked: dict[str, Tensor], name: str) -> bool | None:
    """Whether the matrices of one parameter are [I, O] instead of [O, I]; None if the module does not tell."""
    declared = getattr(owner, "is_transposed", None)  # experts of transformers 5
    if isinstance(declared, bool):
        return declared
    known = _by_sizes(owner, name, stacked[name].shape)
    if known is not None:
        return known
    # A square matrix tells nothing. The other weights of the module are held the same way.
    others = {_by_sizes(owner, other, weight.shape) for other, weight in stacked.items()} - {None}
    return others.pop() if len(others) == 1 else None


def _by_sizes(owner: nn.Module, name: str, shape: torch.Size) -> bool | None:
    """Compare the shape with the sizes that the module names; None if they fit both ways, or neither."""
    reads, writes = _number(owner, ("in_features", "input_size")), _number(owner, ("out_features", "output_size"))
    stream = _number(owner, _STREAM_WIDTHS)
    if reads is None and writes is None and stream is not None:
        if any(part in name for part in _WRITERS):
            writes = stream
        else:
            reads = stream
    straight = (writes in (None, shape[1])) and (reads in (None, shape[2]))
    turned = (writes in (None, shape[2])) and (reads in (None, shape[1]))
    return turned if straight != turned else None


def _number(owner: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first of these attributes of the module that is a number."""
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
