"""Blocks of different widths in GGUF: llama.cpp's architecture ``deci`` has heads and channels for each block."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pqqp_lightning.export.stock import StockModel

BLOCK = 32
"""Columns of a block of codes, which has one scale."""
PART = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlp|input_layernorm|post_attention_layernorm)\.(.*)")
ATTENTION = ("self_attn", "input_layernorm")


@dataclass(frozen=True)
class Widths:
    """Of one block.

    Attributes:
        heads: query heads; 0 for a block without attention.
        key_heads: key and value heads.
        channels: of the MLP; 0 for a block without one.
    """

    heads: int
    key_heads: int
    channels: int


def head_width(config: Any) -> int:
    """Features of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def widths_of(weights: Mapping[str, Tensor], config: Any) -> list[Widths]:
    """The widths of every block of a LLaMA or its kin, read from the shapes of its weights."""
    width = head_width(config)

    def rows(block: int, layer: str) -> int:
        weight = weights.get(f"model.layers.{block}.{layer}.weight")
        return 0 if weight is None else len(weight)

    return [
        Widths(
            rows(block, "self_attn.q_proj") // width,
            rows(block, "self_attn.k_proj") // width,
            rows(block, "mlp.up_proj"),
        )
        for block in range(config.num_hidden_layers)
    ]


def deci_shapes(stock: StockModel, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The shapes that llama.cpp computes right, on the meta device, as small as possible.

    A block without an MLP loses its attention, too, in llama.cpp: it gets an MLP of :data:`BLOCK` channels of zeros. A
    file whose first block has no attention does not load: it gets one head of zeros. Columns come in whole blocks.

    Args:
        stock: the weights as they are.
        expected: the tensors that its configuration describes.
    """
    config: Any = stock.config
    stored = [_stored(number, widths) for number, widths in enumerate(widths_of(stock.weights, config))]
    width = head_width(config)
    shapes = {}
    for name, tensor in expected.items():
        match = PART.fullmatch(name)
        if match is None:
            shapes[name] = tensor
            continue
        widths = stored[int(match[1])]
        if match[2] in ATTENTION and not widths.heads:
            continue
        sizes = {
            "q_proj": widths.heads * width,
            "k_proj": widths.key_heads * width,
            "v_proj": widths.key_heads * width,
            "o_proj": widths.heads * width,
            "gate_proj": widths.channels,
            "up_proj": widths.channels,
            "down_proj": widths.channels,
        }
        layer, _, kind = match[3].rpartition(".")
        shape = list(tensor.shape)
        if layer in ("o_proj", "down_proj"):
            if kind == "weight":
                shape[1] = sizes[layer]
        elif layer in sizes:
            shape[0] = sizes[layer]
        shapes[name] = torch.empty(shape, device="meta")
    return shapes


def _stored(number: int, widths: Widths) -> Widths:
    """The widths that are written for the block at position ``number``."""
    channels = max(BLOCK, -(-widths.channels // BLOCK) * BLOCK)
    if number == 0 and not widths.heads:
        return Widths(1, 1, channels)
    return Widths(widths.heads, widths.key_heads, channels)
