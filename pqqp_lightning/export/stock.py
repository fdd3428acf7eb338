"""A compressed network as the model that plain transformers builds from a configuration.

What other programs load is an architecture's own structure, described by ``config.json``. This file rewrites what can
be rewritten without changing the function: merged adapters, multiplied factors, folded rotations, zeros in place of
removed parts. Everything else becomes a problem.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pqqp_lightning.algorithms.grid import Grid
from pqqp_lightning.errors import Problem, shorten
from pqqp_lightning.export.padding import can_fill, differing_names, fill_with_zeros
from pqqp_lightning.network.activation_hooks import QuantizeHeads, QuantizeInput, RotateInput, transforms_of
from pqqp_lightning.network.constraints import constrained_layers
from pqqp_lightning.network.layers import is_packed
from pqqp_lightning.surgery.adapters import BASE, is_wrapper, update_of
from pqqp_lightning.surgery.factored import Factored

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ROWS_AT_ONCE = 4096
"""Rows of a head that are multiplied in float64 at a time."""

LOAD_HERE = "Use pqqp_lightning.load(RUN) for it."
RUN_TIME = {
    RotateInput: (
        "rotate their inputs while the model runs",
        "Set online: false and gains: fold in QuaRot, and run it",
    ),
    QuantizeInput: ("round their inputs while the model runs", "Leave ActivationQuantization out, and run"),
    QuantizeHeads: ("round keys or values while the model runs", "Leave kv_bits out, and run"),
}
"""What transforms do that no stock model does, and the way out."""


@dataclass(frozen=True)
class LowRank:
    """What adapters add to one layer: ``scaling * b @ a``.

    Attributes:
        a: [r, I].
        b: [O, r].
        alpha: ``scaling`` times r.
    """

    a: Tensor
    b: Tensor
    alpha: float


@dataclass
class StockModel:
    """An ordinary transformers model, as tensors.

    Attributes:
        model_class: of transformers.
        config: which builds its structure.
        weights: every tensor of its state dict, in the dtype of the run.
        grids: the grids of its quantized Linear layers, by layer name.
        tied: whether the head is the embedding.
        adapters: what adapters add to its layers, by layer name, where they are kept apart; not in ``weights``.
        rounding: what rounds the inputs of its layers, by layer name, where the format may hold it.
        rewritten: what was changed to make it stock, in whole sentences.
        problems: why it cannot be made stock; then the rest is incomplete.
        uneven: whether blocks have widths of their own, which ``config`` does not state.
    """

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    weights: dict[str, Tensor]
    grids: dict[str, Grid]
    tied: bool
    adapters: dict[str, LowRank] = field(default_factory=dict)
    rounding: dict[str, QuantizeInput] = field(default_factory=dict)
    rewritten: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    uneven: bool = False

    def stored(self) -> dict[str, Tensor]:
        """The tensors that files hold: a tied head is not stored."""
        return {name: tensor for name, tensor in self.weights.items() if not (self.tied and name == self.head_weight)}

    def build(self) -> PreTrainedModel:
        """The model on the meta device: its structure without weights."""
        return build_on_meta(self.model_class, self.config)

    def linear_layers(self) -> list[str]:
        """The names of all Linear layers, in the model's order."""
        return [name for name, module in self.build().named_modules() if isinstance(module, nn.Linear)]

    @property
    def head_weight(self) -> str:
        """The name of the weight that computes the logits."""
        return "lm_head.weight"


UnevenShapes = Callable[[StockModel, dict[str, Tensor]], dict[str, Tensor] | None]


def stock_model(
    network: PreTrainedModel,
    dense_config: PretrainedConfig,
    *,
    pad: bool,
    uneven_shapes: UnevenShapes | None = None,
    keep_adapters: bool = False,
    keep_rounding: bool = False,
) -> StockModel:
    """Rewrite a network as a stock one.

    Args:
        network: a run's; it is not changed.
        dense_config: of the model before any stage.
        pad: whether zeros may take the place of what was removed.
        uneven_shapes: without ``pad``, the shapes to store where blocks have different widths, from the model and the
            tensors that its configuration describes. None where the format has one width for all blocks.
        keep_adapters: leave adapters apart that the run kept apart; else they are added to their layers' weights.
        keep_rounding: set aside what rounds the inputs of layers; else it is a problem.
    """
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    grids: dict[str, Grid] = {}
    other = []  # GPT-2's Conv1D and fused experts: their weights are laid out in another way
    for name, layer, constraints in constrained_layers(network):
        if constraints.grid is not None and isinstance(layer, nn.Linear):
            grids[name] = constraints.grid
        elif constraints.grid is not None:
            other.append(name)
    head = network.get_output_embeddings()
    embedding: Any = network.get_input_embeddings()
    tied = head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()
    stock = StockModel(type(network), copy_config(network.config), weights, grids, tied)
    if other:
        stock.rewritten.append(f"The codes of {shorten(other)}, which are not Linear, are written as values.")
    if keep_rounding:
        _set_rounding_aside(network, stock)
    stock.problems += _run_time_problems(network, stock)
    if keep_adapters:
        _set_adapters_aside(network, stock)
    else:
        _merge_adapters(network, stock)
    _multiply_factors(network, stock)
    _fold_norms(network, stock)
    if not stock.problems:
        _fit_structure(network, stock, dense_config, None if pad else uneven_shapes, pad)
    return stock


def copy_config(config: PretrainedConfig) -> PretrainedConfig:
    """An independent copy, as a file would hold it."""
    return type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))


def build_on_meta(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The structure that a configuration describes."""
    with torch.device("meta"):
        return model_class(copy_config(config))


def _set_rounding_aside(network: nn.Module, stock: StockModel) -> None:
    """Note what rounds the inputs of layers."""
    for name, module in network.named_modules():
        for transform in transforms_of(module):
            if isinstance(transform, QuantizeInput):
                stock.rounding[name] = transform


def _run_time_problems(network: nn.Module, stock: StockModel) -> list[Problem]:
    """What layers do besides their weights and the rounding that was set aside: no configuration describes it."""
    problems = []
    for kind, (what, way_out) in RUN_TIME.items():
        noted = stock.rounding if kind is QuantizeInput else {}
        layers = [name for name, module in network.named_modules() if _has(module, kind) and name not in noted]
        if layers:
            problems.append(Problem("run", text=f"has {shorten(layers)} that {what}", way_out=f"{way_out} it again."))
    packed = [name for name, m in network.named_modules() if isinstance(m, nn.Linear) and is_packed(m)]
    if packed:
        text = f"has {shorten(packed)} whose weights only their own kernels read"
        problems.append(Problem("run", text=text, way_out=LOAD_HERE))
    return problems


def _has(module: nn.Module, kind: type) -> bool:
    return any(isinstance(transform, kind) for transform in transforms_of(module))


def _merge_adapters(network: nn.Module, stock: StockModel) -> None:
    """Add adapters that were kept apart to their layers' weights; the sum lies on no grid."""
    merged = []
    unmerged = []
    for name, module in network.named_modules():
        if not is_wrapper(module):
            continue
        layer: Any = module
        if not isinstance(layer.get_base_layer(), nn.Linear):  # GPT-2's Conv1D holds its weight transposed
            unmerged.append(name)
            continue
        weight = stock.weights[f"{name}.{BASE}.weight"]
        total = weight.double()
        for adapter in layer.active_adapters:
            total = total + update_of(layer, adapter).double()
        bias = stock.weights.get(f"{name}.{BASE}.bias")
        _replace_module(stock, name, total.to(weight.dtype), bias)
        merged.append(name)
    if unmerged:
        text = f"keeps adapters apart on {shorten(unmerged)} that are not Linear"
        stock.problems.append(Problem("run", text=text, way_out="Set merge: true in LoRA, and run it again."))
    if merged:
        stock.rewritten.append(f"Adapters were merged into {shorten(merged)}, which are dense here.")


def _set_adapters_aside(network: nn.Module, stock: StockModel) -> None:
    """Move the adapters out of the weights, and give what they wrap the names that a stock model has."""
    for name, module in network.named_modules():
        if not is_wrapper(module):
            continue
        layer: Any = module
        stock.adapters[name] = _low_rank(layer)
        grid = stock.grids.pop(f"{name}.{BASE}", None)
        for key in [key for key in stock.weights if key.startswith(f"{name}.")]:
            tensor = stock.weights.pop(key)
            inner = key.removeprefix(f"{name}.{BASE}.")
            if inner != key:
                stock.weights[f"{name}.{inner}"] = tensor
        if grid is not None:
            stock.grids[name] = grid


def _low_rank(layer: Any) -> LowRank:
    """All active adapters of a wrapper as one: their ranks one after another."""
    first = layer.active_adapters[0]
    down = []
    up = []
    for name in layer.active_adapters:
        down.append(layer.lora_A[name].weight.detach())
        up.append(layer.lora_B[name].weight.detach() * (layer.scaling[name] / layer.scaling[first]))
    a = torch.cat(down)
    return LowRank(a, torch.cat(up, dim=1), layer.scaling[first] * len(a))


def _multiply_factors(network: nn.Module, stock: StockModel) -> None:
    """Multiply a shared basis with each layer's coefficients."""
    multiplied = []
    for name, module in network.named_modules():
        if not isinstance(module, Factored):
            continue
        coefficients = stock.weights[f"{name}.coefficients.weight"]  # [O, k]
        basis = stock.weights[f"{name}.basis.weight"]  # [k, I]
        product = (coefficients.double() @ basis.double()).to(coefficients.dtype)
        _replace_module(stock, name, product, stock.weights.get(f"{name}.coefficients.bias"))
        multiplied.append(name)
    if multiplied:
        text = f"Factors were multiplied out in {shorten(multiplied)}, which are dense and unshared here."
        stock.rewritten.append(text)


def _replace_module(stock: StockModel, name: str, weight: Tensor, bias: Tensor | None) -> None:
    """Put one weight in place of everything that a module holds."""
    for key in [key for key in stock.weights if key.startswith(f"{name}.")]:
        del stock.weights[key]
    for key in [key for key in stock.grids if key.startswith(f"{name}.")]:
        del stock.grids[key]
    stock.weights[f"{name}.weight"] = weight
    if bias is not None:
        stock.weights[f"{name}.bias"] = bias


def _fold_norms(network: PreTrainedModel, stock: StockModel) -> None:
    """Give norms without gains gains of 1, and fold the matrix behind the last norm into the head (QuaRot)."""
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.RMSNorm)]
    if not norms:
        return
    plain: dict[str, nn.Module] = {}
    for name in norms:
        parent, _, child = name.rpartition(".")
        folded = isinstance(network.get_submodule(parent), nn.Sequential) and child == "norm"
        plain[parent if folded else name] = network.get_submodule(name)
    fresh = dict(build_on_meta(stock.model_class, stock.config).named_modules())
    unlike = [name for name, norm in plain.items() if not _is_rms_norm(fresh.get(name), norm)]
    if unlike:
        text = f"has {shorten(unlike, what='rotated norm')} that no model of type {stock.config.model_type} has"
        stock.problems.append(Problem("run", text=text, way_out=f"Leave QuaRot out, and run it again. {LOAD_HERE}"))
        return
    for name, norm in plain.items():
        gain = stock.weights.pop(f"{name}.gain.weight", None)
        size: Any = norm.normalized_shape[0]  # type: ignore[union-attr,index]
        embedding = stock.weights[f"{_name_of(network, network.get_input_embeddings())}.weight"]
        stock.weights[f"{name}.weight"] = torch.ones(size, dtype=embedding.dtype)
        if gain is not None:
            rows = [(part.double() @ gain.double()).to(embedding.dtype) for part in embedding.split(ROWS_AT_ONCE)]
            stock.weights[stock.head_weight] = torch.cat(rows)
            stock.tied = False
            stock.config.tie_word_embeddings = False
            stock.rewritten.append("The rotation is folded into a head of its own; the embedding was tied before.")


def _is_rms_norm(fresh: Any, norm: Any) -> bool:
    """Whether the stock norm with gains of 1 computes what ``norm`` does, tried on random numbers."""
    if fresh is None or [name for name, _ in fresh.named_parameters()] != ["weight"]:
        return False
    size = norm.normalized_shape[0]
    epsilon = getattr(fresh, "variance_epsilon", None)
    if epsilon != norm.eps:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, size, generator=generator)
    tried = type(fresh)(size, eps=epsilon)
    nn.init.ones_(tried.weight)
    return torch.allclose(tried(x), norm(x), atol=1e-5)


def _fit_structure(
    network: nn.Module,
    stock: StockModel,
    dense_config: PretrainedConfig,
    uneven_shapes: UnevenShapes | None,
    pad: bool,
) -> None:
    """Compare the tensors with those that the configuration describes; with ``pad`` fill in zeros."""
    expected = _described(stock.model_class, stock.config)
    if expected is None or differing_names(stock.weights, expected):
        # A stage that leaves layers of several widths may have changed the configuration; the dense one has room.
        wide = copy_config(dense_config)
        wide.tie_word_embeddings = stock.config.tie_word_embeddings
        layers = getattr(stock.config, "num_hidden_layers", None)
        if layers == getattr(wide, "num_hidden_layers", None):
            stock.config = wide
            expected = _described(stock.model_class, wide)
    if expected is None:
        text = f"has a structure that no configuration of {stock.config.model_type} describes"
        stock.problems.append(Problem("run", text=text, way_out=LOAD_HERE))
        return
    differing = differing_names(stock.weights, expected)
    if not differing:
        _check_classes(network, stock)
        return
    if not can_fill(network, stock.weights, expected):
        text = (
            f"has a structure that no model of type {stock.config.model_type} has: {shorten(differing, what='weight')}"
        )
        stock.problems.append(Problem("run", text=text, way_out=LOAD_HERE))
    elif shapes := uneven_shapes(stock, expected) if uneven_shapes else None:
        stock.uneven = True
        stock.rewritten.append("Blocks keep their own numbers of heads and channels.")
        filled = fill_with_zeros(stock.weights, stock.grids, shapes)
        if filled:
            stock.rewritten.append(f"Zeros fill {shorten(filled, what='weight')} up to what this format needs.")
    elif not pad:
        text = f"has layers of uneven widths or without sublayers: {shorten(differing, what='weight')}"
        way_out = "Set --pad true: zeros take their place, which is exact and takes the dense model's room."
        stock.problems.append(Problem("run", text=text, way_out=way_out))
    else:
        fill_with_zeros(stock.weights, stock.grids, expected)
        stock.rewritten.append(f"Zeros fill what was removed from {shorten(differing, what='weight')}.")


def _described(model_class: type[PreTrainedModel], config: PretrainedConfig) -> dict[str, Tensor] | None:
    """The state dict on the meta device that ``config`` describes; None if it describes none."""
    try:
        return dict(build_on_meta(model_class, config).state_dict())
    except (ValueError, RuntimeError, AssertionError):
        return None


def _check_classes(network: nn.Module, stock: StockModel) -> None:
    """Refuse modules of another class than the stock model's, except for those that were rewritten."""
    foreign = []
    for name, module in stock.build().named_modules():
        try:
            own = network.get_submodule(name)
        except AttributeError:
            continue  # inside of a module that was rewritten
        rewritten = isinstance(own, Factored | nn.RMSNorm | nn.Sequential) or is_wrapper(own)
        if type(own) is not type(module) and not rewritten:
            foreign.append(f"{name} ({type(own).__name__})")
    if foreign:
        text = f"has {shorten(foreign, what='module')} that no model of type {stock.config.model_type} has"
        stock.problems.append(Problem("run", text=text, way_out=LOAD_HERE))


def _name_of(network: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in network.named_modules() if module is wanted)
