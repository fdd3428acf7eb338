"""Errors of compressed layers: their outputs compared with the dense layers' outputs on the dense model's inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from pqqp_lightning.algorithms.interference import mixed_units
from pqqp_lightning.calibration.chain import first_output
from pqqp_lightning.calibration.functional import FunctionalReader
from pqqp_lightning.calibration.statistics import sum_over_ranks
from pqqp_lightning.calibration.token_mask import TokenMask, positions_of
from pqqp_lightning.calibration.walk import Walk, calibrating
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.blocks import Blocks
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.layers import is_layer
from pqqp_lightning.network.parameter_layers import ParameterLayer, parameter_layers
from pqqp_lightning.storage.disk_tensors import DiskTensors

_BLOCK = "_pqqp_dense_block"
"""The attribute of a block that holds its name in the dense model."""

SAMPLES = 8
"""Default number of calibration samples on which outputs are compared."""

Layers = Mapping[str, nn.Module | None]
"""A compressed model's layers by their names in the dense model; None for a removed layer.

For a :class:`~pqqp_lightning.network.parameter_layers.ParameterLayer` it is the module that holds the parameter, whose
outputs are compared instead.
"""


def layer_errors(walk: Walk, variants: Mapping[str, Layers]) -> dict[str, dict[str, float]]:
    """Compute the relative squared error ``||f(Y) - Y||^2 / ||Y||^2`` of each layer's outputs.

    The dense model runs once over the walk's batches. A removed layer outputs zeros, so its error is 1.

    Args:
        walk: of the dense model.
        variants: the layers of each compressed model, all with the same names.

    Returns:
        Layer name to variant to error.

    Raises:
        RecipeError: the output of a compressed layer has another shape than that of the dense layer.
    """
    names = list(next(iter(variants.values())))
    device = next(walk.model.parameters()).device
    # One row per layer: the dense layer's squared output, then the squared error of each variant.
    squares = torch.zeros(len(names), 1 + len(variants), dtype=torch.float64, device=device)

    def compare(name: str, row: Tensor, mask: TokenMask | None) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
            output = first_output(outputs)
            assert output is not None
            row[0] += _square(positions_of(output, mask))
            for i, variant in enumerate(variants.values(), start=1):
                module = _on_device(variant[name], device)
                change = output if module is None else _change(name, module, args, kwargs, output)
                row[i] += _square(positions_of(change, mask))

        module = walk.model.get_submodule(_module_name(walk.model, name))
        return module.register_forward_hook(hook, with_kwargs=True)

    layers = {name: walk.model.get_submodule(_module_name(walk.model, name)) for name in names}

    def call(name: str, inputs: Tensor, part: int | None, parts: int) -> None:
        layers[name](inputs)  # its weight is used functionally: the hook compares what its forward computes

    called: dict[str, Any] = {name: layer for name, layer in layers.items() if is_layer(layer)}
    reader = FunctionalReader(called, call)
    with calibrating(walk.model), walk.forward_context(), reader.beside_calls(called):
        for batch, mask in walk.masked_batches():
            handles = [compare(name, row, mask) for name, row in zip(names, squares, strict=True)]
            try:
                with reader:
                    walk.run(batch)
            finally:
                for handle in handles:
                    handle.remove()
    sum_over_ranks(squares)
    relative = squares[:, 1:] / squares[:, :1].clamp(min=torch.finfo(torch.float64).tiny)
    errors = {}
    for name, row in zip(names, relative.tolist(), strict=True):
        errors[name] = dict(zip(variants, row, strict=True))
    return errors


def block_changes(walk: Walk, variant: Layers) -> tuple[list[Tensor], Tensor]:
    """Compute how the last block's output changes when one block's layers are compressed, and when all are.

    It takes one pass over the walk's batches for each block, one for the dense model and one for all blocks together.

    Returns:
        The change [N] for each block, and the change for all blocks together, float32 on the CPU.
    """
    last_block = list(walk.blocks.values())[-1]
    groups: list[list[str]] = [[]]  # the first pass is that of the dense model
    all_names: list[str] = []
    for block in walk.blocks:
        inside = [name for name in variant if name.startswith(f"{block}.")]
        groups.append(inside)
        all_names += inside
    groups.append(all_names)
    with calibrating(walk.model), walk.forward_context():
        masks = walk.masks()
        bar = tqdm(groups, desc=f"{walk.title}, block by block", unit="pass", disable=not walk.progress, leave=False)
        outputs = []
        for names in bar:
            with _swapped(walk.model, variant, names):
                pairs = zip(walk.batches, masks, strict=True)
                outputs.append(torch.cat([_output_of(last_block, walk, batch, mask) for batch, mask in pairs]))
    dense, *compressed = outputs
    changes = [output - dense for output in compressed]
    return changes[:-1], changes[-1]


class _Silent(nn.Module):
    """Returns zeros in the shape of the outputs of ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]  # in a list, so that it does not become a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self._layer[0](*args, **kwargs)
        return tree_map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, outputs)


def _on_device(module: nn.Module | None, device: torch.device) -> nn.Module | None:
    """``module``, or a copy if it is not on ``device``: its weights may be mapped from a file and must stay there."""
    if module is None or all(parameter.device == device for parameter in module.parameters()):
        return module
    return copy.deepcopy(module).to(device)


@contextmanager
def _swapped(model: nn.Module, variant: Layers, names: Sequence[str]) -> Iterator[None]:
    """Replace the layers ``names`` of ``model`` by those of ``variant`` inside the context."""
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for name in names:
            module_name = _module_name(model, name)
            parent, _, child = module_name.rpartition(".")
            siblings = model.get_submodule(parent)._modules
            dense_layer = model.get_submodule(module_name)
            stack.callback(siblings.__setitem__, child, dense_layer)
            siblings[child] = _on_device(variant[name], device) or _Silent(dense_layer)
        yield


def _output_of(block: nn.Module, walk: Walk, batch: Any, mask: TokenMask | None) -> Tensor:
    """The outputs of ``block`` on one batch at the positions that count, flattened: [N]."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        hidden = first_output(output)
        if hidden is not None:
            outputs.append(positions_of(hidden.detach(), mask).float().flatten().cpu())

    handle = block.register_forward_hook(keep)
    try:
        walk.run(batch)
    finally:
        handle.remove()
    return torch.cat(outputs)


def _change(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    """The difference of a compressed layer's output from the dense ``output``."""
    changed = first_output(module(*args, **kwargs))
    assert changed is not None
    if changed.shape != output.shape:
        raise RecipeError(
            f"{name}: its output has shape {list(changed.shape)} instead of {list(output.shape)} after compression and "
            "cannot be compared. Its stage must declare comparable_layers = False."
        )
    return changed - output


def _square(value: Tensor) -> Tensor:
    return value.detach().double().square().sum()


def mark_blocks(blocks: Blocks) -> None:
    """Store each block's name in the block, since a stage that removes blocks renumbers the others."""
    for name, block in blocks.items():
        if name:  # "" is a whole model without blocks, which keeps its name
            block.__dict__[_BLOCK] = name


def layers_of(model: nn.Module, names: Sequence[str], disk: DiskTensors) -> Layers:
    """Copy the layers that stand for the dense layers ``names``, with their weights in ``disk``.

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
        module = None if gone else _submodule(model, _module_name(model, now))
        found[name] = None if module is None else _on_disk(module, disk)
    return found


def mixed_share(layers: Layers) -> tuple[int, int]:
    """Count the quantization units that hold both pruned and kept weights, and all units of the layers with a grid."""
    mixed_count = 0
    unit_count = 0
    for name, module in layers.items():
        layer = module if is_layer(module) else _parameter_layer(module, name)
        if layer is None:
            continue
        constraints = constraints_of(layer)  # type: ignore[arg-type]
        if constraints.grid is None:
            continue
        scale = constraints.grid.scale
        unit_count += scale.numel()
        mask = constraints.mask()
        if mask is not None:
            mixed_count += mixed_units(mask, scale.shape)[0]
    return mixed_count, unit_count


def _is_of_a_marked(model: nn.Module, name: str) -> bool:
    """Whether ``name`` no longer exists, or now belongs to a block that had another name."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        module = _submodule(model, ".".join(parts[:length]))
        if module is None or _BLOCK in vars(module):
            return True
    return False


def _parameter_layer(module: nn.Module | None, name: str) -> ParameterLayer | None:
    """The layer of this name in the module that holds its parameter."""
    layers = () if module is None else parameter_layers(module)
    return next((layer for layer in layers if layer.parameter == name.rpartition(".")[2]), None)


def _module_name(model: nn.Module, name: str) -> str:
    """The name of the module whose outputs show what the layer ``name`` computes: its own, or its parameter's owner.

    torch's attention uses the weight of its last projection without a call, so that its own outputs show it.
    """
    parent, _, last = name.rpartition(".")
    owner = _submodule(model, parent)
    uncalled = isinstance(owner, nn.MultiheadAttention) or _parameter_layer(owner, last) is not None
    return parent if uncalled else name


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
