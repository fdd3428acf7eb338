"""The calibration losses of a model without one more of its parts, for every part; common prefixes are run once.

The model's own forward pass computes every loss (embedding, masks, head, the module's training loss). What is to be
left out gets another ``forward`` for a while: the blocks before a candidate pass their input on, and the candidate's
block is given the hidden state that the real ones made of the batch.
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
    """What a module was seen to return.

    Attributes:
        outputs: 0 for a tensor alone, n for a tuple of n.
        keeps_shape: its hidden state has the shape of its input.
        bare: nothing but None comes with the hidden state.
    """

    outputs: int
    keeps_shape: bool
    bare: bool


def observe_outputs(modules: dict[str, nn.Module], walk: Walk) -> dict[str, Output]:
    """What each of ``modules`` returns on the walk's probe; without those that it does not reach."""
    seen: dict[str, Output] = {}

    def note(name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entered, left = Call(args, kwargs).hidden, first_output(output)
            if entered is not None and left is not None:
                rest = output[1:] if isinstance(output, tuple | list) else ()
                size = 1 + len(rest) if isinstance(output, tuple | list) else 0
                seen[name] = Output(size, entered.shape == left.shape, all(value is None for value in rest))

        return leave

    handles = [m.register_forward_hook(note(name), with_kwargs=True) for name, m in modules.items()]
    try:
        loss_of(walk, walk.probe)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def loss_of(walk: Walk, batch: Any, position: int = -1) -> Tensor:
    """The loss of one batch; what is drawn at random is the same for every candidate."""
    assert walk.loss is not None
    seed_from(run_seed(), position)
    return walk.loss(batch)


def pass_through(outputs: int) -> Callable[..., Any]:
    """A ``forward`` that gives back the hidden state that it is given, in the form of the block's own output."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = Call(args, kwargs).hidden
        assert hidden is not None
        return pack_output(hidden, outputs)

    return forward


@dataclass(frozen=True)
class Part:
    """A part that may go.

    Attributes:
        block: the position of its block.
        forwards: what takes it out: another ``forward`` for some modules.
    """

    block: int
    forwards: Forwards


@dataclass
class RemovalLosses:
    """Losses for :func:`~pqqp_lightning.algorithms.sleb.remove_greedily`; made and used inside ``calibrating()``.

    One hidden state is kept at a time: batch by batch, at the input of the block whose candidates are tried.

    Attributes:
        walk: with the blocks and the batches.
        parts: the candidates, in the order of their blocks.
        outputs: what each block returns, in order: see :attr:`Output.outputs`.
        title: what the progress bar says.
        progress: whether to show it.
        shared: whether candidates share their prefixes: the blocks form a chain, and nothing after it reads what
            passes between them. Observed on the probe.
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

    def __call__(self, removed: list[int], left: list[int]) -> list[float]:
        """The mean loss over the batches of all ranks, for each of ``left``, when it goes after ``removed``."""
        batches = self.walk.batches
        title = f"{self.title}, round {len(removed) + 1}"
        bar = tqdm(total=len(left) * len(batches), desc=title, unit="loss", disable=not self.progress, leave=False)
        totals = torch.zeros(len(left) + 1, dtype=torch.float64)
        without = {module: forward for i in removed for module, forward in self.parts[i].forwards.items()}
        with bar, other_forwards(without):
            for position in range(len(batches)):
                for index, loss in enumerate(self._of_batch(position, left)):
                    totals[index] += loss.double().cpu()
                    bar.update()
                totals[-1] += 1
        summed = sum_over_ranks(_where_ranks_talk(totals, self.walk.model)).cpu()
        return (summed[:-1] / summed[-1]).tolist()

    def _of_batch(self, position: int, left: list[int]) -> Iterator[Tensor]:
        reached, hidden = 0, None
        for part in (self.parts[i] for i in left):
            if self.shared and part.block > reached:
                hidden, reached = self._carry(position, reached, hidden, part.block), part.block
            with self._starting_at(reached, hidden), other_forwards(part.forwards):
                yield loss_of(self.walk, self.walk.batches[position], position)

    def _carry(self, position: int, start: int, hidden: Tensor | None, stop: int) -> Tensor:
        """The hidden state at the input of block ``stop``, from that at the input of block ``start``."""
        batch = self.walk.probe if position < 0 else self.walk.batches[position]
        found: list[Tensor | None] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(Call(args, kwargs).hidden)
            raise StopForward

        with self._starting_at(start, hidden):
            handle = self._blocks[stop].register_forward_pre_hook(enter, with_kwargs=True)
            try:
                loss_of(self.walk, batch, position)
            except StopForward:
                pass
            finally:
                handle.remove()
        assert found
        assert found[0] is not None
        return found[0]

    @contextmanager
    def _starting_at(self, start: int, hidden: Tensor | None) -> Iterator[None]:
        """Block ``start`` reads ``hidden``, and the blocks before it compute nothing; as usual if it is None."""
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
        """Whether the loss of the probe, carried to the last block and finished from there, is that of one pass."""
        probe, last = self.walk.probe, len(self._blocks) - 1
        if not is_chain(self.walk.blocks, lambda batch: loss_of(self.walk, batch), probe)[0]:
            return False
        whole, hidden = loss_of(self.walk, probe), self._carry(-1, 0, None, last)
        with self._starting_at(last, hidden):
            resumed = loss_of(self.walk, probe)
        return bool(torch.isclose(whole, resumed, rtol=1e-5, equal_nan=True))


@contextmanager
def other_forwards(forwards: Forwards) -> Iterator[None]:
    """Inside, modules have another ``forward``, without the transforms that belong to their own one."""
    with ExitStack() as stack:
        for module, forward in forwards.items():
            own = {"forward": module.__dict__["forward"]} if "forward" in module.__dict__ else {}
            module.__dict__["forward"] = forward
            stack.enter_context(without_transforms(module))
            stack.callback(_put_back, module, own)
        yield


def _put_back(module: nn.Module, own: dict[str, Any]) -> None:
    del module.__dict__["forward"]
    module.__dict__.update(own)


def _where_ranks_talk(totals: Tensor, model: nn.Module) -> Tensor:
    """On the model's device in a distributed run, where the backend may need it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return totals
    return totals.to(next(model.parameters()).device)
