"""Compressed layers beside the dense ones: what each gives out for the very inputs that the dense model gives it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pqqp_lightning.algorithms.interference import mixed_units
from pqqp_lightning.calibration.chain import first_output
from pqqp_lightning.calibration.statistics import sum_over_ranks
from pqqp_lightning.calibration.walk import Walk, calibrating
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.blocks import Blocks
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.layers import LAYER_TYPES
from pqqp_lightning.storage.disk_tensors import DiskTensors

_BLOCK = "_pqqp_dense_block"


SAMPLES = 8
"""Calibration samples on which outputs are compared, unless the user says otherwise."""

Layers = Mapping[str, nn.Module | None]
"""A compressed model's layers by their names in the dense one; None for one that is gone."""


def layer_errors(walk: Walk, variants: Mapping[str, Layers]) -> dict[str, dict[str, float]]:
    """The relative squared error ``||f(Y) - Y||^2 / ||Y||^2`` of each layer's outputs, by layer and variant.

    One pass of the dense model over the walk's batches; a layer that is gone gives zeros, so that its error is 1.

    Args:
        walk: of the dense model.
        variants: the layers of compressed models; of all of them the same names.

    Raises:
        RecipeError: a compressed layer gives out another shape than the dense one.
    """
    names = list(next(iter(variants.values())))
    device = next(walk.model.parameters()).device
    squares = torch.zeros(len(names), 1 + len(variants), dtype=torch.float64, device=device)  # the dense one's first

    def watch(name: str, row: Tensor) -> Any:
        def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            row[0] += _square(output)
            for i, variant in enumerate(variants.values(), start=1):
                module = _placed(variant[name], device)
                row[i] += _square(output if module is None else _change(name, module, args, kwargs, output))

        return see

    with calibrating(walk.model), walk.forward_context():
        handles = [
            walk.model.get_submodule(name).register_forward_hook(watch(name, row), with_kwargs=True)
            for name, row in zip(names, squares, strict=True)
        ]
        try:
            for batch in tqdm(walk.batches, desc=walk.title, unit="batch", disable=not walk.progress, leave=False):
                walk.run(batch)
        finally:
            for handle in handles:
                handle.remove()
    sum_over_ranks(squares)
    relative = squares[:, 1:] / squares[:, :1].clamp(min=torch.finfo(torch.float64).tiny)
    return {name: dict(zip(variants, row, strict=True)) for name, row in zip(names, relative.tolist(), strict=True)}


def block_changes(walk: Walk, variant: Layers) -> tuple[list[Tensor], Tensor]:
    """How the output of the last block moves when one block's layers are compressed, for each block, and when all are.

    As many passes over the walk's batches as there are blocks, and two.

    Returns:
        A change [N] for each block, and that of all together, float32 on the processor.
    """
    blocks = list(walk.blocks)
    last = walk.blocks[blocks[-1]]
    inside = [[name for name in variant if name.startswith(f"{block}.")] for block in blocks]
    groups = [[], *inside, [name for own in inside for name in own]]
    with calibrating(walk.model), walk.forward_context():
        bar = tqdm(groups, desc=f"{walk.title}, block by block", unit="pass", disable=not walk.progress, leave=False)
        outputs = []
        for names in bar:
            with _swapped(walk.model, variant, names):
                outputs.append(torch.cat([_output_of(last, walk, batch) for batch in walk.batches]))
    dense, *changed = outputs
    *single, whole = (output - dense for output in changed)
    return single, whole


def first_batches(batches: Sequence[Any], samples: int) -> list[Any]:
    """The first batches, as many as it takes to have so many samples."""
    taken, count = [], 0
    for batch in batches:
        if count >= samples:
            break
        taken.append(batch)
        count += samples_in(batch)
    return taken


def samples_in(batch: Any) -> int:
    """Samples in a batch: the first dimension of the first tensor in it."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else ()
    return next((samples_in(v) for v in values if isinstance(v, Tensor | dict | tuple | list)), 1)


class _Silent(nn.Module):
    """Zeros in the shape of what ``layer`` gives out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]  # not a child: it stays where it is

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(self._layer[0](*args, **kwargs))


def _placed(module: nn.Module | None, device: torch.device) -> nn.Module | None:
    """``module``, or a copy of it if it is not on ``device``: its own weights, in a file perhaps, stay there."""
    if module is None or all(parameter.device == device for parameter in module.parameters()):
        return module
    return copy.deepcopy(module).to(device)


@contextmanager
def _swapped(model: nn.Module, variant: Layers, names: Sequence[str]) -> Iterator[None]:
    """Inside, the layers ``names`` of ``model`` are those of ``variant``."""
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for name in names:
            parent, _, child = name.rpartition(".")
            modules, own = model.get_submodule(parent)._modules, model.get_submodule(name)
            stack.callback(modules.__setitem__, child, own)
            modules[child] = _placed(variant[name], device) or _Silent(own)
        yield


def _output_of(block: nn.Module, walk: Walk, batch: Any) -> Tensor:
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if (hidden := first_output(output)) is not None:
            found.append(hidden.detach().float().flatten().cpu())

    handle = block.register_forward_hook(keep)
    try:
        walk.run(batch)
    finally:
        handle.remove()
    return torch.cat(found)


def _change(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    changed = module(*args, **kwargs)
    if changed.shape != output.shape:
        raise RecipeError(
            f"{name}: gives out {list(changed.shape)} instead of {list(output.shape)} after its compression and cannot "
            "be compared. Its stage must say so: comparable_layers = False."
        )
    return changed - output


def _square(value: Tensor) -> Tensor:
    return value.detach().double().square().sum()


def mark_blocks(blocks: Blocks) -> None:
    """Let each block remember its name: a stage that removes blocks renumbers the others."""
    for name, block in blocks.items():
        if name:  # a model without blocks is one block, which stays
            block.__dict__[_BLOCK] = name


def layers_of(model: nn.Module, names: Sequence[str], disk: DiskTensors) -> Layers:
    """Copies of the layers that have the place of the dense layers ``names``, with their weights in ``disk``.

    Args:
        model: compressed; its blocks were marked while it was dense.
        names: of dense layers.
        disk: for the weights.
    """
    marked = {vars(module)[_BLOCK]: name for name, module in model.named_modules() if _BLOCK in vars(module)}
    had_blocks = bool(marked)
    found: dict[str, nn.Module | None] = {}
    for name in names:
        block = next((b for b in marked if name.startswith(f"{b}.")), None)
        now = name if block is None else f"{marked[block]}{name.removeprefix(block)}"
        gone = block is None and had_blocks and _is_of_a_marked(model, name)
        module = None if gone else _submodule(model, now)
        found[name] = None if module is None else _on_disk(module, disk)
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


def _on_disk(module: nn.Module, disk: DiskTensors) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(_put(parameter.detach(), disk), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = _put(buffer, disk)
    return copy.deepcopy(module, memo).eval()


def _put(tensor: Tensor, disk: DiskTensors) -> Tensor:
    kept = disk.put(tensor)
    return kept.to(tensor.device) if kept.data_ptr() != tensor.data_ptr() else tensor.clone()
