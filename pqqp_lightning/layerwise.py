"""The layers of compressed models, found by the names that they had in the dense one, and kept on the disk."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pqqp_lightning.algorithms.interference import mixed_units
from pqqp_lightning.calibration.compare import Layers
from pqqp_lightning.modules.blocks import Blocks
from pqqp_lightning.modules.constraints import constraints_of
from pqqp_lightning.modules.layers import LAYER_TYPES
from pqqp_lightning.spill import Spill

_BLOCK = "_pqqp_dense_block"


def mark_blocks(blocks: Blocks) -> None:
    """Let each block remember its name: a stage that removes blocks renumbers the others."""
    for name, block in blocks.items():
        if name:  # a model without blocks is one block, which stays
            block.__dict__[_BLOCK] = name


def layers_of(model: nn.Module, names: Sequence[str], spill: Spill) -> Layers:
    """Copies of the layers that have the place of the dense layers ``names``, with their weights in ``spill``.

    Args:
        model: compressed; its blocks were marked while it was dense.
        names: of dense layers.
        spill: for the weights.
    """
    marked = {vars(module)[_BLOCK]: name for name, module in model.named_modules() if _BLOCK in vars(module)}
    had_blocks = bool(marked)
    found: dict[str, nn.Module | None] = {}
    for name in names:
        block = next((b for b in marked if name.startswith(f"{b}.")), None)
        now = name if block is None else f"{marked[block]}{name.removeprefix(block)}"
        gone = block is None and had_blocks and _is_of_a_marked(model, name)
        module = None if gone else _submodule(model, now)
        found[name] = None if module is None else _spilled(module, spill)
    return found


def mixed_share(layers: Layers) -> tuple[int, int]:
    """Quantization units that hold both pruned and kept weights, and all units of the layers with a grid."""
    mixed = units = 0
    for layer in layers.values():
        if not isinstance(layer, LAYER_TYPES) or (grid := constraints_of(layer).grid) is None:
            continue
        mask = constraints_of(layer).mask()
        some, every = (0, grid.scale.numel()) if mask is None else mixed_units(mask, grid.scale.shape)
        mixed, units = mixed + some, units + every
    return mixed, units


def _is_of_a_marked(model: nn.Module, name: str) -> bool:
    """Whether what has the name now is in a block that had another one, or nothing has it any more."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        module = _submodule(model, ".".join(parts[:length]))
        if module is None or _BLOCK in vars(module):
            return True
    return False


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _spilled(module: nn.Module, spill: Spill) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(_put(parameter.detach(), spill), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = _put(buffer, spill)
    return copy.deepcopy(module, memo).eval()


def _put(tensor: Tensor, spill: Spill) -> Tensor:
    kept = spill.put(tensor)
    return kept.to(tensor.device) if kept.data_ptr() != tensor.data_ptr() else tensor.clone()
