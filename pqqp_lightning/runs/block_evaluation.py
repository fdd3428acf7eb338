"""Evaluates a model block by block: all samples go through the first block, then through the second, and so on.

Lightning's own validation runs twice, with stand-ins for the blocks that cost nothing. The first run records with which
arguments each block is called; its metrics and logs are dropped. When the second run reaches the first block, all
recorded hidden states go through the real blocks, one block after another. From then on, the stand-in of the last block
returns the results. Each block's weights are thus needed once, and any ``validation_step`` works, with any callbacks:
what it computes before and after the blocks is its own. The metrics are those of a plain validation, bit for bit where
the device computes the same twice.

This needs blocks that form a chain: each reads the output of the block before, and nothing else depends on what blocks
between the first and the last return. Another model is evaluated plainly.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from tqdm.auto import tqdm

from pqqp_lightning.calibration.chain import Call, is_plain
from pqqp_lightning.calibration.hidden_states import HiddenStates
from pqqp_lightning.checkpoint.nested import tensors_in
from pqqp_lightning.metrics.samples import without_updates
from pqqp_lightning.network.blocks import Blocks, model_blocks, pack_output
from pqqp_lightning.network.offload import Offload, offload_of
from pqqp_lightning.runs.early_stop import WatchSamples, stoppable
from pqqp_lightning.seeding import keep_random_state

logger = logging.getLogger(__name__)

ROUNDS = (1 / 8, 1 / 4, 1)
"""Shares of the forward passes after which all blocks have run, if the evaluation may be stopped early."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""The attributes of a block that hold its hooks, which shall see the real forward passes only."""


class Evaluate(Protocol):
    """Runs Lightning's validation or test, and returns the metrics of each loader."""

    def __call__(self, *, verbose: bool) -> Any: ...


class NotInTurn(Exception):
    """The blocks of a model cannot run on all samples one after another; says why."""


def evaluate_by_blocks(trainer: Trainer, module: LightningModule, evaluate: Evaluate, *, verbose: bool = False) -> Any:
    """Call ``evaluate`` so that each block of ``module`` runs on all samples before the next one does.

    Args:
        trainer: the one that ``evaluate`` uses.
        module: the model.
        evaluate: runs Lightning's validation or test.
        verbose: whether Lightning prints the metrics.

    Returns:
        What ``evaluate`` returns.
    """
    blocks = model_blocks(module)
    if "" in blocks:  # a whole model without blocks
        return evaluate(verbose=verbose)
    shows_progress = trainer.progress_bar_callback is not None and trainer.is_global_zero
    may_stop = any(isinstance(callback, WatchSamples) for callback in trainer.callbacks)
    in_turn = _BlocksInTurn(blocks, offload_of(module), ROUNDS if may_stop else (1,), progress=shows_progress)
    try:
        with stoppable(module, Exception), keep_random_state(), _unnoticed(trainer, module), in_turn.recording(module):
            evaluate(verbose=False)
        with stoppable(module, NotInTurn), _without_bar(trainer), in_turn.replaying():
            return evaluate(verbose=verbose)
    except NotInTurn as error:
        logger.info("evaluated without taking the blocks in turn: %s", error)
    return evaluate(verbose=verbose)


class _BlocksInTurn:
    """The stand-ins of a model's blocks, and what they recorded.

    Args:
        blocks: of the model, in the order of the forward pass.
        offload: of the model.
        rounds: shares of the forward passes, the last of which is 1: the blocks run in turn on those up to each.
        progress: whether to show a progress bar.
    """

    def __init__(self, blocks: Blocks, offload: Offload, rounds: Sequence[float], *, progress: bool) -> None:
        self._blocks = list(blocks.values())
        self._own = [{name: vars(block).get(name) for name in ("forward", *HOOKS)} for block in self._blocks]
        self._offload = offload
        self._states = HiddenStates(offload)  # one for every forward pass of the model
        self._rounds = rounds
        self._progress = progress
        self._calls: list[list[Call]] = []  # of each forward pass: the call of each block, without the hidden state
        self._latest: Call | None = None  # the same of the latest call, as it came
        self._inputs: list[Tensor] = []  # a summary of what each forward pass gave the first block
        self._outputs: dict[type[nn.Module], int] = {}  # what a class of blocks returns, as `pack_output` takes it
        self._between: Tensor | None = None  # stands for the hidden state between two blocks
        self._position = 0  # of the block that is called next
        self._replayed = 0  # forward passes that the second run has begun
        self._done = 0  # forward passes that all blocks have computed

    @contextmanager
    def recording(self, module: nn.Module) -> Iterator[None]:
        """Inside, the blocks of ``module`` record how they are called, and pass their hidden state on.

        Raises:
            NotInTurn: the blocks are no chain, or the steps fail on what the stand-ins return.
        """
        try:
            with self._stand_ins(self._record), self._idle_head(module):
                yield
        except NotInTurn:
            raise
        except Exception as error:  # a plain evaluation follows, and shows an error of the user's own
            raise NotInTurn(f"{type(error).__name__}: {error}") from error
        if self._position:
            raise NotInTurn("a forward pass ends between two blocks")

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Inside, the last block returns for each forward pass what the real blocks compute for it.

        Raises:
            NotInTurn: the forward passes are not those that were recorded.
        """
        with self._stand_ins(self._replay):
            yield

    @contextmanager
    def _stand_ins(self, stand_in: Callable[[int, Call], Any]) -> Iterator[None]:
        with ExitStack() as stack:
            for position, block in enumerate(self._blocks):

                def forward(*args: Any, _position: int = position, **kwargs: Any) -> Any:
                    return stand_in(_position, Call(args, kwargs))

                attributes: dict[str, Any] = {name: {} for name in HOOKS}
                stack.enter_context(_attributes(block, attributes | {"forward": forward}))
            yield

    @contextmanager
    def _idle_head(self, module: nn.Module) -> Iterator[None]:
        """Inside, linear layers that run after the blocks only return zeros: nothing depends on what a head computes.

        The head of SmolLM2-135M has a fifth of its weights.
        """
        inside = {part for block in self._blocks for part in block.modules()}
        with ExitStack() as stack:
            for layer in module.modules():
                if type(layer) is nn.Linear and layer not in inside:
                    stack.enter_context(_attributes(layer, {"forward": self._idle_forward(layer)}))
            yield

    def _idle_forward(self, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        real = layer.forward
        needed = False

        def forward(inputs: Tensor) -> Tensor:
            nonlocal needed
            needed |= not self._calls or self._position > 0
            return real(inputs) if needed else inputs.new_zeros(*inputs.shape[:-1], layer.out_features)

        return forward

    def _record(self, position: int, call: Call) -> Any:
        hidden = call.hidden
        rest = call.rest()
        if position != self._position:
            raise NotInTurn("the blocks are not called once each, in the order of their definition")
        if hidden is None or (position and hidden is not self._between):
            raise NotInTurn("a block reads something else than the output of the block before")
        if not is_plain(rest) or any(isinstance(tensor, _BetweenBlocks) for tensor in tensors_in(rest)):
            raise NotInTurn("a block gets a cache, or the output of another block than the one before")
        kind = type(self._blocks[position])
        if kind not in self._outputs:
            with self._real(position) as block:
                self._outputs[kind] = _try_block(block, call.with_hidden(self._states[-1]) if position else call)
        if not position:
            self._states.append(hidden)
            self._inputs.append(_summary(hidden))
            self._calls.append([])
            self._between = hidden.as_subclass(_BetweenBlocks)
        self._calls[-1].append(self._shared(position, call.without_hidden()))
        self._position = (position + 1) % len(self._blocks)
        assert self._between is not None
        returned = self._between if self._position else self._between.as_subclass(Tensor)
        return pack_output(returned, self._outputs[kind])

    def _shared(self, position: int, call: Call) -> Call:
        """An earlier call with equal arguments in place of ``call``, since masks and positions often repeat."""
        before, self._latest = self._latest, call
        if position and before is not None and call.equals(before):
            return self._calls[-1][-1]
        if len(self._calls) > 1 and call.equals(self._calls[-2][position], by_value=True):
            return self._calls[-2][position]
        return call

    def _replay(self, position: int, call: Call) -> Any:
        hidden = call.hidden
        if not position:
            self._require_recorded(hidden)
            if self._replayed == self._done:
                self._run_blocks()
            self._replayed += 1
        if position + 1 == len(self._blocks):
            hidden = self._states[self._replayed - 1]
            self._states.forget(self._replayed - 1)
        assert hidden is not None
        return pack_output(hidden, self._outputs[type(self._blocks[position])])

    def _require_recorded(self, hidden: Tensor | None) -> None:
        """Raise if the forward pass that begins with ``hidden`` was not recorded.

        Raises:
            NotInTurn: the loader draws other samples, or a step depends on what the model computed before.
        """
        known = self._inputs[self._replayed] if self._replayed < len(self._inputs) else None
        if hidden is None or known is None or not _is_alike(_summary(hidden), known):
            raise NotInTurn("the forward passes of a second run differ from those of the first")

    def _run_blocks(self) -> None:
        """Send the hidden states of the next round through all blocks."""
        ends = [math.ceil(share * len(self._calls)) for share in self._rounds]
        end = next(end for end in ends if end > self._done)
        bar = tqdm(self._blocks, desc="evaluation", unit="block", disable=not self._progress, leave=False)
        following = [*self._blocks[1:], None]
        for position, block in enumerate(bar):
            with self._real(position), self._offload.turn(block, following[position], read_only=True):
                for i in range(self._done, end):
                    call = self._calls[i][position].with_hidden(self._states[i])
                    output = block(*call.args, **call.kwargs)
                    if _outputs_in(output) != self._outputs[type(block)]:
                        raise NotInTurn("two blocks of one class return something else")
                    self._states[i] = output if isinstance(output, Tensor) else output[0]
            torch.clear_autocast_cache()  # it would keep the converted weights of all blocks
        self._done = end

    @contextmanager
    def _real(self, position: int) -> Iterator[nn.Module]:
        """Inside, the block at ``position`` is itself, and no stand-in."""
        with _attributes(self._blocks[position], self._own[position]):
            yield self._blocks[position]


class _BetweenBlocks(Tensor):
    """A hidden state between two blocks, which a block's stand-in may pass on and nobody may compute with."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("size", "dim", "stride", "numel", "is_floating_point", "as_subclass", "__len__", "__get__"):
            result = super().__torch_function__(func, types, args, kwargs or {})
            if name == "as_subclass" or not isinstance(result, Tensor):  # `__get__` also returns views, such as `T`
                return result
        raise NotInTurn(f"the output of a block is used between two blocks ({name})")


def _try_block(block: nn.Module, call: Call) -> int:
    """What ``block`` returns, as :func:`~pqqp_lightning.network.blocks.pack_output` takes it.

    Raises:
        NotInTurn: it returns more than a hidden state, or writes to the one that it reads.
    """
    hidden = call.hidden
    assert hidden is not None
    before = hidden.clone()
    outputs = _outputs_in(block(*call.args, **call.kwargs))
    if not torch.equal(before.nan_to_num(), hidden.nan_to_num()):
        raise NotInTurn("a block writes to its input")
    if outputs is None:
        raise NotInTurn("a block returns more than its hidden state")
    return outputs


def _outputs_in(output: object) -> int | None:
    """0 for a tensor, n for a tuple of a tensor and n - 1 times None; None for anything else."""
    if isinstance(output, Tensor):
        return 0
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return len(output) if all(item is None for item in output[1:]) else None
    return None


def _summary(hidden: Tensor) -> Tensor:
    """The mean size of the entries along the last dimension, by which a hidden state is known again."""
    return hidden.detach().float().abs().mean(-1)


def _is_alike(summary: Tensor, known: Tensor) -> bool:
    """Whether two summaries are equal up to what a device may round differently when it computes again."""
    return summary.shape == known.shape and torch.allclose(summary, known, rtol=1e-3, atol=0, equal_nan=True)


@contextmanager
def _attributes(module: nn.Module, attributes: Mapping[str, Any]) -> Iterator[None]:
    """Inside, ``module`` has these attributes of its own; None for one that it leaves to its class."""
    own = vars(module)
    before = {name: own.get(name) for name in attributes}
    _set_attributes(own, attributes)
    try:
        yield
    finally:
        _set_attributes(own, before)


def _set_attributes(own: dict[str, Any], attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        if value is None:
            own.pop(name, None)
        else:
            own[name] = value


@contextmanager
def _unnoticed(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Inside, an evaluation has no callbacks, logs and counts nothing."""
    callbacks, loggers = trainer.callbacks, trainer.loggers
    trainer.callbacks = []
    trainer.loggers = [DummyLogger()]
    try:
        with without_updates(module), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the second evaluation repeats them
            yield
    finally:
        trainer.callbacks = callbacks
        trainer.loggers = loggers


@contextmanager
def _without_bar(trainer: Trainer) -> Iterator[None]:
    """Inside, Lightning shows no progress bar: almost all of the work is behind the bar of the blocks."""
    callbacks = trainer.callbacks
    trainer.callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    try:
        yield
    finally:
        trainer.callbacks = callbacks
