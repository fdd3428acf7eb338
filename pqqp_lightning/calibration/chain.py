"""How a network's blocks follow one another, learned from one forward pass.

Replaying a block alone is right only if each block's input is the previous block's output, and nothing between them
changes it. That is observed, not assumed: where it does not hold, the whole model is one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pqqp_lightning.calibration.collect import StopForward
from pqqp_lightning.modules.blocks import Blocks

Run = Callable[[Any], object]
"""Runs the whole model on one calibration batch."""


@dataclass
class Call:
    """The arguments of one call of a block; the first tensor is the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden state that the block reads."""
        return next(v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor))

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


def is_chain(blocks: Blocks, run: Run, batch: Any) -> tuple[bool, bool]:
    """Whether ``blocks`` form a chain on ``batch``, and whether they all get the same other arguments."""
    calls: dict[str, list[Call]] = {name: [] for name in blocks}
    outputs: dict[str, Tensor | None] = {}
    order: list[str] = []

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[name].append(Call(args, kwargs))
        order.append(name)

    def leave(name: str, output: object) -> None:
        outputs[name] = first_output(output)

    handles = []
    for name, block in blocks.items():
        enter_hook = lambda _, args, kwargs, name=name: enter(name, args, kwargs)  # noqa: E731
        handles.append(block.register_forward_pre_hook(enter_hook, with_kwargs=True))
        handles.append(block.register_forward_hook(lambda _m, _a, output, name=name: leave(name, output)))
    try:
        run(batch)
    finally:
        for handle in handles:
            handle.remove()
    names = list(blocks)
    if order != names:
        return False, False
    first = [calls[name][0] for name in names]
    chained = all(outputs[a] is call.hidden for a, call in zip(names, first[1:], strict=False))
    same = all(_same(first[0].rest(), call.rest()) for call in first[1:])
    return chained, same


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


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x is y or _equal(x, y) for x, y in zip(a, b, strict=True))


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, tuple | list) and isinstance(y, tuple | list):
        return _same(list(x), list(y))
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        return False
    return type(x) is type(y) and bool(x == y)
