"""BlockMatching: train a block at a time so that its outputs match the dense block's (EfficientQAT, 3BASiL)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from tqdm.auto import tqdm

from pqqp_lightning.calibration.batch_norm import BlockNorms, norms_of_blocks, recalibrate_batch_norms
from pqqp_lightning.calibration.block_training import BlockTraining, Matched, TrainedLayer
from pqqp_lightning.calibration.chain import is_chain, is_unchained
from pqqp_lightning.calibration.walk import BlockPass, Walk, calibrating
from pqqp_lightning.checkpoint.expected import ExpectedWeights
from pqqp_lightning.errors import RecipeError, shorten
from pqqp_lightning.network.activation_hooks import transforms_of, without_transforms
from pqqp_lightning.network.blocks import containing_block
from pqqp_lightning.network.constraints import constrained_layers
from pqqp_lightning.network.layers import is_adapter
from pqqp_lightning.network.parameter_layers import ParameterLayer
from pqqp_lightning.stages import (
    Compressed,
    Context,
    DenseAimedStage,
    Layer,
    Plan,
    Problem,
    Stage,
    check_inputs,
    write_back,
)
from pqqp_lightning.surgery.factored import Factored

MatchingInputs = Literal["dense", "compressed"]

UNCHAINED = "the blocks do not feed one another directly"
NAME_BLOCKS = "Name blocks that follow one another in blocks, or recover with Finetune and distill."


class BlockMatching(DenseAimedStage):
    """Trains each block in turn so that its outputs match those of the dense block, without labels.

    It comes after pruning and quantization, in either order, and keeps every mask, bit width and group. Removed weights
    stay zero, weights with a grid are rounded in every forward pass (straight-through), and their scales are trained;
    zero points, codebooks, biases and norms stay. A block ends with the best of the states after each pass, which is
    the one that it began with if no other is better. Only one block, its inputs and its targets are held at a time.

    With ``batch_norm: recalibrate`` the statistics of a block, and those of the dense block, are estimated again on the
    calibration samples before each pass and are fixed during it. ``keep`` leaves them all as they are.

    Its steps are short. Where the stages before it lost much, put ``Polish`` between them: 8 passes alone made a DeiT
    of digits worse that was pruned by 80% at 2 bits, and after ``Polish`` they won back most (``docs/methods.md``). It
    takes about ten times as long as GPTQ, and holds the block's inputs and outputs on all samples.

    Example::

        stages:
          prune:    {class_path: SparseGPT, init_args: {sparsity: 0.5}}
          quantize: {class_path: GPTQ, init_args: {bits: 4}}
          match:    {class_path: BlockMatching}

    Args:
        passes: over the calibration samples, for each block, with one step for each batch; more fit these samples more
            closely and take longer.
        step: how far Adam moves a weight at first, as a fraction of the root mean square of its layer's weights; it
            falls to 0 on a cosine.
        inputs: what the dense block reads for its targets: the "dense" model's own hidden states, so that each block
            also makes up for the errors of earlier ones, or the "compressed" model's.
        scales: train the scales of the grids, too.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Chen et al. 2024, EfficientQAT, arXiv 2407.11062; targets as in 3BASiL's transformer matching"
    needs_calibration = True
    needs_chain = True
    compresses = True

    def __init__(
        self,
        passes: int = 8,
        step: float = 0.01,
        inputs: MatchingInputs = "dense",
        scales: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.passes, self.step, self.inputs, self.scales = passes, step, inputs, scales

    def reason_to_leave(self, layer: Layer) -> str:
        # An RNN keeps its parameters in a list as well, and would not compute with the trained ones.
        recurrent = isinstance(layer, ParameterLayer) and layer.family == "recurrent"
        return "cannot exchange their weights in a forward pass" if recurrent else ""

    def check_arguments(self) -> list[Problem]:
        problems = super().check_arguments()
        if self.passes < 1:
            problems.append(Problem("passes", self.passes, "is not above 0", "8 is the default."))
        if not 0 < self.step < 1:
            problems.append(Problem("step", self.step, "is not between 0 and 1", "0.01 is the default."))
        problems += check_inputs(self.inputs, MatchingInputs)
        return problems

    def check(self, model: LightningModule, data: Any, earlier: Sequence[Stage]) -> list[Problem]:
        problems = super().check(model, data, earlier)
        blocks = self.find_blocks(model)
        layers = self.find_layers(model)
        if "" in blocks:
            problems.append(Problem("blocks", text="the model has no blocks to train one by one", way_out=NAME_BLOCKS))
        elif is_unchained(model, blocks):
            problems.append(Problem("blocks", text=UNCHAINED, way_out=NAME_BLOCKS))
        elif layers and not any(containing_block(name, blocks) for name in layers):
            text = f"selects no layer in the blocks, and {shorten(layers)} cannot be trained alone"
            problems.append(Problem("targets", self.targets, text, f"Choose layers in {shorten(blocks)}."))
        changed = []
        for name, block in blocks.items():
            if any(is_adapter(module) or isinstance(module, Factored) for module in block.modules()):
                changed.append(name)
        if changed:
            text = f"{shorten(changed)} hold adapters or factors, so that no dense block corresponds to them"
            problems.append(Problem(text=text, way_out="Put this stage before the one that adds them."))
        return problems

    def expected_weights(self, model: LightningModule, weights: ExpectedWeights) -> ExpectedWeights:
        """Other values, with the masks and grids as they were."""
        return weights.values_changed(self.find_layers(model))

    def compress(self, model: LightningModule, context: Context) -> Plan:
        walk = context.walk(self.find_blocks(model))
        layers = self.repairable_layers(model, context)
        of_block: dict[str, dict[str, Layer]] = {name: {} for name in walk.blocks}
        for name, layer in layers.items():
            block = walk.block_of(name)
            if block is None:
                context.found("left as it is: it is not in a block", [name])
            else:
                of_block[block][name] = layer
        found = []
        with calibrating(model):
            for block, matched in self._match_blocks(walk, of_block, context):
                for name, (weight, grid) in matched.weights.items():
                    write_back(layers[name], Compressed(weight, grid=grid))
                if not matched.weights:
                    context.found("as before: no pass lowered the error of its outputs", [block])
                found.append(matched)
        if found:
            before = sum(matched.before for matched in found) / len(found)
            after = sum(matched.after for matched in found) / len(found)
            context.notes.append(
                f"squared error of the blocks' outputs, relative to the dense blocks': {after:.4g} on average, before "
                f"{before:.4g}; of the last block {found[-1].after:.4g}, before {found[-1].before:.4g}"
            )
        return {}

    def _match_blocks(
        self, walk: Walk, of_block: dict[str, dict[str, Layer]], context: Context
    ) -> Iterator[tuple[str, Matched]]:
        """Train each block that has layers; the consumer writes its weights before it asks for the next block."""
        trained_blocks = [name for name, layers in of_block.items() if layers]
        if not trained_blocks:
            return
        chained, same = is_chain(walk.blocks, walk.forward, walk.probe)
        if not chained:
            problem = Problem("blocks", text=UNCHAINED, way_out=NAME_BLOCKS)
            raise RecipeError(problem.within(f"stages.{self.name}", type(self).__name__))
        masks = walk.masks()
        norms = norms_of_blocks(walk) if self.batch_norm == "recalibrate" else {}
        steps = len(trained_blocks) * self.passes * len(walk.batches)
        bar = tqdm(total=steps, desc=context.title, unit="step", disable=not context.progress, leave=False)
        dense_hidden: list[Tensor] = []
        if self.inputs == "dense" and changes_outside_blocks(walk):
            dense_hidden = dense_first_inputs(walk, every_block=not same, recalibrate=self.batch_norm == "recalibrate")
        for block, run in walk.block_passes(every_block=not same):
            if self.inputs == "compressed" or not dense_hidden:
                dense_hidden = list(run.hidden)
            targets = dense_outputs(walk, run, dense_hidden, norms.get(block))
            if of_block[block]:
                trained = {}
                for name, layer in of_block[block].items():
                    dense = context.dense(layer)
                    assert dense is not None  # repairable_layers has seen it
                    trained[name] = TrainedLayer(layer, dense, self.scales)
                training = BlockTraining(run, trained, targets, masks, norms.get(block), bar.update)
                yield block, self._train(block, training)
            if block == trained_blocks[-1]:  # later ones have nothing to train
                break
            if block in norms:
                norms[block].recalibrate(run)
            dense_hidden = targets
        bar.close()

    def _train(self, block: str, training: BlockTraining) -> Matched:
        try:
            return training.train(self.passes, self.step)
        except ArithmeticError as error:
            problem = Problem(text=f"{block}: {error}", way_out="Check the model and the calibration data.")
            raise RecipeError(problem.within(f"stages.{self.name}", type(self).__name__)) from error


def changes_outside_blocks(walk: Walk) -> bool:
    """Whether layers outside of the blocks are compressed, so that the first block may read other values."""
    names = [name for name, _, _ in constrained_layers(walk.model)]
    names += [name for name, module in walk.model.named_modules() if transforms_of(module)]
    return any(walk.block_of(name) is None for name in names)


@contextmanager
def dense_computation(walk: Walk, module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` computes with the dense model's weights and without rounded activations."""
    assert walk.dense is not None
    with ExitStack() as stack:
        stack.enter_context(walk.dense(module))
        for inner in module.modules():
            stack.enter_context(without_transforms(inner))
        yield


def dense_first_inputs(walk: Walk, *, every_block: bool, recalibrate: bool) -> list[Tensor]:
    """What the first block reads in the dense model, for each calibration batch.

    Args:
        walk: of the compressed model.
        every_block: see ``Walk.block_passes``.
        recalibrate: with the dense model's BatchNorm statistics estimated again on the calibration data.
    """
    with dense_computation(walk, walk.model):
        if recalibrate:
            recalibrate_batch_norms(replace(walk, progress=False))
        _, run = next(walk.block_passes(every_block=every_block))
        return list(run.hidden)


def dense_outputs(walk: Walk, run: BlockPass, hidden: Sequence[Tensor], norms: BlockNorms | None) -> list[Tensor]:
    """What a block computes in the dense model from ``hidden``.

    Args:
        walk: that the block belongs to.
        run: the block's forward pass.
        hidden: for each calibration batch, what the block reads.
        norms: the BatchNorm layers whose statistics become those of ``hidden``; None takes those of the dense model.
    """
    with dense_computation(walk, run.block):
        if norms is not None:
            norms.recalibrate(run, hidden)
        return [run(i, state) for i, state in enumerate(hidden)]
