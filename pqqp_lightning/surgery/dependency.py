"""Which channels a convolutional network must lose together: torch-pruning's dependency graph, not taken on trust.

``DependencyGraph`` follows autograd's graph from an example's output (Fang et al. 2023, DepGraph, arXiv 2301.12900).
Here it runs on a copy on the meta device, so that neither values nor the size of the model matter. A group is used
only if every layer in it is of a kind whose slicing is known, each of its channels maps to as many rows or columns as
any other, nothing in it is called twice or shares its weight, and it does not reach the network's output.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.network.blocks import tied_weights
from pqqp_lightning.network.layers import LAYER_TYPES
from pqqp_lightning.network.structure import weightless_copy
from pqqp_lightning.surgery.coupling import CoupledGroup, Coupling, Member, Side
from pqqp_lightning.surgery.slicing import SLICED_NORMS, is_depthwise

IMAGE_SIZE = 224


_known: WeakKeyDictionary[nn.Module, tuple[list[Any], Coupling]] = WeakKeyDictionary()
"""The groups of each model, with the structure that they were found in."""


def traced_groups(model: nn.Module) -> Coupling:
    """The coupled groups of ``model``, traced once as long as its modules and their shapes stay as they are.

    Raises:
        RecipeError: torch-pruning is not installed, or the model cannot be run on an example input.
    """
    structure = [
        (name, type(module), [(key, p.shape) for key, p in module._parameters.items() if p is not None])
        for name, module in model.named_modules()
    ]
    if model not in _known or _known[model][0] != structure:
        _known[model] = structure, _trace(model)
    return _known[model][1]


def _trace(model: nn.Module) -> Coupling:
    try:
        import torch_pruning as tp
    except ImportError as error:
        way_out = "Install it: pip install torch-pruning."
        raise RecipeError(Problem(text="needs the package torch-pruning", way_out=way_out)) from error
    copy = weightless_copy(model).eval().requires_grad_(True)
    example, calls = example_input(copy), Counter[str]()
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
    """An input for ``model`` on the meta device: its ``example_input_array``, or by its first layer."""
    given = getattr(model, "example_input_array", None)
    if given is not None:
        return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, given)
    first = next((m for m in model.modules() if isinstance(m, LAYER_TYPES)), None)
    if isinstance(first, nn.Linear):
        return torch.zeros(1, first.in_features, device="meta", dtype=first.weight.dtype)
    if isinstance(first, nn.Conv2d):
        sizes = [getattr(m, "img_size", None) for m in model.modules()]
        size = next((s for s in sizes if isinstance(s, tuple | list)), (IMAGE_SIZE, IMAGE_SIZE))
        return torch.zeros(1, first.in_channels, *size, device="meta", dtype=first.weight.dtype)
    text = f"{type(model).__name__} has no Linear or Conv2d layer to prune"
    raise RecipeError(Problem(text=text, way_out="Leave the stage out."))


def run_example(model: nn.Module, example: Any) -> Any:
    """The model's output for an example: a tensor, a tuple of arguments, or a dict of them."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple | list) else model(example)


class _Groups:
    """Reads torch-pruning's graph of ``copy``."""

    def __init__(self, copy: nn.Module, graph: Any, calls: Counter[str]) -> None:
        self._graph = graph
        self._names = {module: name for name, module in copy.named_modules()}
        self._modules = dict(copy.named_modules())
        self._calls, self._tied = calls, tied_weights(copy)
        self._traced = Coupling()

    def find(self) -> Coupling:
        """Every group, from the first layer in it."""
        seen: set[str] = set()
        for name, module in self._modules.items():
            if name in seen or not isinstance(module, LAYER_TYPES) or module not in self._graph.module2node:
                continue
            pruner = self._graph.get_pruner_of_module(module)
            units = list(range(module.weight.shape[0]))
            items = self._graph.get_pruning_group(module, pruner.prune_out_channels, units)
            group, reason = self._read(name, len(units), items)
            if group is not None:
                self._traced.groups.append(group)
                seen |= set(group.outputs())
            elif reason:
                self._traced.left.setdefault(reason, []).append(name)
        return self._traced

    def _read(self, name: str, width: int, items: Any) -> tuple[CoupledGroup | None, str]:
        members: list[Member] = []
        for item in items:
            node, module = item.dep.target, item.dep.target.module
            side = self._side(module, item.dep.handler)
            if not node.outputs and side == "out":
                return None, ""  # the network's output
            if type(module).__module__.startswith("torch_pruning") or not _has_tensors(module):
                continue
            if reason := self._refuse(module):
                return None, reason
            index = _index(width, item)
            if index is None:
                return None, "its channels map to those behind it in a way that is not understood: they stay"
            members.append(Member(self._names[module], side, index))
        return CoupledGroup(name, "channels", width, tuple(members)), ""

    def _refuse(self, module: Any) -> str:
        """Why a group that holds ``module`` cannot be pruned."""
        name = self._names.get(module)
        if name is None:
            return "its channels meet a parameter that belongs to no known layer: they stay"
        if not isinstance(module, LAYER_TYPES + SLICED_NORMS):
            return f"its channels meet a {type(module).__name__}: they stay"
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not is_depthwise(module):
            return "its channels meet a grouped convolution: they stay"
        if self._calls[name] > 1 or id(module.weight) in self._tied:
            return "its channels meet a layer that is used twice: they stay"
        return ""

    def _side(self, module: Any, handler: Any) -> Side:
        if not isinstance(module, LAYER_TYPES) or (isinstance(module, nn.Conv2d) and is_depthwise(module)):
            return "out"
        return "out" if handler == self._graph.get_pruner_of_module(module).prune_out_channels else "in"


def _index(width: int, item: Any) -> Tensor | None:
    """The rows or columns of each unit [U, K], or None where units have different numbers of them."""
    own: list[list[int]] = [[] for _ in range(width)]
    for place, root in zip(item.idxs, item.root_idxs, strict=True):
        if root is None:
            return None
        own[root].append(place)
    if not own[0] or len({len(places) for places in own}) > 1:
        return None
    return torch.tensor([sorted(places) for places in own])


def _has_tensors(module: Any) -> bool:
    if not isinstance(module, nn.Module):
        return True
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _differentiable(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]


def _shapes(example: Any) -> str:
    shapes = [str(list(leaf.shape)) for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    return f"an input of shape {', '.join(shapes)}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
