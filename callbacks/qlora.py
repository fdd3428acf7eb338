"""QLoRA (Dettmers et al., arXiv 2305.14314): LoRA over a quantized base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import LightningModule

from pqqp_lightning.callbacks.lora import LoRA
from pqqp_lightning.callbacks.nf4 import NF4
from pqqp_lightning.network.name_patterns import values_of
from pqqp_lightning.stages import BlockSize, Context, ExpectedWeights, Plan, Problem, Stage, constraints_of


class QLoRA(LoRA):
    """Trains low-rank adapters next to 4-bit weights and keeps them separate.

    Layers that an earlier stage quantized keep their grid; the others are rounded to NF4 first. Pruned weights stay
    zero. Unlike in the paper, scales are not quantized again. The base computes in the model's own dtype, so that
    training needs as much memory as LoRA; only the checkpoint is small.

    Example::

        stages:
          prune:   {class_path: SparseGPT, init_args: {sparsity: 0.5}}
          recover: {class_path: QLoRA, init_args: {rank: 8, epochs: 1, learning_rate: 0.0002}}

    Args:
        rank: columns of B and rows of A; more learns more and costs more.
        alpha: the update is alpha / rank * B A.
        dropout: on the adapters' input, in training; in [0, 1).
        initialization: how A and B start. "default" and "gaussian" draw A and start B at zero; "orthogonal" draws both
            so that B A is zero; "eora" sets B A to the best correction of what the layer lost, see :class:`LoRA`.
        merge: true adds the adapters to the weights and rounds them to their grid again.
        merge_aware: train with the weights as they will be after merging; see :class:`LoRA`.
        epochs: epochs of training, 1 or more; or 0 with initialization: eora.
        learning_rate: the highest learning rate, chosen for Adam; null uses the model's own.
        group_size: input columns that share a scale of NF4; "auto" for 64, or, where that does not divide a layer's
            inputs, for their largest divisor below 64; or name pattern to size.
        adapter_bits: round A and B to a grid of so many bits, which later training would leave: it needs epochs: 0.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Dettmers et al. 2023, QLoRA, arXiv 2305.14314"
    promises = ("grid",)
    changes_before_training = True  # type: ignore[assignment]

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        initialization: Literal["default", "gaussian", "orthogonal", "eora"] = "default",
        merge: bool = False,
        merge_aware: bool = False,
        epochs: int = 1,
        learning_rate: float | None = 2e-4,
        group_size: BlockSize | dict[str, BlockSize] = "auto",
        adapter_bits: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            rank, alpha, dropout, initialization, merge, merge_aware, epochs, learning_rate, adapter_bits, **kwargs
        )
        self.group_size = group_size

    def check_arguments(self) -> list[Problem]:
        problems = super().check_arguments()
        if self.initialization in ("pissa", "olora"):  # Python does not enforce the signature
            text = "would move the weights off their grid"
            way_out = "Use default, gaussian, orthogonal or eora."
            problems.append(Problem("initialization", self.initialization, text, way_out))
        return problems + NF4(self.group_size).check_arguments()

    def check(self, model: LightningModule, data: Any, earlier: Sequence[Stage]) -> list[Problem]:
        problems = super().check(model, data, earlier)
        if problems:
            return problems
        # NF4's checks concern only the layers that it will round
        gridded = {name for stage in earlier if "grid" in stage.promises for name in stage.find_layers(model)}
        layers = {name: layer for name, layer in self.find_layers(model).items() if name not in gridded}
        if layers:
            return NF4(self.group_size).check_layers(layers)
        if values_of(self.group_size) == ["auto"]:
            return []
        return [Problem("group_size", self.group_size, "has no effect: every layer is already quantized", "Drop it.")]

    def expected_weights(self, model: LightningModule, weights: ExpectedWeights) -> ExpectedWeights:
        layers = {n: x for n, x in self.find_layers(model).items() if weights.weights[n].grid is None}
        return weights.changed(NF4(self.group_size).expected_of(layers, weights))

    def compress(self, model: LightningModule, context: Context) -> Plan:
        layers = {n: x for n, x in self.find_layers(model).items() if constraints_of(x).grid is None}
        NF4(self.group_size).compress_layers(model, layers, context)
        return super().compress(model, context)
