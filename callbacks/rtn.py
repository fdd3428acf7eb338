"""Round to nearest."""

from __future__ import annotations

from pqqp_lightning.algorithms.rtn import quantize_rtn
from pqqp_lightning.stages import Compressed, LayerInputs, QuantizationStage


class RTN(QuantizationStage):
    """Rounds every weight to the nearest point of its grid; needs no data. Pruned weights stay zero.

    Example::

        stages:
          quantize: {class_path: RTN, init_args: {bits: 4, group_size: 64, symmetric: false}}

    Args:
        bits: 2 to 8; or name pattern to bits.
        group_size: input columns that share a scale; "channel" for one scale an output channel, "tensor" for one in
            all; or name pattern to size.
        symmetric: without zero points; False for asymmetric grids.
        clip: search the range of each scale for the smallest weight error; slower, pays on rotated weights (QuaRot).
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "round to nearest, the baseline of Frantar et al. 2023, arXiv 2210.17323"

    def compress_layer(self, inputs: LayerInputs) -> Compressed:
        quantized = quantize_rtn(inputs.weight, **self.grid_options(inputs.name))
        return Compressed(quantized.weight, grid=quantized.grid)
