"""The walk over the blocks: collect statistics, let the stage compress, feed the compressed outputs to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice, repeat
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from pqqp_lightning.calibration.chain import Call, Run, capture_calls, first_output, is_chain
from pqqp_lightning.calibration.collect import Collector, Reading, check_reading
from pqqp_lightning.calibration.functional import without_fast_paths
from pqqp_lightning.calibration.hidden_states import HiddenStates
from pqqp_lightning.calibration.statistics import PairedHessian, Statistic
from pqqp_lightning.calibration.token_mask import TokenMask, token_masks
from pqqp_lightning.errors import Problem, RecipeError, shorten
from pqqp_lightning.network.blocks import Blocks, containing_block
from pqqp_lightning.network.layers import Layer
from pqqp_lightning.network.offload import offload_of
from pqqp_lightning.seeding import keep_random_state

Compress = Callable[[Reading], None]
Unreached = Callable[[dict[str, Layer]], None]
"""Called with the layers of a block that no calibration row reached, after the block's readings."""


class Kept(Protocol):
    """The finished blocks of a stage that a killed run left, and those of this run."""

    @property
    def waiting(self) -> int:
        """The number of finished blocks that can be restored next."""

    def restore(self, layers: Mapping[str, Layer]) -> bool:
        """Restore these layers of the next block; False if it is not finished, and then it is compressed and kept."""

    def keep(self, layers: Mapping[str, Layer]) -> None:
        """Keep the block that was not finished."""


Forward = Callable[[int], object]
"""Runs the calibration batch of that number, through the model or through one block."""


@dataclass
class BlockPass:
    """The forward pass of one block alone.

    Attributes:
        block: the block.
        calls: for each calibration batch, how the block is called, without its hidden state.
        hidden: for each calibration batch, the hidden state that the block reads.
        forward_context: entered around every forward pass (precision).
        within: entered around every forward pass with the block (dense weights).
        outputs: keeps what the block computed for each batch; None keeps nothing.
    """

    block: nn.Module
    calls: list[Call]
    hidden: Sequence[Tensor]
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext
    within: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
    outputs: dict[int, Tensor] | None = None

    def __call__(self, i: int, hidden: Tensor | None = None, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the hidden state that the block computes for batch ``i``.

        Args:
            i: number of the calibration batch.
            hidden: read this instead of ``self.hidden[i]``.
            tensors: parameters, by their names in the block, that take the place of the block's own.
        """
        call = self.calls[i].with_hidden(self.hidden[i] if hidden is None else hidden)
        with self.forward_context(), self.within(self.block):
            if tensors:
                output = first_output(functional_call(self.block, dict(tensors), call.args, call.kwargs))
            else:
                output = first_output(self.block(*call.args, **call.kwargs))
        assert output is not None
        if self.outputs is not None:
            self.outputs[i] = output
        return output


@dataclass
class Walk:
    """Calibrates a model block by block.

    Attributes:
        model: the network that holds ``blocks``.
        blocks: by name, in the order of the forward pass.
        batches: the calibration batches.
        probe: a batch of one sample, for observing how the blocks follow one another.
        run: runs the model on one batch.
        dense: inside its context, the weights in a module are those of the dense model.
        loss: computes the training loss of one batch, a scalar; the caller sets modes and gradients.
        evaluate: runs one batch as an evaluation does, where ``run`` computes less.
        forward_context: entered around every forward pass (precision).
        title: text of the progress bar.
        progress: whether to show the progress bar.
        notes: findings for the stage's record.
    """

    model: nn.Module
    blocks: Blocks
    batches: list[Any]
    probe: Any
    run: Run
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext
    title: str = ""
    progress: bool = True
    notes: list[str] = field(default_factory=list)
    loss: Callable[[Any], Tensor] | None = None
    evaluate: Run | None = None
    dense: Callable[[nn.Module], AbstractContextManager[Any]] | None = None
    _masks: list[TokenMask | None] | None = field(default=None, init=False)

    def over(
        self,
        layers: dict[str, Layer],
        kind: type[Statistic],
        compress: Compress,
        unreached: Unreached | None = None,
        kept: Kept | None = None,
    ) -> None:
        """Collect ``kind`` for each of ``layers`` and hand it to ``compress``, block after block.

        Args:
            layers: by name.
            kind: the statistic's class.
            compress: gets each reading. Some groups of a fused weight may have no row, see ``Statistic.counts``.
            unreached: gets the layers that no row reached; None refuses them.
            kept: has the blocks that need not be compressed again, and gets the others.

        Raises:
            RecipeError: a statistic is unusable, or no row reached a layer and ``unreached`` is None; the message
                names the layer.
        """
        with calibrating(self.model):
            chained = same = False
            if "" not in self.blocks:  # "" is a whole model without blocks
                chained, same = is_chain(self.blocks, self.forward, self.probe)
                if not chained:
                    self.notes.append("the blocks do not feed one another directly: calibrated as one block")
            inside = {name: layer for name, layer in layers.items() if chained and self.block_of(name) is not None}
            outside = {name: layer for name, layer in layers.items() if name not in inside}
            if inside:
                self._blocks_in_turn(inside, kind, compress, unreached, kept, every_block=not same)
            if outside and not self._is_restored(outside, kept):
                self._collect_outside(outside, kind, compress, unreached)
                if kept is not None:
                    kept.keep(outside)

    def masks(self) -> list[TokenMask | None]:
        """The positions of each batch that count, for every sum over positions. Call it in ``calibrating()``."""
        if self._masks is None:
            self._masks = token_masks(self.model, self.batches, self.probe, self.forward)
        return self._masks

    def masked_batches(self) -> Iterator[tuple[Any, TokenMask | None]]:
        """Each batch with the positions of it that count, behind a progress bar. Call it in ``calibrating()``."""
        with torch.no_grad():  # the consumer may want gradients, finding the positions needs none
            masks = self.masks()
        pairs = zip(self.batches, masks, strict=True)
        yield from tqdm(pairs, total=len(masks), desc=self.title, unit="batch", disable=not self.progress, leave=False)

    def first(self, samples: int) -> Walk:
        """A walk over the first batches only, as many as needed for this number of samples."""
        taken = []
        count = 0
        for batch in self.batches:
            if count >= samples:
                break
            taken.append(batch)
            count += samples_in(batch)
        return replace(self, batches=taken)

    @property
    def samples(self) -> int:
        """The number of samples in all batches."""
        return sum(map(samples_in, self.batches))

    def forward(self, batch: Any) -> object:
        """Run the model on one batch."""
        with self.forward_context():
            return self.run(batch)

    def block_of(self, layer: str) -> str | None:
        """The name of the block that the layer lies in or is, or None."""
        return containing_block(layer, self.blocks)

    def _collect_outside(
        self, layers: dict[str, Layer], kind: type[Statistic], compress: Compress, unreached: Unreached | None
    ) -> None:
        """Collect from whole forward passes; layers that these skip (a head), from whole evaluation steps."""

        def evaluate(index: int) -> None:
            assert self.evaluate is not None
            with self.forward_context():
                self.evaluate(self.batches[index])

        def again(missed: dict[str, Layer]) -> None:
            self._collect(missed, kind, compress, unreached, evaluate)

        rest = unreached if self.evaluate is None else again

        def dense(index: int) -> None:
            assert self.dense is not None
            with self.dense(self.model):
                self.forward(self.batches[index])

        pairs = self._pairs(kind)
        self._collect(layers, kind, compress, rest, lambda i: self.forward(self.batches[i]), dense if pairs else None)

    def _pairs(self, kind: type[Statistic]) -> bool:
        """Whether ``kind`` pairs inputs with those in the dense model, which must then be available."""
        return issubclass(kind, PairedHessian) and self.dense is not None

    def _blocks_in_turn(
        self,
        layers: dict[str, Layer],
        kind: type[Statistic],
        compress: Compress,
        unreached: Unreached | None,
        kept: Kept | None,
        *,
        every_block: bool,
    ) -> None:
        of_block: dict[str, dict[str, Layer]] = {name: {} for name in self.blocks}
        for name, layer in layers.items():
            block = self.block_of(name)
            if block is not None:
                of_block[block][name] = layer
        acted_on = [i for i, inside in enumerate(of_block.values()) if inside]
        last = acted_on[-1]  # later ones have nothing to compress
        waiting = min(kept.waiting, len(acted_on)) if kept is not None else 0
        first = acted_on[waiting - 1] + 1 if waiting else 0  # the first one that is not finished
        passes = islice(self.block_passes(every_block=every_block), last + 1)
        dense_passes: Iterator[tuple[str, BlockPass] | None] = repeat(None)
        if self._pairs(kind):
            dense_passes = iter(self.block_passes(every_block=every_block, dense=True))
        with tqdm(
            total=last + 1, initial=first, desc=self.title, unit="block", disable=not self.progress, leave=False
        ) as bar:
            for position, ((block, run_block), dense_pass) in enumerate(zip(passes, dense_passes, strict=False)):
                if of_block[block] and not self._is_restored(of_block[block], kept):
                    run_dense = dense_pass[1] if dense_pass is not None else None
                    self._collect(of_block[block], kind, compress, unreached, run_block, run_dense)
                    if kept is not None:
                        kept.keep(of_block[block])
                if position >= first:
                    bar.update()

    def _is_restored(self, layers: dict[str, Layer], kept: Kept | None) -> bool:
        """Whether a killed run finished these layers, which then are as it left them."""
        if kept is None:
            return False
        self.masks()  # while the block is as the killed run found it
        return kept.restore(layers)

    def block_passes(self, *, every_block: bool, dense: bool = False) -> Iterator[tuple[str, BlockPass]]:
        """Each block in turn, with the forward pass of that block alone. Call it in ``calibrating()``.

        The consumer changes the block before it asks for the next one, which gets the changed block's outputs.

        Args:
            every_block: whether each block gets arguments of its own besides the hidden states, see ``is_chain``.
            dense: run the blocks with the dense model's weights.
        """
        within = self.dense if dense and self.dense is not None else nullcontext
        offload = offload_of(self.model)
        hidden = HiddenStates(offload)  # each batch's input of the current block, replaced by its output
        calls: list[list[Call]] = []
        with within(self.model):
            captured = capture_calls(self.blocks, self.forward, self.batches, every_block=every_block)
        for batch_calls in captured:
            state = batch_calls[0].hidden
            assert state is not None  # is_chain has seen it
            hidden.append(state)
            calls.append([call.without_hidden() for call in batch_calls])  # else they keep the first states alive
        following = [*list(self.blocks.values())[1:], None]
        for position, (name, block) in enumerate(self.blocks.items()):
            own_calls = [batch_calls[position if every_block else 0] for batch_calls in calls]
            # a dense block does not change between its passes
            outputs: dict[int, Tensor] | None = {} if dense else None
            run_block = BlockPass(block, own_calls, hidden, self.forward_context, within, outputs)
            with offload.turn(block, following[position]):
                yield name, run_block
                if position + 1 < len(self.blocks):
                    for i in range(len(hidden)):
                        hidden[i] = outputs.pop(i) if outputs and i in outputs else run_block(i)

    def _collect(
        self,
        layers: dict[str, Layer],
        kind: type[Statistic],
        compress: Compress,
        unreached: Unreached | None,
        forward: Forward,
        forward_dense: Forward | None = None,
    ) -> None:
        collector = Collector(layers, kind)
        masks = self.masks()
        with collector.watching():
            for i, mask in enumerate(masks):
                if forward_dense is not None:
                    with collector.dense_pass(mask):
                        forward_dense(i)
                with collector.forward_pass(mask):
                    forward(i)
        missed = {name: layers[name] for name in collector.uncalled_on_all_ranks()}
        if collector.unmasked:
            what = "padded positions may count, since the inputs do not have the positions of the batch"
            self.notes.append(f"{shorten(collector.unmasked)}: {what}")
        for reading in collector.readings:
            reading.statistic.reduce()
            if int(reading.statistic.rows) == 0:
                missed.update(reading.layers)
                continue
            try:
                check_reading(reading)
                compress(reading)
            except ArithmeticError as error:
                text = f"{shorten(reading.layers)} cannot be calibrated: {error}"
                way_out = "Check the model and the calibration data, or add the layer to ignore."
                raise RecipeError(Problem(text=text, way_out=way_out)) from error
        if missed and unreached is None:
            way_out = "Use more calibration samples, or add them to ignore."
            raise RecipeError(Problem(text=f"calibration never reached {shorten(missed)}", way_out=way_out))
        if missed and unreached is not None:
            unreached(missed)


def samples_in(batch: Any) -> int:
    """Samples in a batch: the first dimension of the first tensor in it."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    if not isinstance(batch, Mapping | tuple | list):  # a tokenizer gives a mapping that is no dict
        return 1
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next((samples_in(v) for v in values if isinstance(v, Tensor | Mapping | tuple | list)), 1)


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Restore ``requires_grad`` and ``grad`` of every parameter on exit."""
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, (requires_grad, gradient) in before.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Inside, evaluation mode without gradients and caches; restores modes, caching and random state on exit.

    A Hugging Face model's cache of keys and values would grow with each replay of a block.
    """
    modes = {module: module.training for module in model.modules()}
    configs = [getattr(module, "config", None) for module in model.modules()]
    caching = {id(config): config for config in configs if getattr(config, "use_cache", False)}
    model.eval()
    for config in caching.values():
        setattr(config, "use_cache", False)  # noqa: B010
    try:
        with keep_random_state(), torch.no_grad(), without_fast_paths(model):
            yield
    finally:
        for module in model.modules():  # including those that replaced others
            module.training = modes.get(module, modes[model])
        for config in caching.values():
            setattr(config, "use_cache", True)  # noqa: B010
