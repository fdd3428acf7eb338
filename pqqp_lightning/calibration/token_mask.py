"""Which positions of a calibration batch count: padding is not data, and must not enter any statistic.

The mask of a batch comes from the module's ``calibration_mask(batch)``, or from an ``attention_mask`` or a key padding
mask in the batch or among the arguments of a module that the forward pass calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pqqp_lightning.errors import Problem, RecipeError

_TRUE_COUNTS = ("attention_mask",)
_TRUE_IS_PADDING = ("key_padding_mask", "src_key_padding_mask")


class TokenMask:
    """The positions of one batch that count.

    Args:
        counts: bool [B, T], True for a position that counts.
    """

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts

    def select(self, x: Tensor) -> Tensor:
        """Return the positions of ``x`` [..., C] that count: [N, C]; ``x`` itself if it has other positions.

        A pooled sample [B, C] has no positions, so that it counts as it is.
        """
        spread = self._spread(x)
        return x if spread is None else x[spread]

    def misses(self, x: Tensor) -> bool:
        """Whether padded positions of ``x`` may still count, since its positions are not those of the batch."""
        pooled = x.dim() == 2 and len(x) == len(self.counts)
        return not pooled and self._spread(x) is None

    def _spread(self, x: Tensor) -> Tensor | None:
        """The mask in the shape of ``x`` without its last dimension."""
        counts = self.counts.to(x.device)
        batch, length = counts.shape
        positions = x.shape[:-1]
        if positions == (batch * length,):
            return counts.flatten()
        if len(positions) < 2:
            return None
        if positions[0] == batch and positions[-1] == length:
            middle = [1] * (len(positions) - 2)  # heads, for instance
            return counts.view(batch, *middle, length).expand(positions)
        if positions == (length, batch):  # batch_first=False
            return counts.T
        return None


def token_masks(
    model: nn.Module, batches: Sequence[Any], probe: Any, run: Callable[[Any], object]
) -> list[TokenMask | None]:
    """Return the mask of each batch; None for a batch without one, or whose positions all count.

    Args:
        model: the module.
        batches: of calibration.
        probe: a batch of one sample, on which the forward pass shows whether modules are called with a mask.
        run: runs the model's forward pass on a batch.
    """
    define = getattr(model, "calibration_mask", None)
    if callable(define):
        counts = [_checked(define(batch)) for batch in batches]
    elif next(_masks_in(probe), None) is not None:
        counts = [next(_masks_in(batch), None) for batch in batches]
    elif _mask_of_calls(model, probe, run) is not None:
        counts = [_mask_of_calls(model, batch, run) for batch in batches]
    else:
        return [None] * len(batches)
    masks: list[TokenMask | None] = []
    for mask in counts:
        if mask is None or bool(mask.all()):  # then the statistics need no selection, which would copy
            masks.append(None)
        else:
            masks.append(TokenMask(mask.bool()))
    return masks


def _checked(counts: Any) -> Tensor | None:
    """What ``calibration_mask`` returned, if it is a mask or None.

    Raises:
        RecipeError: it is something else.
    """
    if counts is None:
        return None
    if isinstance(counts, Tensor) and counts.dim() == 2 and _is_choice(counts):
        return counts.bool()
    given = f"{counts.dtype} {list(counts.shape)}" if isinstance(counts, Tensor) else type(counts).__name__
    text = f"calibration_mask returned {given} instead of a bool tensor [batch, positions]"
    raise RecipeError(Problem(text=text, way_out="Return True for each position that counts.").within("model"))


def positions_of(x: Tensor, mask: TokenMask | None) -> Tensor:
    """The positions of ``x`` [..., C] that count: ``x`` itself without a mask."""
    return x if mask is None else mask.select(x)


def _masks_in(values: Any) -> Iterator[Tensor]:
    """The token masks [B, T] in nested mappings, tuples and lists, as True for a position that counts."""
    if isinstance(values, tuple | list):
        for value in values:
            yield from _masks_in(value)
    if not isinstance(values, Mapping):
        return
    for name, value in values.items():
        is_mask = isinstance(value, Tensor) and value.dim() == 2 and _is_choice(value)
        if is_mask and name in _TRUE_COUNTS:
            yield value.bool()
        elif is_mask and name in _TRUE_IS_PADDING:
            yield ~value.bool()
        else:
            yield from _masks_in(value)


def _is_choice(mask: Tensor) -> bool:
    """Whether a mask says yes or no of each position: numbers other than 0 and 1 are added to attention scores."""
    if not mask.is_floating_point():
        return True
    ones = mask == 1
    return bool((ones | (mask == 0)).all()) and bool(ones.any())


class _MaskFound(Exception):
    """Ends a forward pass at the call that has a token mask among its arguments."""

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts


def _mask_of_calls(model: nn.Module, batch: Any, run: Callable[[Any], object]) -> Tensor | None:
    """The mask among the arguments of a module that the forward pass calls; the pass ends there."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for counts in _masks_in(_named_arguments(module, args, kwargs)):
            raise _MaskFound(counts)

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in model.modules()]
    try:
        run(batch)
    except _MaskFound as found:
        return found.counts
    finally:
        for handle in handles:
            handle.remove()
    return None


def _named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, also those given by position."""
    if not any(isinstance(value, Tensor | Mapping) for value in args[1:]):
        return kwargs  # most calls: the first argument is the input
    names = list(inspect.signature(module.forward).parameters)
    return dict(zip(names, args, strict=False)) | kwargs
