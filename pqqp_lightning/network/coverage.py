"""How many of a model's parameters a stage acts on, and of what kind the others are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from pqqp_lightning.network.layers import Layer, is_adapter, weight_place
from pqqp_lightning.network.offload import offload_of

KINDS_OF_MODULES: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Embedding, "embeddings"),
    (nn.EmbeddingBag, "embeddings"),
    (nn.MultiheadAttention, "attention in_proj"),
    (nn.RNNBase, "recurrent weights"),
    (nn.RNNCellBase, "recurrent weights"),
    (_ConvTransposeNd, "transposed convolutions"),
    (nn.Conv1d, "1-d convolutions"),
    (nn.Conv2d, "2-d convolutions"),
    (nn.Conv3d, "3-d convolutions"),
    (ParametrizationList, "parametrized weights"),
    (nn.Linear, "linear layers"),
)
HEADS = ("lm_head", "embed_out", "head", "heads", "head_dist", "fc", "classifier", "score", "output")
"""What libraries call the layers that compute a model's outputs."""
EMBEDDINGS = ("embed", "token", "position")
"""What names of embeddings contain that are plain parameters: pos_embed, cls_token, relative_position_bias_table."""


@dataclass(frozen=True)
class Coverage:
    """What a stage covers of a model's parameters. A shared parameter counts once, adapters do not count.

    Attributes:
        parameters: of the model.
        covered: those that the stage's layers multiply their inputs with.
        left: the others by kind, the largest first; ``parameters - covered`` in all.
    """

    parameters: int
    covered: int
    left: dict[str, int]


def measure_coverage(model: nn.Module, layers: Iterable[Layer]) -> Coverage:
    """Count the parameters of ``model``, those that are weights of ``layers``, and the others by kind."""
    weights: set[int] = set()
    for layer in layers:
        weights.update(id(parameter) for parameter in _weight_parameters(layer))
    total = 0
    covered = 0
    left: dict[str, int] = defaultdict(int)
    for name, module, own_name, parameter in _own_parameters(model):
        total += parameter.numel()
        if id(parameter) in weights:
            covered += parameter.numel()
        else:
            left[_kind_of(name, module, own_name, parameter.dim())] += parameter.numel()
    largest_first = sorted(left.items(), key=lambda item: -item[1])
    return Coverage(total, covered, dict(largest_first))


def count_parameters(model: nn.Module) -> int:
    """Count the parameters of ``model``, a shared one once, without adapters."""
    return sum(parameter.numel() for *_, parameter in _own_parameters(model))


def count_nonzero_parameters(model: nn.Module) -> int:
    """Count the entries of these parameters that are not zero."""
    own = ((name, parameter) for name, *_, parameter in _own_parameters(model))
    return sum(int(parameter.count_nonzero()) for _, parameter in offload_of(model).visit(own))


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield each parameter outside of adapters once: (module name, module, name in the module, parameter)."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if is_adapter(module):
            continue
        for own_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, module, own_name, parameter


def _weight_parameters(layer: Layer) -> list[Tensor]:
    """The parameters that hold a layer's weight: several for a parametrized one."""
    module, name = weight_place(layer)
    if is_parametrized(module, name):
        lists: Any = module.parametrizations
        return list(lists[name].parameters())
    return [layer.weight]


def _kind_of(module_name: str, module: nn.Module, name: str, dimensions: int) -> str:
    """The kind of a parameter, in words that a user of the model knows.

    Args:
        module_name: of the module that holds it.
        module: this module.
        name: of the parameter in the module.
        dimensions: of its shape.
    """
    class_name = type(module).__name__
    if "norm" in class_name.lower():
        return "normalization"
    if name.startswith("bias") or name.endswith("bias"):
        return "biases"
    if isinstance(module, nn.Linear) and _is_head(module_name):
        return "output head"
    for module_type, kind in KINDS_OF_MODULES:
        if isinstance(module, module_type):
            return kind
    return _kind_by_name(f"{module_name}.{class_name}", name, dimensions)


def _kind_by_name(where: str, name: str, dimensions: int) -> str:
    """The kind of a parameter of a module that a library defines itself: only names tell it."""
    where = where.lower()
    if where.endswith(".conv1d"):
        return "Conv1D layers of transformers"
    if "router" in where:
        return "expert routers"
    if "expert" in where and dimensions == 3:
        return "3-D expert weights"
    if any(part in name.lower() for part in EMBEDDINGS):
        return "embeddings"
    return "other parameters"


def _is_head(name: str) -> bool:
    """Whether a module's name is that of an output head: outside of every list of blocks, and called so."""
    for part in name.split("."):
        if part.isdigit():
            return False
        if part in HEADS:
            return True
    return False
