"""Round to nearest."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from pqqp_lightning.algorithms.rtn import quantize_rtn
from pqqp_lightning.network.layers import Layer, weight_matrix
from pqqp_lightning.stages.quantization import QuantizationStage
from pqqp_lightning.stages.stage import Context, Plan


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

    def compress(self, model: LightningModule, context: Context) -> Plan:
        self.quantize_layers(model, self.find_layers(model), context)
        return {}

    def quantize_layers(self, model: LightningModule, layers: dict[str, Layer], context: Context) -> None:
        """Quantize ``layers`` in place; the rest of ``model`` does not matter."""
        for name, layer in context.each(layers):
            self.write_grid(layer, quantize_rtn(weight_matrix(layer), **self.grid_options(name)))
