"""Coupled groups of transformers: the rows and columns of MLP and attention layers that must be removed together.

These groups follow from the names of the layers. torch-pruning 1.6 (``DependencyGraph.get_pruning_group``) traces
groups instead, which has limits for transformers:

- MLP widths of LLaMA, OPT and timm's ViT: correct; the tests compare the groups here with it.
- timm's attention: correct for the values if ``fused_attn`` is off while tracing, but it does not know heads:
  ``num_heads`` must be patched afterwards, and rows of q, k and v must be given together.
- LLaMA's attention: the search for the group of ``q_proj`` does not end (200 s on a model of two layers), because of
  the rotary embedding's slices and concatenations.
- It needs an example input and a forward pass with autograd, which is expensive for a large language model.

Other networks, such as ResNets, are traced: :mod:`pqqp_lightning.surgery.dependency`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from pqqp_lightning.network.blocks import tied_weights
from pqqp_lightning.network.layers import Layer
from pqqp_lightning.surgery.factored import Factored
from pqqp_lightning.surgery.slicing import SLICED_LAYERS

Side = Literal["out", "in"]
Kind = Literal["channels", "heads"]

MLPS = ((("gate_proj", "up_proj"), "down_proj"), (("fc1_g", "fc1_x"), "fc2"), (("fc1",), "fc2"))
"""Names of an MLP's layers: those that compute its channels, and the one that reads them (LLaMA; SwiGLU; OPT, ViT)."""


@dataclass(frozen=True)
class Member:
    """The rows or columns of one layer that belong to a coupled group.

    Attributes:
        name: module name.
        side: "out" for rows (a norm's entries are rows), "in" for columns (input channels of a convolution).
        index: the rows or columns of each unit, [U, K].
    """

    name: str
    side: Side
    index: Tensor


@dataclass(frozen=True)
class Patch:
    """A number in a module or its configuration that depends on a group's width.

    Attributes:
        name: module name.
        attribute: its attribute; ``config.x`` for the attribute ``x`` of its configuration.
        per_unit: the number is ``per_unit * units + constant``.
        constant: see ``per_unit``.
    """

    name: str
    attribute: str
    per_unit: int
    constant: int = 0

    def value(self, units: int) -> int:
        """Return the number for a group with ``units`` units."""
        return self.per_unit * units + self.constant


@dataclass(frozen=True)
class CoupledGroup:
    """Rows and columns that must be removed together.

    Attributes:
        name: name of the layer from which the group was found.
        kind: "channels", or "heads" (a key and value head with its query heads).
        width: number of units, U.
        members: the rows or columns of every layer in the group.
        patches: the numbers that depend on the group's width.
    """

    name: str
    kind: Kind
    width: int
    members: tuple[Member, ...]
    patches: tuple[Patch, ...] = ()

    def outputs(self) -> list[str]:
        """Return the names of the members whose rows belong to the group."""
        return [member.name for member in self.members if member.side == "out"]

    def inputs(self) -> list[str]:
        """Return the names of the members whose columns belong to the group."""
        return [member.name for member in self.members if member.side == "in"]


@dataclass
class Coupling:
    """The coupled groups of a model.

    Attributes:
        groups: the coupled groups that can be pruned.
        unprunable: the reason why other groups cannot be pruned, to the layers from which they were found.
    """

    groups: list[CoupledGroup] = field(default_factory=list)
    unprunable: dict[str, list[str]] = field(default_factory=dict)


def built_groups(model: nn.Module) -> Coupling:
    """Find the groups of MLPs and attentions with a known structure, in the order of the modules.

    The residual stream's width is not among them: all blocks share it.
    """
    coupling = Coupling()
    shared = _shared_modules(model)
    for name, module in model.named_modules():
        for find in (_attention_group, _fused_attention_group, _mlp_group):
            group = find(model, name, module)
            if group is None:
                continue
            if any(id(model.get_submodule(member.name)) in shared for member in group.members):
                coupling.unprunable.setdefault("one of its layers is used in several places: it stays", []).append(
                    group.name
                )
            else:
                coupling.groups.append(group)
    return coupling


def has_attention(model: nn.Module) -> bool:
    """Whether a module of ``model`` computes queries, keys and values."""
    for module in model.modules():
        children = {name for name, _ in module.named_children()}
        if {"qkv", "proj"} <= children or {"q_proj", "k_proj", "v_proj"} <= children:
            return True
    return False


def _mlp_group(model: nn.Module, name: str, module: nn.Module) -> CoupledGroup | None:
    for maker_names, reader_name in MLPS:
        reader = _columns_of(module, name, reader_name)
        makers = []
        for maker_name in maker_names:
            maker = _rows_of(module, name, maker_name)
            if maker is not None:
                makers.append(maker)
        if reader is None or len(makers) < len(maker_names):
            continue
        width = reader[1]
        if {rows for _, rows in makers} != {width}:
            continue
        channels = torch.arange(width)[:, None]  # [U, 1]: a unit is one row or column
        members = [Member(layer, "out", channels) for layer, _ in makers]
        norm = getattr(module, "norm", None)
        if isinstance(norm, nn.LayerNorm) and norm.normalized_shape == (width,):
            members.append(Member(_join(name, "norm"), "out", channels))
        members.append(Member(reader[0], "in", channels))
        settings = ("intermediate_size", "ffn_dim")
        patches = [Patch(name, setting, 1) for setting in settings if getattr(module, setting, None) == width]
        config = [_config_patch(model, name, setting, width, 1) for setting in settings]
        return CoupledGroup(members[0].name, "channels", width, tuple(members), (*patches, *_present(config)))
    return None


def _attention_group(model: nn.Module, name: str, module: nn.Module) -> CoupledGroup | None:
    """The group of Hugging Face's attention: separate q, k and v layers; query heads may share a key and value head."""
    head_dim = getattr(module, "head_dim", None)
    q = _rows_of(module, name, "q_proj")
    k = _rows_of(module, name, "k_proj")
    v = _rows_of(module, name, "v_proj")
    output = _columns_of(module, name, "o_proj") or _columns_of(module, name, "out_proj")
    if not isinstance(head_dim, int) or q is None or k is None or v is None or output is None:
        return None
    heads = q[1] // head_dim
    key_heads = k[1] // head_dim
    whole_heads = heads * head_dim == q[1] == output[1] and key_heads * head_dim == k[1] == v[1]
    if not whole_heads or heads % key_heads:
        return None
    if not _only_knows(module, ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"), head_dim):
        return None
    queries = torch.arange(q[1]).view(key_heads, -1)
    keys = torch.arange(k[1]).view(key_heads, head_dim)
    members = (
        Member(q[0], "out", queries),
        Member(k[0], "out", keys),
        Member(v[0], "out", keys),
        Member(output[0], "in", queries),
    )
    # A unit is a key and value head with the query heads that read it.
    queries_per_unit = heads // key_heads
    config_counts = [("num_attention_heads", heads, queries_per_unit), ("num_key_value_heads", key_heads, 1)]
    counts = [
        ("num_heads", heads, queries_per_unit),
        *config_counts,
        ("embed_dim", heads * head_dim, queries_per_unit * head_dim),
    ]
    patches = []
    for setting, value, per_unit in counts:
        if getattr(module, setting, None) == value:
            patches.append(Patch(name, setting, per_unit))
    config = [_config_patch(model, name, setting, value, per_unit) for setting, value, per_unit in config_counts]
    # With fewer heads, hidden_size / num_attention_heads is not the head width any more, so state the width.
    config.append(_config_patch(model, name, "head_dim", None, 0, head_dim))
    return CoupledGroup(members[0].name, "heads", key_heads, members, (*patches, *_present(config)))


def _fused_attention_group(model: nn.Module, name: str, module: nn.Module) -> CoupledGroup | None:
    """The group of timm's attention: one layer computes q, k and v, its rows are [3, heads, head_dim]."""
    heads = getattr(module, "num_heads", None)
    head_dim = getattr(module, "head_dim", None)
    out = _rows_of(module, name, "qkv")
    into = _columns_of(module, name, "proj")
    if not isinstance(heads, int) or not isinstance(head_dim, int) or out is None or into is None:
        return None
    width = heads * head_dim
    # Older timm has no attn_dim and assumes that the heads together are as wide as the residual stream.
    if getattr(module, "attn_dim", None) != width or (out[1], into[1]) != (3 * width, width):
        return None
    if not _only_knows(module, ("qkv", "proj", "norm", "gate"), head_dim):
        return None
    rows = torch.arange(3 * width).view(3, heads, head_dim).transpose(0, 1).flatten(1)  # [heads, 3 * head_dim]
    columns = torch.arange(width).view(heads, head_dim)
    members = [Member(out[0], "out", rows)]
    gate = _rows_of(module, name, "gate")
    if gate is not None:
        members.append(Member(gate[0], "out", columns))
    norm = getattr(module, "norm", None)
    if isinstance(norm, nn.LayerNorm):
        members.append(Member(_join(name, "norm"), "out", columns))
    elif norm is not None and not isinstance(norm, nn.Identity):
        return None
    members.append(Member(into[0], "in", columns))
    patches = (Patch(name, "num_heads", 1), Patch(name, "attn_dim", head_dim))
    return CoupledGroup(out[0], "heads", heads, tuple(members), patches)


def _shared_modules(model: nn.Module) -> set[int]:
    """ids of modules that have several names, or whose weight does."""
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    tied = tied_weights(model)
    weights = {id(module): id(getattr(module, "weight", None)) for module in model.modules()}
    return {module for module, count in places.items() if count > 1 or weights.get(module) in tied}


def _only_knows(attention: nn.Module, layers: tuple[str, ...], head_dim: int) -> bool:
    """Whether, apart from ``layers``, an attention has only norms of single heads.

    Other parameters, such as biases by position, may depend on the number of heads in an unknown way.
    """
    if any(parameter is not None for parameter in attention._parameters.values()):
        return False
    for name, child in attention.named_children():
        if name not in layers and any(tuple(parameter.shape) != (head_dim,) for parameter in child.parameters()):
            return False
    return True


def _rows_of(parent: nn.Module, path: str, child: str) -> tuple[str, int] | None:
    """(name, rows) of the layer that computes the outputs of ``parent.child``."""
    module = getattr(parent, child, None)
    name = _join(path, child)
    if isinstance(module, Factored):
        module = module.coefficients
        name = _join(name, "coefficients")
    if not isinstance(module, SLICED_LAYERS) or not _is_pointwise(module):
        return None
    return name, module.weight.shape[0]


def _columns_of(parent: nn.Module, path: str, child: str) -> tuple[str, int] | None:
    """(name, columns) of the layer that reads the inputs of ``parent.child``."""
    module = getattr(parent, child, None)
    name = _join(path, child)
    if isinstance(module, Factored):
        module = module.basis
        name = _join(name, "basis")
    if not isinstance(module, SLICED_LAYERS) or not _is_pointwise(module):
        return None
    return name, module.weight.shape[1]


def _is_pointwise(layer: Layer) -> bool:
    """Whether every output reads every input channel. A subclass may compute something else and does not count."""
    return type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1)


def _config_patch(
    model: nn.Module, name: str, attribute: str, now: int | None, per_unit: int, constant: int = 0
) -> Patch | None:
    """The patch of the nearest configuration at or above ``name`` that has ``attribute`` (of value ``now`` if given).

    Layers often share one configuration object. The patch names the outermost module that holds it, so that all these
    layers produce the same patch.
    """
    parts = name.split(".") if name else []
    owners = [".".join(parts[:end]) for end in range(len(parts) + 1)]
    configs = {owner: getattr(model.get_submodule(owner), "config", None) for owner in owners}
    for config in reversed(configs.values()):
        if config is not None and hasattr(config, attribute) and now in (None, getattr(config, attribute)):
            outermost = next(owner for owner, other in configs.items() if other is config)
            return Patch(outermost, f"config.{attribute}", per_unit, constant)
    return None


def _present(patches: list[Patch | None]) -> list[Patch]:
    return [patch for patch in patches if patch is not None]


def _join(path: str, child: str) -> str:
    return f"{path}.{child}" if path else child
