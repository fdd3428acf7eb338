"""Removes whole blocks, or the attention and MLP sublayers of transformer blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pqqp_lightning.network.blocks import Blocks, pack_output

PER_LAYER_SETTINGS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Settings of a Hugging Face configuration that hold one value per layer."""


class Removed(nn.Module):
    """Replaces a residual branch: returns zeros of its input's shape, so that the block passes its input on.

    Args:
        outputs: 0 to return the zeros alone; n to return a tuple of n items: the zeros, then None.
    """

    def __init__(self, outputs: int = 0) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        return pack_output(torch.zeros_like(hidden), self.outputs)

    def extra_repr(self) -> str:
        return f"outputs={self.outputs}"


@dataclass(frozen=True)
class Sublayer:
    """An attention or MLP sublayer: a residual branch of a block.

    Attributes:
        branch: the child whose output the block adds to its hidden state.
        rest: children that only this branch uses: norms, a layer scale, the first MLP layer of OPT.
    """

    branch: str
    rest: tuple[str, ...]


SUBLAYERS = (
    (Sublayer("self_attn", ("input_layernorm",)), Sublayer("mlp", ("post_attention_layernorm",))),  # LLaMA, Qwen
    (Sublayer("self_attn", ("self_attn_layer_norm",)), Sublayer("fc2", ("fc1", "final_layer_norm"))),  # OPT
    (Sublayer("attn", ("ln_1",)), Sublayer("mlp", ("ln_2",))),  # GPT-2
    (Sublayer("attn", ("norm1", "ls1")), Sublayer("mlp", ("norm2", "ls2"))),  # timm's ViT and DeiT
)


def sublayers_of(block: nn.Module) -> list[Sublayer] | None:
    """Return the remaining sublayers of ``block``; None if it is not built of an attention and an MLP sublayer.

    Every parameter of the block must belong to one of the two, so that no block of another structure is accepted.
    """
    children = dict(block.named_children())
    with_parameters = {name for name, child in children.items() if next(child.parameters(), None) is not None}
    for attention, mlp in SUBLAYERS:
        known = {attention.branch, *attention.rest, mlp.branch, *mlp.rest}
        if with_parameters <= known and attention.branch in children and mlp.branch in children:
            return [s for s in (attention, mlp) if not isinstance(children[s.branch], Removed)]
    return None


def remove_sublayer(model: nn.Module, block: str, sublayer: Sublayer, outputs: int) -> None:
    """Replace the sublayer's branch by :class:`Removed` and its other modules by ``Identity``."""
    parent = model.get_submodule(block)
    for name, substitute in substitutes(parent, sublayer, outputs).items():
        setattr(parent, name, substitute)


def substitutes(block: nn.Module, sublayer: Sublayer, outputs: int) -> dict[str, nn.Module]:
    """Return the modules that replace the children of a removed sublayer, by name."""
    modules: dict[str, nn.Module] = {name: nn.Identity() for name in sublayer.rest if hasattr(block, name)}
    modules[sublayer.branch] = Removed(outputs)
    return {name: module.train(block.training) for name, module in modules.items()}


def outside_of_a_list(model: nn.Module, blocks: Blocks) -> list[str]:
    """Return the names of blocks that cannot be removed: those outside of a ``ModuleList`` or ``Sequential``."""
    outside = []
    for name in blocks:
        parent = model.get_submodule(name.rpartition(".")[0])
        if not name or not isinstance(parent, nn.ModuleList | nn.Sequential):
            outside.append(name)
    return outside


def remove_blocks(model: nn.Module, names: Sequence[str], removed: Sequence[str]) -> dict[str, nn.Module]:
    """Remove blocks from their lists and renumber the others.

    The result is an ordinary model with fewer layers: a Hugging Face configuration gets their number, and each layer's
    ``layer_idx`` becomes its new position.

    Args:
        model: holds the blocks.
        names: names of all its blocks, in order.
        removed: the blocks of ``names`` to remove.

    Returns:
        The remaining blocks by their new names.
    """
    blocks = {name: model.get_submodule(name) for name in names}
    removed_names = set(removed)
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in removed):
        children = model.get_submodule(parent)._modules
        numbered = all(name.isdigit() for name in children)
        remaining: dict[str, nn.Module | None] = {}
        for name, child in children.items():
            if (f"{parent}.{name}" if parent else name) not in removed_names:
                remaining[str(len(remaining)) if numbered else name] = child
        children.clear()
        children.update(remaining)

    kept = [index for index, name in enumerate(names) if name not in removed_names]
    for config in _configurations(model, names):
        _shorten_config(config, kept, len(names))
    # layer_idx selects a layer's entry in the cache of keys and values: it must count the remaining layers.
    for position, index in enumerate(kept):
        for module in blocks[names[index]].modules():
            if getattr(module, "layer_idx", None) == index:
                setattr(module, "layer_idx", position)  # noqa: B010
    kept_ids = {id(blocks[names[index]]) for index in kept}
    return {name: module for name, module in model.named_modules() if id(module) in kept_ids}


def _configurations(model: nn.Module, names: Sequence[str]) -> Iterator[Any]:
    """The configurations of the modules above the blocks, each object once."""
    seen: set[int] = set()  # layers often share one configuration object
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        is_above_a_block = any(block.startswith(f"{name}.") or not name for block in names)
        if is_above_a_block and config is not None and id(config) not in seen:
            seen.add(id(config))
            yield config


def _shorten_config(config: Any, kept: list[int], total: int) -> None:
    # A configuration with another number of layers describes other blocks, such as those of an encoder.
    if getattr(config, "num_hidden_layers", None) != total:
        return
    config.num_hidden_layers = len(kept)
    for name in PER_LAYER_SETTINGS:
        values = getattr(config, name, None)
        if isinstance(values, list) and len(values) == total:
            setattr(config, name, [values[index] for index in kept])
