"""ALPS (Meng et al., NeurIPS 2024, arXiv 2406.07831)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pqqp_lightning.algorithms.alps import Spectrum, damp, prune_alps
from pqqp_lightning.stages import (
    Compressed,
    Found,
    Hessian,
    LayerInputs,
    OneShotPruning,
    Problem,
    check_hessian_arguments,
)


class ALPS(OneShotPruning):
    """Searches the mask that changes each layer's outputs on the calibration data least, then refits the kept weights.

    It is slower than SparseGPT, which decides on each column once, and loses less, above all at high sparsity. On a
    quantized layer, the kept weights stay on their grid.

    Example::

        stages:
          prune: {class_path: ALPS, init_args: {sparsity: 0.7}}

    Args:
        sparsity: fraction of the weights to remove, in (0, 1); or name pattern to fraction.
        pattern: "N:M" instead: N kept of every M consecutive inputs.
        allocation: "uniform", or "sensitivity" for each layer's own sparsity, by its estimated effect on the loss.
        iterations: of the search, at most; it ends when the mask stops changing.
        damping: fraction of the Hessian's mean diagonal that is added to it; more is steadier and less exact.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Meng et al. 2024, ALPS, arXiv 2406.07831"
    statistic = Hessian
    compared_within = "matrix"

    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        pattern: str | int | dict[str, str | int] | None = None,
        iterations: int = 300,
        damping: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(sparsity, pattern, **kwargs)
        self.iterations, self.damping = iterations, damping

    def check_arguments(self) -> list[Problem]:
        problems = super().check_arguments() + check_hessian_arguments(1, self.damping)
        if self.iterations < 1:
            problems.append(Problem("iterations", self.iterations, "is not above 0", "300 is the default."))
        return problems

    def prepare(self, statistic: Tensor, found: Found) -> Sequence[Spectrum]:
        spectra = [damp(hessian, self.damping) for hessian in statistic]
        if any(bool(spectrum.dead.any()) for spectrum in spectra):
            found("some inputs are always zero; their weights became zero")
        return spectra

    def scores(self, weight: Tensor, statistic: Spectrum) -> Tensor:
        return (weight * statistic.scale).square()

    def compress_layer(self, inputs: LayerInputs) -> Compressed:
        amount = self.amount(inputs.name)
        pruned = prune_alps(
            inputs.weight,
            inputs.statistic,
            mask=inputs.mask,
            grid=inputs.grid,
            iterations=self.iterations,
            **amount,
        )
        return Compressed(pruned.weight, mask=pruned.mask, pattern=amount.get("pattern"))
