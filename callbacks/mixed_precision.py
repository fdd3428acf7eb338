"""Mixed precision: bits for each layer under one budget, quantized in a schedule (Kim et al., arXiv 2603.18426)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from pqqp_lightning.algorithms.allocation import allocate
from pqqp_lightning.algorithms.grid import SMALLEST_HALF, Quantized
from pqqp_lightning.algorithms.rtn import quantize_rtn
from pqqp_lightning.callbacks.gptq import GPTQ
from pqqp_lightning.callbacks.rtn import RTN
from pqqp_lightning.checkpoint.encoding import encode_weight
from pqqp_lightning.checkpoint.expected import Structure
from pqqp_lightning.checkpoint.size import measure_size
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.constraints import Constraints
from pqqp_lightning.stages import (
    Context,
    ExpectedWeights,
    GroupSize,
    Layer,
    Plan,
    Problem,
    QuantizationStage,
    SearchSpace,
    Sensitivity,
    Stage,
    check_hessian_arguments,
    constraints_of,
    measure_costs,
    weight_matrix,
)

DEFAULT_BITS = 4.0


class MixedPrecision(QuantizationStage):
    """Chooses each layer's bits by measured sensitivity under one budget, and quantizes bit width by bit width.

    Round to nearest measures the cost of each layer at each bit width on the calibration data. Integer programming
    (HiGHS) finds the cheapest assignment within the budget. Then one bit width after another is quantized, calibrated
    on the model as quantized so far: from the most bits to the fewest (progressive, the mildest change first), or from
    the fewest to the most (regressive). Several GPTQ stages with disjoint ``targets`` do the same by hand.

    Example::

        stages:
          quantize: {class_path: MixedPrecision, init_args: {bits: [2, 3, 4, 8], average_bits: 3.5, group_size: 64}}

    Args:
        bits: the bit widths to choose from, 2 to 8.
        average_bits: largest average of bits over the kept weights, without scales; 4 by default, unless
            ``size_bytes`` is given.
        size_bytes: instead, the largest size of the whole model, with scales, masks and unchanged parameters.
        schedule: "progressive" quantizes from the most bits to the fewest, "regressive" from the fewest to the most.
        method: "gptq", or "rtn" (then the schedule makes no difference).
        group_size: input columns that share a scale; "channel" for one scale an output channel, "tensor" for one in
            all; or name pattern to size.
        symmetric: without zero points; False for asymmetric grids.
        block_size: columns whose errors GPTQ passes on together; it affects speed only.
        damping: fraction of the Hessian's mean diagonal that GPTQ adds to it.
        activation_order: GPTQ quantizes the columns with the largest inputs first.
        clip: search the range of each scale for the smallest error.
        sensitivity: "loss" weighs a layer's output error by the loss's squared gradients (one backward pass over the
            calibration data), "output" divides the output error by the output.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Kim et al. 2026, Prune-then-Quantize or Quantize-then-Prune?, arXiv 2603.18426"
    needs_calibration = True  # type: ignore[assignment]
    search_space: ClassVar[SearchSpace] = {
        "average_bits": (2.5, 3.0, 3.5, 4.0, 5.0, 6.0),
        "group_size": ("channel", 128, 64),
    }

    def __init__(
        self,
        bits: Sequence[int] = (2, 3, 4, 8),
        average_bits: float | None = None,
        size_bytes: int | None = None,
        schedule: Literal["progressive", "regressive"] = "progressive",
        method: Literal["gptq", "rtn"] = "gptq",
        group_size: GroupSize | dict[str, GroupSize] = "channel",
        symmetric: bool = True,
        block_size: int = 128,
        damping: float = 0.01,
        activation_order: bool = False,
        clip: bool = True,
        sensitivity: Sensitivity = "loss",
        **kwargs: Any,
    ) -> None:
        super().__init__(group_size=group_size, symmetric=symmetric, clip=clip, **kwargs)
        self.bits = [bits] if isinstance(bits, int) else list(bits)  # type: ignore[assignment]
        self.average_bits = average_bits
        self.size_bytes, self.schedule, self.method, self.sensitivity = size_bytes, schedule, method, sensitivity
        self.block_size, self.damping, self.activation_order = block_size, damping, activation_order

    @property
    def whole_model_arguments(self) -> dict[str, Any]:
        """As in every stage, and ``sensitivity`` by the loss, which takes a backward pass."""
        own = {"sensitivity": "output"} if self.sensitivity == "loss" else {}
        return super().whole_model_arguments | own

    def check_arguments(self) -> list[Problem]:
        problems = Stage.check_arguments(self) + check_hessian_arguments(self.block_size, self.damping)
        if not self._widths:
            way_out = "Give the bit widths to choose from, as in bits: [2, 3, 4, 8]."
            return [*problems, Problem("bits", self.bits, "is empty", way_out)]
        for bits in self._widths:  # each width's stage also checks the group size
            problems += [p for p in self._stage(bits).check_arguments() if p not in problems]
        if self.average_bits is not None and self.size_bytes is not None:
            text = f"and size_bytes={self.size_bytes} are both given"
            problems.append(Problem("average_bits", self.average_bits, text, "Set one budget."))
        least, most = self._widths[0], self._widths[-1]
        if self.size_bytes is None and not least <= self._average <= most:
            text = f"is outside of bits={self._widths}: it can be {least} to {most}"
            problems.append(Problem("average_bits", self._average, text, "Change it, or add a bit width."))
        if self.size_bytes is not None and self.size_bytes < 1:
            way_out = "It is the whole model's size."
            problems.append(Problem("size_bytes", self.size_bytes, "is not above 0", way_out))
        return problems

    def check(self, model: LightningModule, data: Any, earlier: Sequence[Stage]) -> list[Problem]:
        problems = super().check(model, data, earlier)
        if self.sensitivity == "loss" and not is_overridden("training_step", model):
            text = f"needs a training_step in {type(model).__name__}"
            problems.append(Problem("sensitivity", self.sensitivity, text, "Add one, or set sensitivity: output."))
        return problems

    def compress(self, model: LightningModule, context: Context) -> Plan:
        layers = self.find_layers(model)
        costs, sizes = context.once(self, lambda: self._measure(model, layers, context))
        chosen = self._choose(model, layers, costs, sizes, context)
        used = sorted(set(chosen.values()), reverse=self.schedule == "progressive")
        for bits in used:
            group = {name: layer for name, layer in layers.items() if chosen[name] == bits}
            self._stage(bits).compress_layers(model, group, context)
        context.notes[:] = [*dict.fromkeys(context.notes), _summary(layers, chosen, used)]
        if self.size_bytes is not None and (counted := measure_size(model, []).size_bytes) > self.size_bytes:
            # the sizes were foreseen with round to nearest; GPTQ's scales may need float32
            context.notes.append(f"counted {counted} bytes, above size_bytes={self.size_bytes}: scales in float32")
        return {}

    def expected_weights(self, model: LightningModule, weights: ExpectedWeights) -> ExpectedWeights:
        """The whole budget, as so many bits on average: which layer gets which is up to the data."""
        layers = self.find_layers(model)
        rounded = {}
        for bits in (self._widths[0], self._widths[-1]):
            rounded[bits] = self._stage(bits).expected_of(layers, weights)
        least, most = rounded[self._widths[0]], rounded[self._widths[-1]]
        average = self._average
        if self.size_bytes is not None:
            structure = Structure(model, set())
            smallest, largest = (structure.size(weights.changed(each)).size_bytes for each in (least, most))
            share = (self.size_bytes - smallest) / max(1, largest - smallest)
            average = self._widths[0] + min(1.0, max(0.0, share)) * (self._widths[-1] - self._widths[0])
        chosen = {}
        for name, weight in most.items():
            assert weight.grid is not None
            chosen[name] = replace(weight, grid=replace(weight.grid, bits=average), exact=False)
        return weights.changed(chosen)

    @property
    def _widths(self) -> list[int]:
        """The bit widths to choose from, ascending and without duplicates."""
        widths: Any = self.bits
        return sorted(set(widths))

    @property
    def _average(self) -> float:
        """The budget in bits for each weight, if no size is given."""
        return DEFAULT_BITS if self.average_bits is None else self.average_bits

    def _stage(self, bits: int) -> GPTQ | RTN:
        """The stage that quantizes the layers of one bit width."""
        common: dict[str, Any] = {"bits": bits, "group_size": self.group_size, "symmetric": self.symmetric}
        common |= {"clip": self.clip, "blocks": self.blocks}
        if self.method == "rtn":
            return RTN(**common)
        common |= {"block_size": self.block_size, "damping": self.damping, "activation_order": self.activation_order}
        return GPTQ(**common)

    def _measure(
        self, model: LightningModule, layers: dict[str, Layer], context: Context
    ) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
        """Each layer's cost and bytes at each bit width."""
        sizes: dict[str, list[int]] = {name: [] for name in layers}

        def trials(name: str, layer: Layer, hessians: Tensor) -> Iterator[Tensor]:
            for bits in self._widths:
                quantized = quantize_rtn(weight_matrix(layer), **self._stage(bits).grid_options(name))
                sizes[name].append(_stored_bytes(constraints_of(layer), quantized))
                yield quantized.weight

        costs = measure_costs(context, self.find_blocks(model), layers, trials, self.sensitivity)
        return costs, sizes

    def _choose(
        self,
        model: LightningModule,
        layers: dict[str, Layer],
        costs: dict[str, list[float]],
        sizes: dict[str, list[int]],
        context: Context,
    ) -> dict[str, int]:
        """Each layer's bits."""
        if self.size_bytes is not None:
            whole = measure_size(model, layers)
            # what the stage cannot change takes its part of the budget first
            rest = whole.size_bytes - sum(layer.size_bytes for layer in whole.layers)
            amounts, budget = sizes, self.size_bytes - rest
        else:
            kept = {name: constraints_of(layer).kept() for name, layer in layers.items()}
            amounts = {name: [bits * kept[name] for bits in self._widths] for name in layers}
            rest, budget = 0, int(self._average * sum(kept.values()) + 1e-6)  # 4.35 * 100 is 434.99... in floats
        least = sum(map(min, amounts.values()))
        if least > budget:
            text = (
                f"is too small: with {self._widths[0]} bits everywhere the model takes {least + rest} bytes, {rest} of "
                "them in what the stage leaves as it is"
            )
            way_out = "Raise it, use larger groups, or act on more layers."
            problem = Problem("size_bytes", self.size_bytes, text, way_out)
            raise RecipeError(problem.within(f"stages.{context.title}", type(self).__name__))
        picked = allocate([costs[n] for n in layers], [amounts[n] for n in layers], budget)
        return {name: self._widths[k] for name, k in zip(layers, picked, strict=True)}


def _stored_bytes(constraints: Constraints, quantized: Quantized) -> int:
    """Bytes of a layer's weight on a grid like this one; scales near the smallest float16 count as float32."""
    scale = quantized.grid.scale
    size = encode_weight(constraints.with_grid(quantized.grid), 32).size_bytes
    near = scale.dtype == torch.float16 and bool(scale.min() < 4 * SMALLEST_HALF)
    return size + (2 * scale.numel() if near else 0)


def _summary(layers: dict[str, Layer], chosen: dict[str, int], used: list[int]) -> str:
    """How many layers have which bits, in the order of quantization, and the average over kept weights."""
    counts = ", ".join(f"{bits} bits: {sum(b == bits for b in chosen.values())} layers" for bits in used)
    kept = {name: constraints_of(layer).kept() for name, layer in layers.items()}
    average = sum(chosen[name] * kept[name] for name in layers) / max(1, sum(kept.values()))
    return f"{counts}, in this order; {average:.4f} bits a weight on average"
