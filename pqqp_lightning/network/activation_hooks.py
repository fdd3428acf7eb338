"""What happens to activations in front of a layer, or behind it: rotations and rounding, as hook objects.

A transform is an object that is registered as a forward hook. It is copied with its module (``copy.deepcopy``,
pickling), holds no weights, and is put back from a stage's plan when a checkpoint is loaded. A stage that puts another
module in a layer's place hands the layer's transforms on with :func:`move_transforms`.
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


class Transform(ABC):
    """A function of a layer's input. Layers that get the very same tensor get the very same result."""

    def __init__(self) -> None:
        self._memo: tuple[Any, ...] | None = None

    @abstractmethod
    def transform(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The tensor to put in the place of ``x``."""

    def attach(self, layer: nn.Module) -> None:
        """Stand in front of ``layer`` from now on, behind the transforms that are there."""
        layer.register_forward_pre_hook(self)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The forward pre-hook."""
        if not args:
            raise TypeError(f"{type(layer).__name__} must get its input as a positional argument, but got none")
        return self._once(layer, args[0]), *args[1:]

    def _once(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The result for ``x``, the same object for q, k and v, which read one input; kept while ``x`` lives."""
        version = None if x.is_inference() else x._version
        key = (version, type(layer), torch.is_grad_enabled())
        if self._memo is not None and self._memo[0]() is x and self._memo[1] == key:
            return self._memo[2]
        result = self.transform(layer, x)
        self._memo = (weakref.ref(x, self._forget), key, result)
        return result

    def _forget(self, dead: Any) -> None:
        if self._memo is not None and self._memo[0] is dead:
            self._memo = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what was computed last: for copies and pickling."""
        return {**self.__dict__, "_memo": None}


class RotateInput(Transform):
    """x -> x Q in front of a layer whose weight is W Q; computed in float32 at least (QuaRot's online rotation).

    Args:
        rotation: of order n.
        width: of each of the n parts of the input that are mixed: 1 for all inputs, a head's for whole heads.
    """

    def __init__(self, rotation: Rotation, width: int = 1) -> None:
        super().__init__()
        self.rotation, self.width = rotation, width
        self._placed = rotation

    def transform(self, layer: nn.Module, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        if self._placed.factor.device != x.device or self._placed.factor.dtype != wide:
            with torch.inference_mode(False):  # what is made inside could not be used in training
                self._placed = self.rotation.to(x.device, wide)
        return rotate_across(self._placed, self.width)(x.to(wide)).to(x.dtype)


class QuantizeInput(Transform):
    """Rounds a layer's input: a scale for each token of a Linear's, for each sample of a Conv2d's.

    In training the gradient passes through unchanged (straight-through).

    Args:
        bits: 2 to 8.
        options: of :func:`~pqqp_lightning.algorithms.activation.quantize_activation`.
    """

    def __init__(self, bits: int, **options: Any) -> None:
        super().__init__()
        self.bits, self.options = bits, options

    def transform(self, layer: nn.Module, x: Tensor) -> Tensor:
        where: dict[str, Any] = {}
        if isinstance(getattr(layer, "base_layer", layer), nn.Conv2d):  # or an adapter's wrapper around one
            where = {"dims": (-3, -2, -1), "column_dim": -3}
        return _StraightThrough.apply(x, quantize_activation(x.detach(), self.bits, **where, **self.options))


@dataclass
class QuantizeHeads:
    """Rounds the keys or values that a projection gives out: a scale for each token and head.

    Attributes:
        bits: 2 to 8.
        head_dim: width of a head.
        symmetric: without a zero point.
        clip: fraction of the largest value that the grid reaches.
    """

    bits: int
    head_dim: int
    symmetric: bool = True
    clip: float = 1.0

    def attach(self, layer: nn.Module) -> None:
        """Stand behind ``layer`` from now on."""
        layer.register_forward_hook(self)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The forward hook."""
        heads = output.detach().unflatten(-1, (-1, self.head_dim))  # [V, heads, head_dim]
        rounded = quantize_activation(heads, self.bits, symmetric=self.symmetric, clip=self.clip)
        return _StraightThrough.apply(output, rounded.flatten(-2))


class ProjectedEmbedding(nn.Embedding):
    """An embedding that shares the weight of ``old`` and gives out its rows without their part along one direction.

    A LayerNorm's mean, taken out of the residual stream where the embedding itself must keep it for a tied head.

    Attributes:
        direction: of length 1, [H]; saved with the weights.
    """

    direction: Tensor

    def __init__(self, old: nn.Embedding) -> None:
        super().__init__(old.num_embeddings, old.embedding_dim, old.padding_idx, _weight=old.weight.detach())
        self.weight = old.weight
        self.register_buffer("direction", old.weight.detach().new_zeros(old.embedding_dim))

    def forward(self, input: Tensor) -> Tensor:
        """The rows of ``input`` [V], projected: [V, H]."""
        rows = super().forward(input)
        wide = torch.promote_types(rows.dtype, torch.float32)
        direction = self.direction.to(wide)
        along = rows.to(wide) @ direction  # [V]
        return (rows - along[..., None] * direction).to(rows.dtype)


def transforms_of(layer: nn.Module) -> list[Transform | QuantizeHeads]:
    """The transforms in front of ``layer`` and behind it."""
    hooks = [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, Transform | QuantizeHeads)]


def transformed_layers(model: nn.Module, kind: type[Transform | QuantizeHeads]) -> Iterator[str]:
    """The names of the layers with a transform of this kind."""
    for name, module in model.named_modules():
        if any(isinstance(transform, kind) for transform in transforms_of(module)):
            yield name


def move_transforms(old: nn.Module, new: nn.Module) -> None:
    """Take the transforms of ``old`` away and attach them to ``new``, which takes its place."""
    for transform in transforms_of(old):
        for hooks in (old._forward_pre_hooks, old._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook is transform]:
                del hooks[key]
        transform.attach(new)


@contextmanager
def without_transforms(layer: nn.Module) -> Iterator[None]:
    """``layer`` as if it had none, while something else than its own forward runs in its place."""
    kept: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
        kept.append((hooks, dict(hooks)))
        for key in [key for key, hook in hooks.items() if isinstance(hook, Transform | QuantizeHeads)]:
            del hooks[key]
    try:
        yield
    finally:
        for hooks, before in kept:
            now = dict(hooks)
            hooks.clear()
            hooks.update({k: h for k, h in before.items() if k in now or isinstance(h, Transform | QuantizeHeads)})
            hooks.update(now)


class _StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
