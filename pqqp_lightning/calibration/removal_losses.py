"""Calibration losses of a model without each candidate part; candidates share the blocks before them.

The model's own forward pass computes every loss (embedding, masks, head, the module's training loss). To leave modules
out, their ``forward`` is replaced for the time of the pass: the blocks before a candidate return their input, and the
candidate's block reads the hidden state that the real blocks computed earlier for this batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pqqp_lightning.calibration.chain import Call, first_output, is_chain
from pqqp_lightning.calibration.collect import StopForward
from pqqp_lightning.calibration.statistics import sum_over_ranks
from pqqp_lightning.calibration.walk import Walk
from pqqp_lightning.network.activation_hooks import without_transforms
from pqqp_lightning.network.blocks import pack_output
from pqqp_lightning.seeding import run_seed, seed_from

Forwards = dict[nn.Module, Callable[..., Any]]


@dataclass(frozen=True)
class Output:
    """The form of a module's output.

    Attributes:
        outputs: 0 for a tensor, n for a tuple of n items.
        keeps_shape: whether its hidden state has the shape of its input.
        bare: whether all other items of the tuple are None.
    """

    outputs: int
    keeps_shape: bool
    bare: bool


def observe_outputs(modules: dict[str, nn.Module], walk: Walk) -> dict[str, Output]:
    """Run the walk's probe and return the form of each module's output; without modules that did not run."""
    outputs: dict[str, Output] = {}

    def observe(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden_in = Call(args, kwargs).hidden
            hidden_out = first_output(output)
            if hidden_in is None or hidden_out is None:
                return
            same_shape = hidden_in.shape == hidden_out.shape
            if isinstance(output, tuple | list):
                bare = all(value is None for value in output[1:])
                outputs[name] = Output(len(output), same_shape, bare)
            else:
                outputs[name] = Output(0, same_shape, bare=True)

        return hook

    handles = [m.register_forward_hook(observe(name), with_kwargs=True) for name, m in modules.items()]
    try:
        loss_of(walk, walk.probe)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def loss_of(walk: Walk, batch: Any, position: int = -1) -> Tensor:
    """Compute the loss of one batch. The seed depends on its position only, so all candidates see the same dropout."""
    assert walk.loss is not None
    seed_from(run_seed(), position)
    return walk.loss(batch)


def pass_through(outputs: int) -> Callable[..., Any]:
    """Return a ``forward`` that returns its hidden state unchanged, in the form of the block's own output."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = Call(args, kwargs).hidden
        assert hidden is not None
        return pack_output(hidden, outputs)

    return forward


@dataclass(frozen=True)
class Part:
    """A candidate for removal.

    Attributes:
        block: the position of its block.
        forwards: the replacements of ``forward`` that take it out of the model.
    """

    block: int
    forwards: Forwards


@dataclass
class RemovalLosses:
    """Losses for :func:`~pqqp_lightning.algorithms.sleb.remove_greedily`; create and use it inside ``calibrating()``.

    Batches are processed one after another, so that only one hidden state is kept at a time: the input of the block
    whose candidates are tried.

    Attributes:
        walk: with the blocks and the batches.
        parts: the candidates, in the order of their blocks.
        outputs: the form of each block's output, in order: see :attr:`Output.outputs`.
        title: text of the progress bar.
        progress: whether to show the progress bar.
        shared: whether candidates share the blocks before them. That needs blocks that form a chain, and no later
            module that reads what passes between them; both are tested on the probe.
    """

    walk: Walk
    parts: Sequence[Part]
    outputs: Sequence[int]
    title: str = ""
    progress: bool = True
    shared: bool = field(init=False)

    def __post_init__(self) -> None:
        self._blocks = list(self.walk.blocks.values())
        self.shared = self._shares_prefixes()

    def __call__(self, removed: list[int], candidates: list[int]) -> list[float]:
        """Compute the mean loss over the batches of all ranks without ``removed`` and each one of ``candidates``."""
        batches = self.walk.batches
        title = f"{self.title}, round {len(removed) + 1}"
        count = len(candidates) * len(batches)
        bar = tqdm(total=count, desc=title, unit="loss", disable=not self.progress, leave=False)
        totals = torch.zeros(len(candidates) + 1, dtype=torch.float64)  # losses, then the number of batches
        without_removed: Forwards = {}
        for i in removed:
            without_removed.update(self.parts[i].forwards)
        with bar, other_forwards(without_removed):
            for position in range(len(batches)):
                for index, loss in enumerate(self._losses_of_batch(position, candidates)):
                    totals[index] += loss.double().cpu()
                    bar.update()
                totals[-1] += 1
        summed = sum_over_ranks(_on_communication_device(totals, self.walk.model)).cpu()
        return (summed[:-1] / summed[-1]).tolist()

    def _losses_of_batch(self, position: int, candidates: list[int]) -> Iterator[Tensor]:
        """The loss of one batch for each candidate; the hidden state moves forward with the candidates' blocks."""
        reached = 0
        hidden = None
        for i in candidates:
            part = self.parts[i]
            if self.shared and part.block > reached:
                hidden = self._carry(position, reached, hidden, part.block)
                reached = part.block
            with self._starting_at(reached, hidden), other_forwards(part.forwards):
                yield loss_of(self.walk, self.walk.batches[position], position)

    def _carry(self, position: int, start: int, hidden: Tensor | None, stop: int) -> Tensor:
        """Compute the hidden state at the input of block ``stop`` from that at the input of block ``start``."""
        batch = self.walk.probe if position < 0 else self.walk.batches[position]
        captured: list[Tensor | None] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured.append(Call(args, kwargs).hidden)
            raise StopForward

        with self._starting_at(start, hidden):
            handle = self._blocks[stop].register_forward_pre_hook(enter, with_kwargs=True)
            try:
                loss_of(self.walk, batch, position)
            except StopForward:
                pass
            finally:
                handle.remove()
        assert captured
        assert captured[0] is not None
        return captured[0]

    @contextmanager
    def _starting_at(self, start: int, hidden: Tensor | None) -> Iterator[None]:
        """Let block ``start`` read ``hidden`` and skip the blocks before it; change nothing if ``hidden`` is None."""
        if hidden is None:
            yield
            return

        def swap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            call = Call(args, kwargs).with_hidden(hidden)
            return call.args, call.kwargs

        before = zip(self._blocks[:start], self.outputs, strict=False)
        with other_forwards({block: pass_through(outputs) for block, outputs in before}):
            handle = self._blocks[start].register_forward_pre_hook(swap, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()

    def _shares_prefixes(self) -> bool:
        """Whether a pass that resumes at the last block gives the same loss on the probe as a whole pass."""
        probe = self.walk.probe
        last = len(self._blocks) - 1
        chained, _ = is_chain(self.walk.blocks, lambda batch: loss_of(self.walk, batch), probe)
        if not chained:
            return False
        whole = loss_of(self.walk, probe)
        hidden = self._carry(-1, 0, None, last)
        with self._starting_at(last, hidden):
            resumed = loss_of(self.walk, probe)
        # Not exactly equal: nothing guarantees that a kernel computes the same bits in both passes.
        return bool(torch.isclose(whole, resumed, rtol=1e-5, equal_nan=True))


@contextmanager
def other_forwards(forwards: Forwards) -> Iterator[None]:
    """Inside, modules have another ``forward``, without the transforms that belong to their own one."""
    with ExitStack() as stack:
        for module, forward in forwards.items():
            # A module may have an instance attribute ``forward`` of its own already; usually the class has it.
            instance_forward = {"forward": module.__dict__["forward"]} if "forward" in module.__dict__ else {}
            module.__dict__["forward"] = forward
            stack.enter_context(without_transforms(module))
            stack.callback(_restore_forward, module, instance_forward)
        yield


def _restore_forward(module: nn.Module, instance_forward: dict[str, Any]) -> None:
    del module.__dict__["forward"]
    module.__dict__.update(instance_forward)


def _on_communication_device(totals: Tensor, model: nn.Module) -> Tensor:
    """``totals`` on the model's device in a distributed run, since NCCL reduces tensors on the GPU only."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return totals
    return totals.to(next(model.parameters()).device)
