"""Finds the repeated blocks of a network by structure: decoder layers, ViT blocks, residual blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pqqp_lightning.errors import Problem, RecipeError, near_miss
from pqqp_lightning.network.layers import Layer, is_adapter, is_depthwise, is_layer, named_layers
from pqqp_lightning.network.name_patterns import matches_any

Blocks = dict[str, nn.Module]

_KEPT = "_pqqp_block"

DEPTHWISE = "depthwise"
"""The pattern that selects depthwise convolutions by their kind, whatever their names."""


def find_blocks(model: nn.Module, names: list[str] | None = None) -> Blocks:
    """Find the blocks of ``model``, by name and in order of definition.

    Blocks are the children of ``ModuleList`` and ``Sequential`` containers that hold modules of one class. Containers
    of the same class count together, so that the four stages of a ResNet form one sequence of residual blocks. The
    class with the most parameters is chosen. A model without such containers is one block, named ``""``.

    Args:
        model: any module.
        names: names of the blocks, or their last components, instead of the search.

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
        classes = {type(child) for child in children}
        # A row of plain Linear layers is an MLP, not a row of blocks.
        if len(classes) > 1 or is_layer(children[0]) or not any(map(_has_layers, children)):
            continue
        for child_name, child in container.named_children():
            candidates[type(child)][f"{name}.{child_name}" if name else child_name] = child
    repeated = [blocks for blocks in candidates.values() if len(blocks) > 1]
    return max(repeated, key=_count_parameters) if repeated else {"": model}


def model_blocks(model: nn.Module) -> Blocks:
    """Return the blocks of ``model`` that a stage works on if its arguments do not name others.

    These are the blocks that :func:`keep_blocks` marked; else those that the model names in ``compression_blocks``;
    else those that :func:`find_blocks` finds.
    """
    marked = {name: module for name, module in model.named_modules() if module.__dict__.get(_KEPT)}
    return marked or find_blocks(model, getattr(model, "compression_blocks", None))


def keep_blocks(blocks: Blocks) -> None:
    """Mark ``blocks`` so that :func:`model_blocks` returns them from now on.

    After a stage has removed or renamed blocks, too few may remain for the search by structure.
    """
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
    """Find the layers that a stage acts on, by name. Adapters are never among them.

    Args:
        model: any module.
        targets: name patterns, or "depthwise"; None for every layer inside ``blocks`` whose weight is not tied.
        ignore: name patterns to leave out, or "depthwise".
        blocks: from :func:`find_blocks`.
    """
    tied = tied_weights(model)
    layers = {}
    for name, layer in named_layers(model):
        if is_adapter(layer) or is_selected(name, layer, ignore or []):
            continue
        if targets is None:
            chosen = (containing_block(name, blocks) is not None or "" in blocks) and id(layer.weight) not in tied
        else:
            chosen = is_selected(name, layer, targets)
        if chosen:
            layers[name] = layer
    return layers


def containing_block(layer: str, blocks: Blocks) -> str | None:
    """Return the name of the block that the layer of this name lies in or is, or None."""
    return next((block for block in blocks if layer == block or layer.startswith(f"{block}.")), None)


def is_selected(name: str, layer: Layer | nn.Module, patterns: Sequence[str]) -> bool:
    """Whether one of ``patterns`` selects ``layer``, by its name or, as "depthwise", by its kind."""
    return matches_any(name, patterns) or (DEPTHWISE in patterns and is_depthwise(layer))


def tied_weights(model: nn.Module) -> set[int]:
    """Return the ids of weight parameters that several modules share (a tied embedding and head)."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        # Read the dict: ``module.weight`` of a parametrized layer would compute the weight.
        for weight in module.__dict__.get("_parameters", {}).values():
            if weight is None:
                continue
            if id(weight) in seen:
                tied.add(id(weight))
            seen.add(id(weight))
    return tied


def _has_layers(module: nn.Module) -> bool:
    return next(named_layers(module), None) is not None


def _count_parameters(blocks: Blocks) -> int:
    count = 0
    for block in blocks.values():
        count += sum(parameter.numel() for parameter in block.parameters())
    return count


def pack_output(hidden: Tensor, outputs: int) -> Any:
    """Return ``hidden`` for 0 ``outputs``, else a tuple of ``outputs`` items: ``hidden``, then None."""
    return (hidden, *[None] * (outputs - 1)) if outputs else hidden
