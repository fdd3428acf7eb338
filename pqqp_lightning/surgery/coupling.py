"""Which rows and columns of which layers a network must lose together, where its build tells: MLPs and attention.

What torch-pruning 1.6 finds for these (``DependencyGraph.get_pruning_group``), and why groups are formed here instead:

- MLP widths of LLaMA, OPT and timm's ViT: right; the tests hold these groups against it.
- timm's attention, with ``fused_attn`` off while it traces: right for the values. Heads are not its units:
  ``num_heads`` must be patched afterwards, and rows of q, k and v must be named together.
- LLaMA's attention: asked for the group of ``q_proj`` it does not come back (200 s on a model of two layers); the
  rotary embedding's slices and concatenations send it in circles.
- It needs an example input and a forward pass with autograd, which a large language model should not be put through.

Everything else (ResNets and their kin) is traced: :mod:`pqqp_lightning.surgery.dependency`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from pqqp_lightning.network.blocks import tied_weights
from pqqp_lightning.network.layers import LAYER_TYPES, Layer
from pqqp_lightning.surgery.factored import Factored

Side = Literal["out", "in"]
Kind = Literal["channels", "heads"]

MLPS = ((("gate_proj", "up_proj"), "down_proj"), (("fc1_g", "fc1_x"), "fc2"), (("fc1",), "fc2"))
"""Names of an MLP's layers: those that make its channels, and the one that reads them (LLaMA; SwiGLU; OPT, ViT)."""


@dataclass(frozen=True)
class Member:
    """One layer's share in a coupled group.

    Attributes:
        name: module name.
        side: "out" for rows (a norm's entries are rows), "in" for columns, or input channels of a convolution.
        index: the rows or columns of each unit, [U, K].
    """

    name: str
    side: Side
    index: Tensor


@dataclass(frozen=True)
class Patch:
    """A number that a module, or its configuration, keeps about a group's width.

    Attributes:
        name: module name.
        attribute: its attribute; ``config.x`` is one of its configuration.
        per_unit: the number is this many times the group's units.
        constant: added to it.
    """

    name: str
    attribute: str
    per_unit: int
    constant: int = 0

    def value(self, units: int) -> int:
        """The number where so many units are left."""
        return self.per_unit * units + self.constant


@dataclass(frozen=True)
class CoupledGroup:
    """What goes together.

    Attributes:
        name: of the layer that it was found from.
        kind: "channels", or "heads" (a key and value head with its query heads).
        width: units, U.
        members: every layer that loses something with a unit.
        patches: the numbers that follow.
    """

    name: str
    kind: Kind
    width: int
    members: tuple[Member, ...]
    patches: tuple[Patch, ...] = ()

    def outputs(self) -> list[str]:
        """Names of the members that lose rows."""
        return [member.name for member in self.members if member.side == "out"]

    def inputs(self) -> list[str]:
        """Names of the members that lose columns."""
        return [member.name for member in self.members if member.side == "in"]


@dataclass
class Coupling:
    """What was found in a model.

    Attributes:
        groups: the coupled groups that can be pruned.
        left: why others cannot, to the layers that they were found from.
    """

    groups: list[CoupledGroup] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)


def built_groups(model: nn.Module) -> Coupling:
    """The MLPs and attentions of a transformer that are built in a known way, in order; the residual width is none."""
    coupling, shared = Coupling(), _shared_modules(model)
    for name, module in model.named_modules():
        for find in (_attention_group, _fused_attention_group, _mlp_group):
            group = find(model, name, module)
            if group is None:
                continue
            if any(id(model.get_submodule(member.name)) in shared for member in group.members):
                coupling.left.setdefault("a layer of it serves at several places: it stays", []).append(group.name)
            else:
                coupling.groups.append(group)
    return coupling


def has_attention(model: nn.Module) -> bool:
    """Whether some module of ``model`` makes queries, keys and values."""
    children = ({name for name, _ in module.named_children()} for module in model.modules())
    return any({"qkv", "proj"} <= names or {"q_proj", "k_proj", "v_proj"} <= names for names in children)


def _mlp_group(model: nn.Module, name: str, module: nn.Module) -> CoupledGroup | None:
    for makers, reader in MLPS:
        outs = [_rows_of(module, name, child) for child in makers]
        into = _columns_of(module, name, reader)
        if into is None or any(out is None for out in outs):
            continue
        width = into[1]
        if any(out is not None and out[1] != width for out in outs):
            continue
        each = torch.arange(width)[:, None]
        members = [Member(out[0], "out", each) for out in outs if out is not None]
        norm = getattr(module, "norm", None)
        if isinstance(norm, nn.LayerNorm) and norm.normalized_shape == (width,):
            members.append(Member(_join(name, "norm"), "out", each))
        members.append(Member(into[0], "in", each))
        numbers = [Patch(name, a, 1) for a in ("intermediate_size", "ffn_dim") if getattr(module, a, None) == width]
        config = [_config_patch(model, name, a, width, 1) for a in ("intermediate_size", "ffn_dim")]
        return CoupledGroup(members[0].name, "channels", width, tuple(members), (*numbers, *_present(config)))
    return None


def _attention_group(model: nn.Module, name: str, module: nn.Module) -> CoupledGroup | None:
    """Hugging Face's: q, k and v projections apart, heads that may share keys and values."""
    head_dim = getattr(module, "head_dim", None)
    outs = {part: _rows_of(module, name, f"{part}_proj") for part in "qkv"}
    into = _columns_of(module, name, "o_proj") or _columns_of(module, name, "out_proj")
    q, k, v = outs["q"], outs["k"], outs["v"]
    if not isinstance(head_dim, int) or q is None or k is None or v is None or into is None:
        return None
    heads, shared = q[1] // head_dim, k[1] // head_dim
    if (heads * head_dim, shared * head_dim, k[1]) != (into[1], k[1], v[1]) or q[1] != into[1] or heads % shared:
        return None
    if not _only_knows(module, ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"), head_dim):
        return None
    queries = torch.arange(q[1]).view(shared, -1)
    keys = torch.arange(k[1]).view(shared, head_dim)
    members = (
        Member(q[0], "out", queries),
        Member(k[0], "out", keys),
        Member(v[0], "out", keys),
        Member(into[0], "in", queries),
    )
    each = heads // shared
    counts = [("num_heads", heads, each), ("num_attention_heads", heads, each), ("num_key_value_heads", shared, 1)]
    counts.append(("embed_dim", heads * head_dim, each * head_dim))
    patches = [Patch(name, a, per) for a, now, per in counts if getattr(module, a, None) == now]
    config = [_config_patch(model, name, a, now, per) for a, now, per in counts[1:3]]
    config.append(_config_patch(model, name, "head_dim", None, 0, head_dim))
    return CoupledGroup(members[0].name, "heads", shared, members, (*patches, *_present(config)))


def _fused_attention_group(model: nn.Module, name: str, module: nn.Module) -> CoupledGroup | None:
    """timm's: rows of q, k and v in one layer, [3, heads, head_dim]."""
    heads, head_dim = getattr(module, "num_heads", None), getattr(module, "head_dim", None)
    out, into = _rows_of(module, name, "qkv"), _columns_of(module, name, "proj")
    if not isinstance(heads, int) or not isinstance(head_dim, int) or out is None or into is None:
        return None
    width = heads * head_dim
    # older timm, without attn_dim, takes the heads' outputs to be as wide as the residual stream
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
    """ids of modules that stand at several places, or whose weight does."""
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    tied = tied_weights(model)
    weights = {id(module): id(getattr(module, "weight", None)) for module in model.modules()}
    return {module for module, count in places.items() if count > 1 or weights.get(module) in tied}


def _only_knows(attention: nn.Module, layers: tuple[str, ...], head_dim: int) -> bool:
    """Whether, apart from ``layers``, an attention holds nothing but norms of single heads: no biases by position."""
    others = (child for name, child in attention.named_children() if name not in layers)
    numbers = (parameter for child in others for parameter in child.parameters())
    own = any(parameter is not None for parameter in attention._parameters.values())
    return not own and all(tuple(parameter.shape) == (head_dim,) for parameter in numbers)


def _rows_of(parent: nn.Module, path: str, child: str) -> tuple[str, int] | None:
    """(name, rows) of the layer that makes the outputs of ``parent.child``."""
    module, name = getattr(parent, child, None), _join(path, child)
    if isinstance(module, Factored):
        module, name = module.coefficients, _join(name, "coefficients")
    return (name, module.weight.shape[0]) if isinstance(module, LAYER_TYPES) and _is_pointwise(module) else None


def _columns_of(parent: nn.Module, path: str, child: str) -> tuple[str, int] | None:
    """(name, columns) of the layer that reads the inputs of ``parent.child``."""
    module, name = getattr(parent, child, None), _join(path, child)
    if isinstance(module, Factored):
        module, name = module.basis, _join(name, "basis")
    return (name, module.weight.shape[1]) if isinstance(module, LAYER_TYPES) and _is_pointwise(module) else None


def _is_pointwise(layer: Layer) -> bool:
    """Whether every output reads every input channel, and no subclass computes something else."""
    return type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1)


def _config_patch(
    model: nn.Module, name: str, attribute: str, now: int | None, per_unit: int, constant: int = 0
) -> Patch | None:
    """The patch of the nearest configuration above ``name`` that holds ``attribute`` (with the value ``now``).

    It names the outermost module with that configuration, so that it is one patch for all layers that share it.
    """
    parts = name.split(".") if name else []
    owners = [".".join(parts[:end]) for end in range(len(parts) + 1)]
    configs = {owner: getattr(model.get_submodule(owner), "config", None) for owner in owners}
    for config in reversed(configs.values()):
        if config is not None and hasattr(config, attribute) and now in (None, getattr(config, attribute)):
            owner = next(o for o, other in configs.items() if other is config)
            return Patch(owner, f"config.{attribute}", per_unit, constant)
    return None


def _present(patches: list[Patch | None]) -> list[Patch]:
    return [patch for patch in patches if patch is not None]


def _join(path: str, child: str) -> str:
    return f"{path}.{child}" if path else child
