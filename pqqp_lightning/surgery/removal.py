"""Taking parts out of a network: whole blocks, or the attention and MLP sublayers of transformer blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pqqp_lightning.network.blocks import Blocks, pack_output

PER_LAYER_SETTINGS = ("layer_types", "mlp_layer_types", "no_rope_layers")


class Removed(nn.Module):
    """Stands in the place of a residual branch: zeros of its input's shape, whatever else it is given.

    Args:
        outputs: 0 to return the zeros alone; n for a tuple of n, of which the rest is None.
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
        rest: children that belong to the branch and to nothing else: norms, a layer scale, an OPT's first layer.
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
    """The sublayers that ``block`` has left; None if it is not built of an attention and an MLP sublayer.

    Every parameter of the block must belong to one of them, so that a block of another build is not taken for one.
    """
    children = dict(block.named_children())
    for pair in SUBLAYERS:
        names = {name for sublayer in pair for name in (sublayer.branch, *sublayer.rest)}
        own = {name for name, child in children.items() if any(True for _ in child.parameters())}
        if own <= names and all(sublayer.branch in children for sublayer in pair):
            return [sublayer for sublayer in pair if not isinstance(children[sublayer.branch], Removed)]
    return None


def remove_sublayer(model: nn.Module, block: str, sublayer: Sublayer, outputs: int) -> None:
    """Put :class:`Removed` in the place of the sublayer's branch, and nothing in the place of its other modules."""
    parent = model.get_submodule(block)
    for name, substitute in substitutes(parent, sublayer, outputs).items():
        setattr(parent, name, substitute)


def substitutes(block: nn.Module, sublayer: Sublayer, outputs: int) -> dict[str, nn.Module]:
    """What stands in the place of each child of the sublayer when it is removed."""
    found: dict[str, nn.Module] = {name: nn.Identity() for name in sublayer.rest if hasattr(block, name)}
    found[sublayer.branch] = Removed(outputs)
    return {name: module.train(block.training) for name, module in found.items()}


def outside_of_a_list(model: nn.Module, blocks: Blocks) -> list[str]:
    """Names of blocks that are not elements of a ``ModuleList`` or ``Sequential`` and so cannot be taken out."""
    return [
        name
        for name in blocks
        if not name or not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList | nn.Sequential)
    ]


def remove_blocks(model: nn.Module, names: Sequence[str], removed: Sequence[str]) -> dict[str, nn.Module]:
    """Take the blocks ``removed`` out of their lists, renumber the others, and return these by their new names.

    A Hugging Face model is afterwards a stock model of fewer layers: its configuration says how many, and each
    layer's ``layer_idx`` is its new place.

    Args:
        model: holds them.
        names: of all its blocks, in order.
        removed: those of ``names`` that go.
    """
    blocks = {name: model.get_submodule(name) for name in names}
    gone = set(removed)
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in removed):
        children = model.get_submodule(parent)._modules
        left = [(n, child) for n, child in children.items() if (f"{parent}.{n}" if parent else n) not in gone]
        numbered = all(name.isdigit() for name in children)
        children.clear()
        children.update({str(i) if numbered else name: child for i, (name, child) in enumerate(left)})
    kept = [index for index, name in enumerate(names) if name not in gone]
    for config in _configurations(model, names):
        _cut(config, kept, len(names))
    for place, index in enumerate(kept):
        for module in blocks[names[index]].modules():
            if getattr(module, "layer_idx", None) == index:
                setattr(module, "layer_idx", place)  # noqa: B010
    still = {id(blocks[names[index]]) for index in kept}
    return {name: module for name, module in model.named_modules() if id(module) in still}


def _configurations(model: nn.Module, names: Sequence[str]) -> Iterator[Any]:
    """The configurations of the modules that hold the blocks, each once."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        holds = any(block.startswith(f"{name}.") or not name for block in names)
        if holds and config is not None and id(config) not in seen:
            seen.add(id(config))
            yield config


def _cut(config: Any, kept: list[int], total: int) -> None:
    if getattr(config, "num_hidden_layers", None) != total:
        return
    config.num_hidden_layers = len(kept)
    for name in PER_LAYER_SETTINGS:
        values = getattr(config, name, None)
        if isinstance(values, list) and len(values) == total:
            setattr(config, name, [values[index] for index in kept])
