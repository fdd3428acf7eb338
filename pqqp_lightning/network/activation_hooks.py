"""Transforms of activations before or after a layer, as hook objects: rotation and rounding.

A transform is an object that is registered as a forward hook. It is copied with its module (``copy.deepcopy``,
pickling) and holds no weights; loading a checkpoint attaches it again from the stage's plan. A stage that replaces a
layer by another module moves the layer's transforms to it with :func:`move_transforms`.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pqqp_lightning.algorithms.activation import quantize_activation
from pqqp_lightning.algorithms.hadamard import Rotation
from pqqp_lightning.algorithms.quarot import rotate_across
from pqqp_lightning.network.layer_kinds import kind_of


class Transform(ABC):
    """A function of a layer's input. Layers that read the same tensor object get the same result object."""

    def __init__(self) -> None:
        self._memo: tuple[Any, ...] | None = None

    @abstractmethod
    def transform(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the tensor that replaces ``x``."""

    def attach(self, layer: nn.Module) -> None:
        """Transform the input of ``layer`` from now on, after the transforms that it has already."""
        layer.register_forward_pre_hook(self)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replace the first positional argument: the forward pre-hook."""
        if not args:
            raise TypeError(f"{type(layer).__name__} must get its input as a positional argument, but got none")
        return self._once(layer, args[0]), *args[1:]

    def _once(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the transform of ``x``, computed once for layers that share an input (q, k and v).

        Sharing the result object also lets calibration see that these layers read the same input.
        """
        # An in-place write to ``x`` changes its version and so invalidates the cached result.
        version = None if x.is_inference() else x._version
        key = (version, type(layer), torch.is_grad_enabled())
        if self._memo is not None and self._memo[0]() is x and self._memo[1] == key:
            return self._memo[2]
        result = self.transform(layer, x)
        self._memo = (weakref.ref(x, self._forget), key, result)
        return result

    def _forget(self, dead: Any) -> None:
        # Called when ``x`` is freed: without its input the result is of no use, and it is as large.
        if self._memo is not None and self._memo[0] is dead:
            self._memo = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the cached result, which copies and pickles must not hold."""
        return {**self.__dict__, "_memo": None}


class RotateInput(Transform):
    """Computes x -> x Q in front of a layer whose weight is W Q, in float32 or wider (QuaRot's online rotation).

    Args:
        rotation: of order n.
        width: features per mixed part: 1 mixes single features, the head width mixes whole heads.
    """

    def __init__(self, rotation: Rotation, width: int = 1) -> None:
        super().__init__()
        self.rotation, self.width = rotation, width
        self._placed = rotation

    def transform(self, layer: nn.Module, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        if self._placed.factor.device != x.device or self._placed.factor.dtype != wide:
            with torch.inference_mode(False):  # training could not use a tensor created in inference mode
                self._placed = self.rotation.to(x.device, wide)
        return rotate_across(self._placed, self.width)(x.to(wide)).to(x.dtype)


class QuantizeInput(Transform):
    """Rounds a layer's input: one scale per token, for convolutions one per sample.

    In training the gradient passes straight through.

    Args:
        bits: 2 to 8.
        options: further arguments of :func:`~pqqp_lightning.algorithms.activation.quantize_activation`.
    """

    def __init__(self, bits: int, **options: Any) -> None:
        super().__init__()
        self.bits, self.options = bits, options

    def transform(self, layer: nn.Module, x: Tensor) -> Tensor:
        dimensions: dict[str, Any] = {}
        kind = kind_of(getattr(layer, "base_layer", layer))  # also inside an adapter's wrapper
        if kind is not None and kind.spatial:
            dimensions = {"dims": tuple(range(-kind.spatial - 1, 0)), "column_dim": -kind.spatial - 1}
        return _StraightThrough.apply(x, quantize_activation(x.detach(), self.bits, **dimensions, **self.options))


@dataclass
class QuantizeHeads:
    """Rounds the keys or values that a projection computes: one scale per token and head.

    Attributes:
        bits: 2 to 8.
        head_dim: features of a head.
        symmetric: use no zero point.
        clip: fraction of the largest value that the grid reaches.
    """

    bits: int
    head_dim: int
    symmetric: bool = True
    clip: float = 1.0

    def attach(self, layer: nn.Module) -> None:
        """Transform the output of ``layer`` from now on."""
        layer.register_forward_hook(self)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Replace the output: the forward hook."""
        heads = output.detach().unflatten(-1, (-1, self.head_dim))  # [V, heads, head_dim]
        rounded = quantize_activation(heads, self.bits, symmetric=self.symmetric, clip=self.clip)
        return _StraightThrough.apply(output, rounded.flatten(-2))


class ProjectedEmbedding(nn.Embedding):
    """An embedding that shares the weight of ``old`` and removes one direction from its output.

    Needed to remove a LayerNorm's mean from the residual stream if the head is tied: the shared weight must keep it.

    Attributes:
        direction: unit vector [H]; saved with the weights.
    """

    direction: Tensor

    def __init__(self, old: nn.Embedding) -> None:
        super().__init__(old.num_embeddings, old.embedding_dim, old.padding_idx, _weight=old.weight.detach())
        self.weight = old.weight
        self.register_buffer("direction", old.weight.detach().new_zeros(old.embedding_dim))

    def forward(self, input: Tensor) -> Tensor:
        """Look up ``input`` [V] and project the rows: [V, H]."""
        rows = super().forward(input)
        wide = torch.promote_types(rows.dtype, torch.float32)
        direction = self.direction.to(wide)
        along = rows.to(wide) @ direction  # [V]
        return (rows - along[..., None] * direction).to(rows.dtype)


def leave_fast_path(model: nn.Module, name: str) -> None:
    """Make torch call the layer ``name``, where it would pass its weight to the fused kernel of an encoder layer.

    The kernel is not used for layers with hooks, nor is the layout of tensors that only the kernel reads.
    """
    parents = name.split(".")[:-1]
    chain = [model.get_submodule(".".join(parents[:length])) for length in range(len(parents) + 1)]
    if not isinstance(chain[-1], nn.TransformerEncoderLayer):
        return
    model.get_submodule(name).register_forward_pre_hook(_change_nothing)
    for module in chain:
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _change_nothing(layer: nn.Module, args: Any) -> None:
    pass


def transforms_of(layer: nn.Module) -> list[Transform | QuantizeHeads]:
    """Return the transforms of a layer's input and output."""
    hooks = [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, Transform | QuantizeHeads)]


def transformed_layers(model: nn.Module, kind: type[Transform | QuantizeHeads]) -> Iterator[str]:
    """Yield the names of the layers that have a transform of this kind."""
    for name, module in model.named_modules():
        if any(isinstance(transform, kind) for transform in transforms_of(module)):
            yield name


def move_transforms(old: nn.Module, new: nn.Module) -> None:
    """Detach the transforms of ``old`` and attach them to ``new``, which replaces it."""
    for transform in transforms_of(old):
        for hooks in (old._forward_pre_hooks, old._forward_hooks):
            for key, hook in list(hooks.items()):
                if hook is transform:
                    del hooks[key]
        transform.attach(new)


@contextmanager
def without_transforms(layer: nn.Module) -> Iterator[None]:
    """Disable the transforms of ``layer`` inside the context, while another forward replaces its own."""
    earlier: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
        earlier.append((hooks, dict(hooks)))
        for key, hook in list(hooks.items()):
            if isinstance(hook, Transform | QuantizeHeads):
                del hooks[key]
    try:
        yield
    finally:
        # Hooks run in the order of the dict, so rebuild it: the transforms return to their places, hooks that were
        # removed inside the context stay removed, and hooks that were added come last.
        for hooks, before in earlier:
            current = dict(hooks)
            hooks.clear()
            for key, hook in before.items():
                if key in current or isinstance(hook, Transform | QuantizeHeads):
                    hooks[key] = hook
            hooks.update(current)


class _StraightThrough(torch.autograd.Function):
    """Returns the second argument; the gradient goes to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
