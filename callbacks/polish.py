"""Polish: coordinate descent towards the dense weights, within masks and grids (QuantEase, arXiv 2309.01885)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pqqp_lightning.algorithms.polish import Repaired, polish, refit
from pqqp_lightning.stages import LayerInputs, Problem, RepairInputs, RepairStage


class Polish(RepairStage):
    """Wins back what earlier stages lost: moves every compressed layer's outputs towards the dense layer's.

    It comes after pruning and quantization, in either order, and keeps every mask, bit width and group. Each entry
    moves to its best level, each scale to its best value. A layer with a mask alone is refitted exactly.

    Example::

        stages:
          prune:    {class_path: SparseGPT, init_args: {sparsity: 0.5}}
          quantize: {class_path: GPTQ, init_args: {bits: 4}}
          polish:   {class_path: Polish}

    Args:
        passes: over all columns of a layer; 2 to 4 reach most of the gain.
        scales: move the scales of the grids, too.
        inputs: where the outputs come from that a layer shall reproduce: those of its dense weights on the "compressed"
            model's inputs, the outputs in the "dense" model itself, which also makes up for earlier layers' errors, or
            the mean of both ("mixed").
        damping: fraction of the Hessian's mean diagonal that is added to it; more stays nearer to the dense weights.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Behdin et al. 2023, QuantEase, arXiv 2309.01885, here within masks and with scales"

    def __init__(
        self,
        passes: int = 4,
        scales: bool = True,
        inputs: RepairInputs = "compressed",
        damping: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(inputs, damping, **kwargs)
        self.passes, self.scales = passes, scales

    def check_arguments(self) -> list[Problem]:
        problems = super().check_arguments()
        if self.passes < 1:
            problems.append(Problem("passes", self.passes, "is not above 0", "4 is the default."))
        return problems

    def repair(self, inputs: LayerInputs, target: Tensor) -> Repaired:
        weight, hessian, mask, grid = inputs.weight, inputs.statistic, inputs.mask, inputs.grid
        if grid is None:
            assert mask is not None
            return refit(weight, target, hessian, mask)
        scales = self.scales and not inputs.shares_scale
        return polish(weight, target, hessian, grid, mask, passes=self.passes, scales=scales)
