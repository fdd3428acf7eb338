"""How much memory a loaded model takes, and the line that says so."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from pqqp_lightning.network.constraints import constrained_layers
from pqqp_lightning.storage.run_folder import checkpoint_bytes

logger = logging.getLogger(__name__)


def memory_bytes(model: nn.Module) -> int:
    """Bytes of the memory that the model's parameters, buffers and constraints hold; shared memory counts once."""
    blocks = {}
    for tensor in _tensors(model):
        block = tensor.untyped_storage()
        blocks[block.data_ptr()] = block.nbytes()
    return sum(blocks.values())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for _, _, constraints in constrained_layers(model):
        grid = constraints.grid
        parts = [constraints.mask_bits] + ([] if grid is None else [grid.scale, grid.zero])
        yield from [part for part in parts if part is not None]


def memory_text(model: nn.Module) -> str:
    """``"538.1 MB in memory"``."""
    return f"{memory_bytes(model) / 1e6:.1f} MB in memory"


def say_memory(model: nn.Module, run: Path, folder: Path, packed: bool) -> None:
    """Print how much memory the model of ``run`` takes where a person looks, in an interactive session; else log it.

    Args:
        model: as loaded.
        run: as the user named it.
        folder: its checkpoint.
        packed: whether it was loaded packed.
    """
    line = f"{run}: {memory_text(model)}."
    smallest = checkpoint_bytes(folder)
    if not packed and smallest < 0.9 * memory_bytes(model):
        line += f" load(..., packed=True) takes about {smallest / 1e6:.1f} MB, and is slower."
    if hasattr(sys, "ps1"):  # the prompt of Python, IPython and notebooks
        print(line)
    else:
        logger.info(line)
