"""Reads the inputs of weights that are used functionally: passed to F.linear, matmul or torch's attention function.

EVA's and BEiT's qkv, the projections of ``nn.MultiheadAttention`` and fused expert weights are such layers: their
module's forward is never called, so that no hook fires.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pqqp_lightning.network.layers import Layer, columns_of, groups_of, layout_of, weight_place

See = Callable[[str, Tensor, int | None, int], None]
"""(layer's name, its input [..., I], the part of the matrix's rows that reads it, the number of parts).

The part is None if the whole matrix reads the input; with several parts the input then is [parts, T, I].
"""

Made = See
"""(layer's name, the output of the product [..., O], and the part as in ``See``)."""

Use = tuple[str, int | None, int]
"""(layer's name, part, number of parts)."""

_ATTENTION = inspect.signature(F.multi_head_attention_forward)
_PRODUCTS = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}
_SUMS = {torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm}


@dataclass(frozen=True)
class _Place:
    """Where a layer's weight lies in its storage, in entries: groups of matrices [O, I] or, transposed, [I, O]."""

    name: str
    start: int
    entries: int
    groups: int
    columns: int
    transposed: bool


class FunctionalReader(TorchFunctionMode):
    """While active, reports the products in which torch functions use the weights of ``layers``.

    A weight is recognised by its place in its storage, so that views of it count: a transposed one, the chunk of one
    projection, or the matrix of one expert. A product inside a layer's own forward is not reported: its hooks see it.

    Args:
        layers: name to layer.
        see: called before a product.
        made: called after a product.
    """

    def __init__(self, layers: Mapping[str, Layer], see: See, made: Made | None = None) -> None:
        super().__init__()
        self._see, self._made = see, made
        self._inside: set[str] = set()
        self._places: dict[int, list[_Place]] = {}
        for name, layer in layers.items():
            module, parameter = weight_place(layer)
            weight = module._parameters.get(parameter)  # a parametrized weight is computed anew for every use
            layout = layout_of(layer)
            if weight is None or layout == "channels_last" or weight.is_meta:
                continue
            groups = groups_of(layer) if weight.dim() == 3 else 1
            transposed = layout in ("transposed", "stacked_transposed")
            start = int(weight.storage_offset())
            place = _Place(name, start, weight.numel(), groups, columns_of(layer), transposed)
            self._places.setdefault(weight.untyped_storage().data_ptr(), []).append(place)

    @contextmanager
    def beside_calls(self, layers: Mapping[str, Layer]) -> Iterator[None]:
        """Inside, ignore products in the forward of one of ``layers``."""

        def enter(name: str) -> Any:
            return lambda *_: self._inside.add(name)

        def leave(name: str) -> Any:
            return lambda *_: self._inside.discard(name)

        handles: list[Any] = []
        for name, layer in layers.items():
            if isinstance(layer, nn.Module):
                handles.append(layer.register_forward_pre_hook(enter(name)))
                handles.append(layer.register_forward_hook(leave(name), always_call=True))
        try:
            yield
        finally:
            self._inside.clear()
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._attention(args, kwargs)
        used: list[Use] = []
        if func is F.linear:
            inputs, weight = _arguments(args, kwargs, ("input", "weight"))
            used = self._product(inputs, weight, -1)
        elif func in _PRODUCTS or func in _SUMS:
            first, second = args[-2:] if len(args) > 1 else (None, None)
            used = self._product(first, second, -2)
            if not used and isinstance(second, Tensor) and second.dim() > 1:
                used = self._product(second.transpose(-1, -2), first, -1)
        output = func(*args, **kwargs)
        self._report_output(used, output)
        return output

    def _product(self, inputs: Any, weight: Any, contracted: int) -> list[Use]:
        """Report a product of ``inputs`` and ``weight``, whose dimension ``contracted`` the sum runs over."""
        if not isinstance(inputs, Tensor):
            return []
        used: list[Use] = []
        for place, part, parts in self._find(weight, contracted):
            if place.name not in self._inside:
                used.append((place.name, part, parts))
                self._see(place.name, inputs, part, parts)
        return used

    def _find(self, weight: Any, contracted: int) -> Iterable[tuple[_Place, int | None, int]]:
        """The layers that ``weight`` belongs to, with the part of their matrix that it is."""
        if not isinstance(weight, Tensor) or weight.dim() not in (2, 3) or weight.is_meta:
            return []
        found: list[tuple[_Place, int | None, int]] = []
        offset, entries = int(weight.storage_offset()), weight.numel()
        for place in self._places.get(weight.untyped_storage().data_ptr(), []):
            outputs = place.entries // (place.groups * place.columns)
            stride = outputs if place.transposed else 1
            inside = place.start <= offset and offset + entries <= place.start + place.entries
            along_inputs = weight.shape[contracted] == place.columns and weight.stride(contracted) == stride
            if not entries or not inside or not along_inputs or place.entries % entries:
                continue
            parts = place.entries // entries
            if weight.dim() == 3:
                if parts == 1:
                    found.append((place, None, place.groups))
            elif (offset - place.start) % entries == 0:
                found.append((place, None if parts == 1 else (offset - place.start) // entries, parts))
        return found

    def _attention(self, args: Any, kwargs: Any) -> Any:
        """Run ``F.multi_head_attention_forward`` and report its projections.

        The input of the output projection exists inside the function only. With an identity in place of the projection
        the function returns it exactly; the projection follows.
        """
        call = _ATTENTION.bind(*args, **kwargs)
        given = call.arguments
        self._project_inputs(given)
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        if not self._find(weight, -1):
            return F.multi_head_attention_forward(*call.args, **call.kwargs)
        given["out_proj_weight"] = _identity(weight)
        given["out_proj_bias"] = None
        attention, shares = F.multi_head_attention_forward(*call.args, **call.kwargs)
        used = self._product(attention, weight, -1)
        output = F.linear(attention, weight, bias)
        self._report_output(used, output)
        return output, shares

    def _project_inputs(self, given: dict[str, Any]) -> None:
        """Report the projections of queries, keys and values, ``given`` the arguments of the function.

        Where their outputs are asked for, compute them here, and let the function project with identities.
        """
        inputs = [given["query"], given["key"], given["value"]]
        separate = bool(given.get("use_separate_proj_weight"))
        joint, bias = given["in_proj_weight"], given["in_proj_bias"]
        weights: list[Any] = [given.get(f"{name}_proj_weight") for name in "qkv"] if separate else [joint]
        if not separate and not (inputs[0] is inputs[1] and inputs[1] is inputs[2]):
            weights = list(joint.chunk(3))
        biases = [bias] if len(weights) == 1 or bias is None else list(bias.chunk(3))
        outputs: list[Tensor] = []
        for i, weight in enumerate(weights):
            used = self._product(inputs[i], weight, -1)
            if self._made is not None:
                outputs.append(F.linear(inputs[i], weight, biases[min(i, len(biases) - 1)]))
                self._report_output(used, outputs[-1])
        if not outputs:
            return
        given["query"], given["key"], given["value"] = outputs if len(outputs) == 3 else outputs[0].chunk(3, dim=-1)
        identity = _identity(given["out_proj_weight"])
        given["in_proj_bias"] = None
        if separate:
            given["q_proj_weight"] = given["k_proj_weight"] = given["v_proj_weight"] = identity
        else:
            given["in_proj_weight"] = identity.repeat(3, 1)

    def _report_output(self, used: list[Use], output: Tensor) -> None:
        if self._made is not None:
            for name, part, parts in used:
                self._made(name, output, part, parts)


def _identity(weight: Tensor) -> Tensor:
    """The identity, in the shape of a square ``weight``."""
    return torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)


def _arguments(args: Any, kwargs: Any, names: tuple[str, str]) -> list[Any]:
    """The first two arguments of a call, by position or by name."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


@contextmanager
def without_fast_paths(model: nn.Module) -> Iterator[None]:
    """Inside, torch's attention and transformers' experts compute step by step, so that each product is seen.

    The fused kernels of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` read the weights out of sight, and
    grouped kernels mix the rows of all experts.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    earlier: dict[int, tuple[Any, str]] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        kind = getattr(config, "_experts_implementation", None)
        if isinstance(kind, str) and kind != "eager":
            earlier[id(config)] = config, kind
    torch.backends.mha.set_fastpath_enabled(False)
    for config, _ in earlier.values():
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for config, kind in earlier.values():
            config._experts_implementation = kind
