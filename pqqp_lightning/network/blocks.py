"""The repeated blocks of a network, found by structure: decoder layers, ViT blocks, residual blocks."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor, nn

from pqqp_lightning.errors import Problem, RecipeError, near_miss
from pqqp_lightning.network.layers import LAYER_TYPES, Layer, is_adapter
from pqqp_lightning.network.name_patterns import matches_any

Blocks = dict[str, nn.Module]

_KEPT = "_pqqp_block"


def find_blocks(model: nn.Module, names: list[str] | None = None) -> Blocks:
    """The blocks of ``model`` by name, in order of definition.

    They are the children of the ``ModuleList`` or ``Sequential`` containers that hold modules of one class; among
    such classes the one with the most parameters wins, so that a ResNet's stages are read as one row of residual
    blocks. A model without any is one block, named ``""``.

    Args:
        model: any module.
        names: the blocks instead, as module names or patterns.

    Raises:
        RecipeError: a name of ``names`` is not a module of the model.
    """
    if names:
        return _named_blocks(model, names)
    candidates: dict[type[nn.Module], Blocks] = defaultdict(dict)
    for name, container in model.named_modules():
        children = list(container.children())
        if not isinstance(container, nn.ModuleList | nn.Sequential) or not children:
            continue
        kinds = {type(child) for child in children}
        if len(kinds) == 1 and any(map(_has_layers, children)) and not isinstance(children[0], LAYER_TYPES):
            candidates[kinds.pop()].update((f"{name}.{i}" if name else i, c) for i, c in container.named_children())
    repeated = [blocks for blocks in candidates.values() if len(blocks) > 1]
    return max(repeated, key=_parameters) if repeated else {"": model}


def model_blocks(model: nn.Module) -> Blocks:
    """The blocks of ``model`` where nobody names others: those left by :func:`keep_blocks`, the model's own list
    (``compression_blocks``), or by structure."""
    kept = {name: module for name, module in model.named_modules() if module.__dict__.get(_KEPT)}
    return kept or find_blocks(model, getattr(model, "compression_blocks", None))


def keep_blocks(blocks: Blocks) -> None:
    """Have :func:`model_blocks` find these from now on: a stage that removes blocks may leave too few, or under other
    names, for the structure to tell."""
    for block in blocks.values():
        block.__dict__[_KEPT] = True


def _named_blocks(model: nn.Module, names: list[str]) -> Blocks:
    modules = dict(model.named_modules())
    blocks: Blocks = {}
    for wanted in names:
        found = {name: m for name, m in modules.items() if name == wanted or name.endswith(f".{wanted}")}
        if not found:
            near = near_miss(wanted, modules).strip()
            raise RecipeError(Problem("blocks", wanted, "is not a module of the model", near))
        blocks.update(found)
    return blocks


def find_layers(
    model: nn.Module, targets: list[str] | None, ignore: list[str] | None, blocks: Blocks
) -> dict[str, Layer]:
    """The Linear and Conv2d layers that a stage acts on, by name; adapters are none of them.

    Args:
        model: any module.
        targets: name patterns; None for every layer inside ``blocks``.
        ignore: name patterns to leave out.
        blocks: from :func:`find_blocks`.
    """
    tied = tied_weights(model)
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, LAYER_TYPES) or is_adapter(module) or matches_any(name, ignore or []):
            continue
        inside = any(name == block or name.startswith(f"{block}.") or not block for block in blocks)
        chosen = inside and id(module.weight) not in tied if targets is None else matches_any(name, targets)
        if chosen:
            found[name] = module
    return found


def tied_weights(model: nn.Module) -> set[int]:
    """ids of weight parameters that several modules share (a tied embedding and head)."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        weight = module.__dict__.get("_parameters", {}).get("weight")
        if weight is not None:
            (tied if id(weight) in seen else seen).add(id(weight))
    return tied


def _has_layers(module: nn.Module) -> bool:
    return any(isinstance(m, LAYER_TYPES) for m in module.modules())


def _parameters(blocks: Blocks) -> int:
    return sum(p.numel() for block in blocks.values() for p in block.parameters())


def pack_output(hidden: Tensor, outputs: int) -> Any:
    """``hidden`` alone for 0 ``outputs``, else as the first of a tuple of so many."""
    return (hidden, *[None] * (outputs - 1)) if outputs else hidden
