"""Refit: the best kept weights for a mask, by conjugate gradients on the layer's squared output error."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from pqqp_lightning.algorithms.polish import Repaired, refit
from pqqp_lightning.stages import LayerInputs, Problem, RepairInputs, RepairStage


class Refit(RepairStage):
    """Gives the kept weights of pruned layers their best values, so that a quantizing stage starts from better ones.

    SparseGPT updates weights on one sweep over the columns; this solves for all kept weights of a row together, with
    the dense layer's outputs as the target. Layers with a grid are left as they are: ``Polish`` repairs those.

    Example::

        stages:
          prune:    {class_path: Wanda, init_args: {sparsity: 0.5}}
          refit:    {class_path: Refit}
          quantize: {class_path: GPTQ, init_args: {bits: 4}}

    Args:
        iterations: of the conjugate gradients, at most.
        inputs: where the outputs come from that a layer shall reproduce, see ``Polish``.
        damping: fraction of the Hessian's mean diagonal that is added to it; more stays nearer to the dense weights.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    nothing_to_repair = "no earlier stage prunes its layers, or one quantizes them too (Polish repairs those)"
    source = "Least squares on the mask, as in the weight update of ALPS (Meng et al. 2024, arXiv 2406.07831)"

    def __init__(
        self, iterations: int = 20, inputs: RepairInputs = "compressed", damping: float = 0.01, **kwargs: Any
    ) -> None:
        super().__init__(inputs, damping, **kwargs)
        self.iterations = iterations

    def check_arguments(self) -> list[Problem]:
        problems = super().check_arguments()
        if self.iterations < 1:
            problems.append(Problem("iterations", self.iterations, "is not above 0", "20 is the default."))
        return problems

    def repairs(self, kept: Collection[str]) -> bool:
        return set(kept) == {"mask"}

    def repair(self, inputs: LayerInputs, target: Tensor) -> Repaired:
        assert inputs.mask is not None
        return refit(inputs.weight, target, inputs.statistic, inputs.mask, iterations=self.iterations)
