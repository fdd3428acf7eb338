"""How a network's blocks follow one another, learned from one forward pass.

Replaying a block alone is right only if each block's input is the previous block's output, and nothing between them
changes it. That is observed, not assumed: where it does not hold, the whole model is one block.
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


@dataclass
class Call:
    """The arguments of one call of a block; the first tensor is the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor | None:
        """The hidden state that the block reads, if it gets a tensor at all."""
        return next((v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)), None)

    def with_hidden(self, hidden: Tensor) -> Call:
        """The same call with another hidden state."""
        old = self.hidden
        swap = lambda v: hidden if v is old else v  # noqa: E731
        return Call(tuple(map(swap, self.args)), {k: swap(v) for k, v in self.kwargs.items()})

    def without_hidden(self) -> Call:
        """The same call with an empty hidden state, so that the real one can be freed."""
        return self.with_hidden(torch.empty(0))

    def rest(self) -> list[Any]:
        """Everything but the hidden state, in a comparable order."""
        return [v for v in (*self.args, *(self.kwargs[k] for k in sorted(self.kwargs))) if v is not self.hidden]


def first_output(output: object) -> Tensor | None:
    """The hidden state in what a block returns: the tensor itself, or the first of a tuple."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


@dataclass
class _Passage:
    """One forward pass as the blocks saw it.

    Attributes:
        order: names of the blocks as they were called.
        rest: what each block got besides its hidden state.
        linked: each block got the previous one's output, as it was, and left it so.
        latest: the latest block's output, and how often it had been written to.
    """

    order: list[str] = field(default_factory=list)
    rest: dict[str, list[Any]] = field(default_factory=dict)
    linked: bool = True
    latest: tuple[Tensor | None, int] = (None, 0)

    def enter(self, name: str, call: Call) -> None:
        """Note a call of block ``name``."""
        hidden = call.hidden
        if self.order:
            self.linked &= hidden is self.latest[0] and _version(hidden) == self.latest[1]
        self.order.append(name)
        self.rest[name] = call.rest()
        self.latest = hidden, _version(hidden)

    def leave(self, output: object) -> None:
        """Note what it returned."""
        hidden, version = self.latest
        result = first_output(output)
        self.linked &= result is not None and _version(hidden) == version
        self.latest = result, _version(result)


def is_chain(blocks: Blocks, run: Run, batch: Any) -> tuple[bool, bool]:
    """Whether ``blocks`` form a chain on ``batch``, and whether they all get the same other arguments.

    Other arguments may differ from block to block, but must not depend on what earlier blocks compute: that is seen
    by disturbing the first block's output.
    """
    seen = _watch(blocks, run, batch)
    arguments = list(seen.rest.values())
    if seen.order != list(blocks) or not seen.linked or not all(map(_is_plain, arguments)):
        return False, False
    if all(_same(arguments[0], other) for other in arguments[1:]):
        return True, True
    disturbed = _watch(blocks, run, batch, disturb=True)
    return all(_same(disturbed.rest[name], rest, by_value=True) for name, rest in seen.rest.items()), False


def _watch(blocks: Blocks, run: Run, batch: Any, *, disturb: bool = False) -> _Passage:
    """Run ``batch`` through the model; with ``disturb``, the first block gives out something else than it computes."""
    passage, first = _Passage(), next(iter(blocks.values()))

    def leave(block: nn.Module, args: Any, output: Any) -> Any:
        if disturb and block is first:
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
    """The calls of the blocks for each batch: of the first block alone, or of every block where they differ.

    With the first block alone the forward pass stops there. Hidden states are kept of the first block only.
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


def _same(a: Any, b: Any, *, by_value: bool = False) -> bool:
    """Whether two arguments are one and the same; with ``by_value``, tensors may be equal copies."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return by_value and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key], by_value=by_value) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y, by_value=by_value) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _is_plain(value: Any) -> bool:
    """Whether ``value`` cannot remember a call, as a cache does: then a block can be called again with it."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str | torch.dtype | torch.device)


def _version(tensor: Tensor | None) -> int:
    """How often a tensor was written to in place."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version
