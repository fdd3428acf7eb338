"""How a network's blocks follow one another, observed in one forward pass.

Replaying a block alone is correct only if each block's input is the previous block's output, unchanged. This module
checks that on the real model. If it does not hold, the caller treats the whole model as one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pqqp_lightning.calibration.collect import StopForward
from pqqp_lightning.network.blocks import Blocks

Run = Callable[[Any], object]
"""Runs the whole model on one calibration batch."""

_UNCHAINED = "_pqqp_unchained"


@dataclass
class Call:
    """The arguments of one call of a block; the first tensor is the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor | None:
        """The hidden state that the block reads, or None if it gets no tensor."""
        return next((v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)), None)

    def with_hidden(self, hidden: Tensor) -> Call:
        """Return the same call with another hidden state."""
        old = self.hidden

        def swap(value: Any) -> Any:
            return hidden if value is old else value

        return Call(tuple(map(swap, self.args)), {name: swap(value) for name, value in self.kwargs.items()})

    def without_hidden(self) -> Call:
        """Return the same call with an empty hidden state, so that the real one can be freed."""
        return self.with_hidden(torch.empty(0))

    def rest(self) -> list[Any]:
        """Return all arguments except the hidden state, in a comparable order."""
        values = [*self.args, *(self.kwargs[name] for name in sorted(self.kwargs))]
        return [value for value in values if value is not self.hidden]

    def equals(self, other: Call, *, by_value: bool = False) -> bool:
        """Whether another call has the same arguments except for the hidden state, see :func:`same`."""
        form, other_form = (len(self.args), sorted(self.kwargs)), (len(other.args), sorted(other.kwargs))
        return form == other_form and same(self.rest(), other.rest(), by_value=by_value)


def first_output(output: object) -> Tensor | None:
    """Return the hidden state of a block's output: the tensor, or the first item of a tuple."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


@dataclass
class _Passage:
    """The calls of the blocks in one forward pass.

    Attributes:
        order: names of the blocks in the order of the calls.
        rest: each block's arguments besides its hidden state.
        linked: whether each block read the previous block's output unchanged and did not write to it.
        latest: the hidden state seen last, and its version, which counts in-place writes.
    """

    order: list[str] = field(default_factory=list)
    rest: dict[str, list[Any]] = field(default_factory=dict)
    linked: bool = True
    latest: tuple[Tensor | None, int] = (None, 0)

    def enter(self, name: str, call: Call) -> None:
        """Record a call of block ``name``."""
        hidden = call.hidden
        if self.order:
            previous_output, version = self.latest
            self.linked &= hidden is previous_output and _version(hidden) == version
        self.order.append(name)
        self.rest[name] = call.rest()
        self.latest = hidden, _version(hidden)

    def leave(self, output: object) -> None:
        """Record what the block returned."""
        hidden, version = self.latest
        result = first_output(output)
        self.linked &= result is not None and _version(hidden) == version
        self.latest = result, _version(result)


def is_chain(blocks: Blocks, run: Run, batch: Any) -> tuple[bool, bool]:
    """Check whether ``blocks`` form a chain on ``batch``.

    The arguments besides the hidden state may differ from block to block, but must not depend on what earlier blocks
    compute. A second pass tests that: it disturbs the first block's output and compares the arguments.

    Returns:
        (whether the blocks form a chain, whether they all get the same other arguments).
    """
    passage = _watch(blocks, run, batch)
    arguments = list(passage.rest.values())
    if passage.order != list(blocks) or not passage.linked or not all(map(is_plain, arguments)):
        return False, False
    if all(same(arguments[0], other) for other in arguments[1:]):
        return True, True
    disturbed = _watch(blocks, run, batch, disturb=True)
    independent = all(same(disturbed.rest[name], rest, by_value=True) for name, rest in passage.rest.items())
    return independent, False


def mark_unchained(model: nn.Module, blocks: Blocks) -> None:
    """Mark in ``model`` that ``blocks`` are not a chain; the mark is copied with the model."""
    vars(model).setdefault(_UNCHAINED, set()).add(tuple(blocks))


def is_unchained(model: nn.Module, blocks: Blocks) -> bool:
    """Whether ``model`` has the mark that ``blocks`` are not a chain; without one nothing is known."""
    return tuple(blocks) in vars(model).get(_UNCHAINED, ())


def _watch(blocks: Blocks, run: Run, batch: Any, *, disturb: bool = False) -> _Passage:
    """Run ``batch`` through the model and record the blocks' calls.

    With ``disturb``, the first block returns other values than it computes.
    """
    passage = _Passage()
    first = next(iter(blocks.values()))

    def leave(block: nn.Module, args: Any, output: Any) -> Any:
        if disturb and block is first:
            # Any change of the values would do; an affine one keeps their scale, so that nothing overflows.
            other = 1.5 * first_output(output) + 1  # type: ignore[operator]
            output = other if isinstance(output, Tensor) else type(output)((other, *output[1:]))
        passage.leave(output)
        return output

    handles = []
    for name, block in blocks.items():
        enter = lambda _, args, kwargs, name=name: passage.enter(name, Call(args, kwargs))  # noqa: E731
        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(block.register_forward_hook(leave))
    try:
        run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return passage


def capture_calls(blocks: Blocks, run: Run, batches: Iterable[Any], *, every_block: bool) -> list[list[Call]]:
    """Capture the blocks' calls for each batch.

    Only the first block's hidden state is kept: the walk computes the others.

    Args:
        blocks: a chain, see :func:`is_chain`.
        run: runs the whole model on one batch.
        batches: the calibration batches.
        every_block: capture every block's arguments, for blocks with different ones. If False, only the first block's
            call is captured and the forward pass stops there.

    Returns:
        The calls of each batch, in the order of the blocks.
    """
    captured: list[list[Call]] = []
    first = next(iter(blocks.values()))

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(args, kwargs)
        captured[-1].append(call if block is first else call.without_hidden())
        if not every_block:
            raise StopForward

    watched = list(blocks.values()) if every_block else [first]
    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in watched]
    try:
        for batch in batches:
            captured.append([])
            with suppress(StopForward):
                run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return captured


def same(a: Any, b: Any, *, by_value: bool = False) -> bool:
    """Whether two arguments are the same; tensors must be the same object, or with ``by_value`` hold equal values."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return by_value and (a.shape, a.dtype) == (b.shape, b.dtype) and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key], by_value=by_value) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y, by_value=by_value) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def is_plain(value: Any) -> bool:
    """Whether ``value`` is plain data. Other objects, such as a cache, may remember a call, which rules out replay."""
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str | torch.dtype | torch.device)


def _version(tensor: Tensor | None) -> int:
    """How often a tensor was written to in place; tensors of inference mode do not count it."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version
