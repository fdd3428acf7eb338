"""What the quantization stages share: their arguments and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule

from pqqp_lightning.algorithms.codebook import Codebook
from pqqp_lightning.algorithms.rtn import quantize_codebook, quantize_rtn
from pqqp_lightning.checkpoint.expected import DenseScales, ExpectedGrid, ExpectedWeight, ExpectedWeights
from pqqp_lightning.errors import Problem, shorten
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.layers import Layer, columns_of, groups_of, is_depthwise
from pqqp_lightning.network.name_patterns import value_for, values_of
from pqqp_lightning.stages.layerwise import Compressed, LayerInputs, LayerwiseStage
from pqqp_lightning.stages.stage import Context, Plan, SearchSpace, Stage

GroupSize = int | Literal["channel", "tensor"]
BlockSize = int | Literal["auto"]

LARGEST_BLOCK = 64
"""The block size of ``group_size: auto``, as in bitsandbytes."""

SMALLEST_BLOCK = 8
"""``group_size: auto`` refuses smaller blocks, except in layers with fewer inputs."""


FEW_BITS = 4
"""Depthwise convolutions lose much accuracy at so many bits or fewer, and are a small part of a network's size."""


class GridStage(LayerwiseStage):
    """A stage that puts its layers' weights on a grid of its own, and so cannot follow another one on the same layers.

    Args:
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    promises = ("grid",)

    def expected_grid(
        self, name: str, layer: Layer, before: ExpectedWeight, dense: DenseScales
    ) -> tuple[ExpectedGrid, bool]:
        """The grid that the stage will put a layer's weight on, and whether that is certain.

        Args:
            name: the layer's.
            layer: its structure; it may have no weights.
            before: what is stored of it before this stage.
            dense: the dense model's scales.
        """
        # a grid of a method's own: the most that a grid can take
        return ExpectedGrid(8, before.entries, 4), False

    def expected_weights(self, model: LightningModule, weights: ExpectedWeights) -> ExpectedWeights:
        return weights.changed(self.expected_of(self.find_layers(model), weights))

    def expected_of(self, layers: dict[str, Layer], weights: ExpectedWeights) -> dict[str, ExpectedWeight]:
        """What will be stored of ``layers`` on this stage's grid."""
        rounded = {}
        for name, layer in layers.items():
            before = weights.weights[name]
            grid, exact = self.expected_grid(name, layer, before, weights.dense)
            rounded[name] = replace(before, grid=grid, changed=True, exact=before.exact and exact)
        return rounded

    def check(self, model: LightningModule, data: Any, earlier: Sequence[Stage]) -> list[Problem]:
        problems = super().check(model, data, earlier)
        for stage, both in () if self.allow_undo else self.overlaps(model, earlier, ("grid",)):
            text = f"{shorten(both)} would leave the grid of stage '{stage.name}'"
            way_out = "Give the stages disjoint targets, drop one, or set allow_undo: true to replace the earlier grid."
            problems.append(Problem(text=text, way_out=way_out))
        return problems

    def compress(self, model: LightningModule, context: Context) -> Plan:
        plan = super().compress(model, context)
        costly: dict[int, list[str]] = {}
        for name, layer in self.find_layers(model).items():
            grid = constraints_of(layer).grid
            if grid is not None and grid.bits <= FEW_BITS and is_depthwise(layer):
                costly.setdefault(grid.bits, []).append(name)
        for bits, names in costly.items():
            what = (
                f"depthwise convolutions at {bits} bits, which may cost more accuracy than all other layers. Add "
                "'depthwise' to ignore here, and give them 8 bits in a stage with targets: [depthwise]"
            )
            context.found(what, names)
        return plan

    def check_group_size(self, layers: dict[str, Layer]) -> list[Problem]:
        """Problems of ``group_size``: a layer without a value, or one whose width it does not divide."""
        odd: dict[tuple[int, int], list[str]] = {}
        for name, layer in layers.items():
            size = value_for(name, vars(self)["group_size"])
            if isinstance(size, int) and size > 0 and columns_of(layer) % size:
                odd.setdefault((size, columns_of(layer)), []).append(name)
        problems = self.check_patterns("group_size", layers)
        for (size, columns), names in odd.items():
            text = f"does not divide in_features={columns} of {shorten(names)}"
            way_out = f"Use {_divisors_near(columns, size)}, or add them to ignore."
            problems.append(Problem("group_size", size, text, way_out))
        return problems


class QuantizationStage(GridStage):
    """A stage that rounds weights to a grid.

    Args:
        bits: 2 to 8; or name pattern to bits.
        group_size: input columns that share a scale; "channel" for one scale an output channel, "tensor" for one in
            all; or name pattern to size.
        symmetric: without zero points; False for asymmetric grids.
        clip: search the range of each scale for the smallest weight error; slower.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    search_space: ClassVar[SearchSpace] = {
        "bits": (2, 3, 4, 5, 6, 8),
        "group_size": ("channel", 128, 64, 32),
    }

    without_statistics = "rounded to nearest, since no calibration token reached it"

    def __init__(
        self,
        bits: int | dict[str, int] = 4,
        group_size: GroupSize | dict[str, GroupSize] = "channel",
        symmetric: bool = True,
        clip: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.bits, self.group_size, self.symmetric, self.clip = bits, group_size, symmetric, clip

    def compress_unreached(self, inputs: LayerInputs) -> Compressed:
        quantized = quantize_rtn(inputs.weight, **self.grid_options(inputs.name))
        return Compressed(quantized.weight, grid=quantized.grid)

    def grid_options(self, name: str) -> dict[str, Any]:
        """Bits and granularity for one layer, as the algorithms take them."""
        size = value_for(name, self.group_size)
        return {
            "bits": value_for(name, self.bits),
            "group_size": size if isinstance(size, int) else None,
            "per_tensor": size == "tensor",
            "symmetric": self.symmetric,
            "clip": self.clip,
        }

    def expected_grid(
        self, name: str, layer: Layer, before: ExpectedWeight, dense: DenseScales
    ) -> tuple[ExpectedGrid, bool]:
        options, (rows, columns) = self.grid_options(name), before.shape
        bits, group_size = options["bits"], options["group_size"]
        scales = rows * (columns // (group_size or columns))
        # row groups that are calibrated one by one have scales of their own, joined row by row
        if options["per_tensor"] and (self.statistic is None or groups_of(layer) == 1):
            scales = 1
        kind = {name: options[name] for name in ("symmetric", "per_tensor")}
        scale_bytes, exact = dense.bytes_of(self._as_rounded(before), bits, group_size, **kind)
        return ExpectedGrid(bits, scales, scale_bytes, 0 if self.symmetric else bits), exact

    def _as_rounded(self, before: ExpectedWeight) -> ExpectedWeight:
        """The weight as its grid is fitted: feedback of errors and training change its values before that."""
        return replace(before, changed=before.changed or self.statistic is not None or self.epochs > 0)

    def check_arguments(self) -> list[Problem]:
        problems = super().check_arguments()
        problems += [Problem("bits", b, "is not between 2 and 8") for b in values_of(self.bits) if not 2 <= b <= 8]
        return problems + _too_small(self.group_size, "'channel' for one scale an output channel")

    def check(self, model: LightningModule, data: Any, earlier: Sequence[Stage]) -> list[Problem]:
        problems, layers = super().check(model, data, earlier), self.find_layers(model)
        return problems + self.check_patterns("bits", layers) + self.check_group_size(layers)


class CodebookStage(GridStage):
    """A stage that rounds weights to the 4-bit levels of a codebook, block by block.

    The weights equal those of bitsandbytes bit for bit. The layer keeps its class, so that other stages, training and
    saving work as usual. The rounding is our own, because later stages must round to the same grid.

    Args:
        group_size: input columns that share a scale, the block size of bitsandbytes; "auto" for 64, or, where that does
            not divide a layer's inputs, for their largest divisor below 64; or name pattern to size.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    codebook: ClassVar[Codebook]

    def __init__(self, group_size: BlockSize | dict[str, BlockSize] = "auto", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.group_size = group_size

    def check_arguments(self) -> list[Problem]:
        return super().check_arguments() + _too_small(self.group_size, "'auto' for 64 or the nearest divisor below")

    def check(self, model: LightningModule, data: Any, earlier: Sequence[Stage]) -> list[Problem]:
        return super().check(model, data, earlier) + self.check_layers(self.find_layers(model))

    def check_layers(self, layers: dict[str, Layer]) -> list[Problem]:
        """Problems of ``group_size`` on ``layers``."""
        problems: list[Problem] = []
        odd: dict[tuple[int, int], list[str]] = {}
        for name, layer in layers.items():
            size, columns = self.block_size(name, columns_of(layer)), columns_of(layer)
            if size < SMALLEST_BLOCK < columns and not isinstance(value_for(name, self.group_size), int):
                odd.setdefault((size, columns), []).append(name)
        for (size, columns), names in odd.items():
            text = (
                f"would be {size} for in_features={columns} of {shorten(names)}: it has no divisor between "
                f"{SMALLEST_BLOCK} and {LARGEST_BLOCK}"
            )
            way_out = f"Set group_size to {columns} for them, or add them to ignore."
            problems.append(Problem("group_size", "auto", text, way_out))
        return problems + self.check_group_size(layers)

    def block_size(self, name: str, columns: int) -> int:
        """How many of the ``columns`` input columns of a layer share a scale."""
        size = value_for(name, self.group_size)
        if isinstance(size, int):
            return size
        return max(d for d in range(1, min(LARGEST_BLOCK, columns) + 1) if columns % d == 0)

    def expected_grid(
        self, name: str, layer: Layer, before: ExpectedWeight, dense: DenseScales
    ) -> tuple[ExpectedGrid, bool]:
        rows, columns = before.shape
        size = self.block_size(name, columns)
        scale_bytes, exact = dense.codebook_bytes_of(before, self.codebook, size)
        return ExpectedGrid(4, rows * (columns // size), scale_bytes), exact

    def compress_layers(self, model: LightningModule, layers: dict[str, Layer], context: Context) -> None:
        for name, layer in layers.items():
            columns = columns_of(layer)
            if columns % LARGEST_BLOCK and not isinstance(value_for(name, self.group_size), int):
                size = self.block_size(name, columns)
                context.found(f"blocks of {size}, since {LARGEST_BLOCK} does not divide {columns} inputs", [name])
        super().compress_layers(model, layers, context)

    def compress_layer(self, inputs: LayerInputs) -> Compressed:
        size = self.block_size(inputs.name, inputs.weight.shape[1])
        quantized = quantize_codebook(inputs.weight, self.codebook, size)
        return Compressed(quantized.weight, grid=quantized.grid)


def _too_small(group_size: Any, instead: str) -> list[Problem]:
    sizes = [size for size in values_of(group_size) if isinstance(size, int) and size < 1]
    return [Problem("group_size", size, "is not above 0", f"Use {instead}.") for size in sizes]


def _divisors_near(columns: int, size: int) -> str:
    """``"32, 64, 96 or 192"``: up to four divisors of ``columns``, the nearest to ``size``; multiples of 8 first."""
    divisors = [d for d in range(2, columns + 1) if columns % d == 0]
    round_ones = [d for d in divisors if d % 8 == 0] or divisors
    near = sorted(sorted(round_ones, key=lambda d: abs(d - size))[:4])
    return " or ".join(filter(None, [", ".join(map(str, near[:-1])), str(near[-1])]))
