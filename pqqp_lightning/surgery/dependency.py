"""Coupled groups of convolutional networks, from torch-pruning's dependency graph with additional checks.

``DependencyGraph`` follows autograd's graph from an example's output (Fang et al. 2023, DepGraph, arXiv 2301.12900).
Here it runs on a copy on the meta device, so that large models take no memory. A group is used only if

- every layer in it is of a kind that :mod:`~pqqp_lightning.surgery.slicing` can slice,
- each of its channels maps to the same number of rows or columns,
- no layer in it is called twice or shares its weight, and
- it does not reach the network's output.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.network.blocks import tied_weights
from pqqp_lightning.network.structure import find_once, weightless_copy
from pqqp_lightning.surgery.coupling import CoupledGroup, Coupling, Member, Side
from pqqp_lightning.surgery.slicing import SLICED_LAYERS, SLICED_NORMS, is_depthwise

IMAGE_SIZE = 224
"""Height and width of the example image in pixels, for a model without ``img_size``."""


def traced_groups(model: nn.Module) -> Coupling:
    """Trace the coupled groups of ``model``, once for each of its structures.

    Raises:
        RecipeError: torch-pruning is not installed, or the model cannot be run on an example input.
    """
    return find_once(model, "coupled groups", lambda: _trace(model))


def _trace(model: nn.Module) -> Coupling:
    try:
        import torch_pruning as tp
    except ImportError as error:
        way_out = "Install it: pip install torch-pruning."
        raise RecipeError(Problem(text="needs the package torch-pruning", way_out=way_out)) from error
    copy = weightless_copy(model).eval().requires_grad_(True)
    example = example_input(copy)
    calls = Counter[str]()  # of each module, to recognise layers that are called twice
    handles = [m.register_forward_hook(lambda *_, n=n: calls.update([n])) for n, m in copy.named_modules()]
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            graph = tp.DependencyGraph().build_dependency(
                copy, example, forward_fn=run_example, output_transform=_differentiable, verbose=False
            )
    except Exception as error:
        text = f"torch-pruning cannot trace {type(model).__name__} on {_shapes(example)}: {_first_line(error)}"
        way_out = "Give the module an example_input_array that its forward takes."
        raise RecipeError(Problem(text=text, way_out=way_out)) from error
    finally:
        for handle in handles:
            handle.remove()
    return _Groups(copy, graph, calls).find()


def example_input(model: nn.Module) -> Any:
    """Build an input for ``model`` on the meta device: its ``example_input_array``, or one that fits its first layer.

    Raises:
        RecipeError: the model has neither.
    """
    given = getattr(model, "example_input_array", None)
    if given is not None:
        return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, given)
    first = next((m for m in model.modules() if isinstance(m, SLICED_LAYERS)), None)
    if isinstance(first, nn.Linear):
        return torch.zeros(1, first.in_features, device="meta", dtype=first.weight.dtype)
    if isinstance(first, nn.Conv2d):
        sizes = [getattr(m, "img_size", None) for m in model.modules()]
        size = next((s for s in sizes if isinstance(s, tuple | list)), (IMAGE_SIZE, IMAGE_SIZE))
        return torch.zeros(1, first.in_channels, *size, device="meta", dtype=first.weight.dtype)
    text = f"{type(model).__name__} has no Linear or Conv2d layer to prune"
    raise RecipeError(Problem(text=text, way_out="Leave the stage out."))


def run_example(model: nn.Module, example: Any) -> Any:
    """Run ``model`` on an example: a tensor, a tuple of arguments, or a dict of them."""
    if isinstance(example, dict):
        return model(**example)
    if isinstance(example, tuple | list):
        return model(*example)
    return model(example)


class _Groups:
    """Reads the groups from torch-pruning's graph of ``copy``."""

    def __init__(self, copy: nn.Module, graph: Any, calls: Counter[str]) -> None:
        self._graph = graph
        self._names = {module: name for name, module in copy.named_modules()}
        self._modules = dict(copy.named_modules())
        self._calls = calls
        self._tied = tied_weights(copy)

    def find(self) -> Coupling:
        """Find every group once, from the first layer in it."""
        coupling = Coupling()
        in_groups: set[str] = set()
        for name, module in self._modules.items():
            if name in in_groups or not isinstance(module, SLICED_LAYERS) or module not in self._graph.module2node:
                continue
            pruner = self._graph.get_pruner_of_module(module)
            units = list(range(module.weight.shape[0]))
            items = self._graph.get_pruning_group(module, pruner.prune_out_channels, units)
            group, reason = self._read(name, len(units), items)
            if group is not None:
                coupling.groups.append(group)
                in_groups.update(group.outputs())
            elif reason:
                coupling.unprunable.setdefault(reason, []).append(name)
        return coupling

    def _read(self, name: str, width: int, items: Any) -> tuple[CoupledGroup | None, str]:
        """The group, or None and the reason why it cannot be pruned (empty for the network's output)."""
        members: list[Member] = []
        for item in items:
            node = item.dep.target
            module = node.module
            side = self._side(module, item.dep.handler)
            if not node.outputs and side == "out":
                return None, ""  # the network's output
            # Nodes without weights (additions, reshapes, activations) need no slicing.
            if type(module).__module__.startswith("torch_pruning") or not _has_tensors(module):
                continue
            if reason := self._refuse(module):
                return None, reason
            index = _index(width, item)
            if index is None:
                return None, "its channels map to later ones in an unknown way: they stay"
            members.append(Member(self._names[module], side, index))
        return CoupledGroup(name, "channels", width, tuple(members)), ""

    def _refuse(self, module: Any) -> str:
        """Return why a group that contains ``module`` cannot be pruned; empty if it can."""
        name = self._names.get(module)
        if name is None:
            return "its channels reach a parameter outside of all known layers: they stay"
        if not isinstance(module, SLICED_LAYERS + SLICED_NORMS):
            return f"its channels reach a {type(module).__name__}: they stay"
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not is_depthwise(module):
            return "its channels reach a grouped convolution: they stay"
        if self._calls[name] > 1 or id(module.weight) in self._tied:
            return "its channels reach a layer that is used twice: they stay"
        return ""

    def _side(self, module: Any, handler: Any) -> Side:
        if not isinstance(module, SLICED_LAYERS) or (isinstance(module, nn.Conv2d) and is_depthwise(module)):
            return "out"
        return "out" if handler == self._graph.get_pruner_of_module(module).prune_out_channels else "in"


def _index(width: int, item: Any) -> Tensor | None:
    """The rows or columns of each unit [U, K], or None if units have different numbers of them."""
    of_unit: list[list[int]] = [[] for _ in range(width)]
    for index, unit in zip(item.idxs, item.root_idxs, strict=True):
        if unit is None:
            return None
        of_unit[unit].append(index)
    if not of_unit[0] or len({len(indices) for indices in of_unit}) > 1:
        return None
    return torch.tensor([sorted(indices) for indices in of_unit])


def _has_tensors(module: Any) -> bool:
    if not isinstance(module, nn.Module):
        return True
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _differentiable(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]


def _shapes(example: Any) -> str:
    shapes = [str(list(leaf.shape)) for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    return f"an input of shape {', '.join(shapes)}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
