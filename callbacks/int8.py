"""INT8, the weights of LLM.int8() (Dettmers et al., arXiv 2208.07339)."""

from __future__ import annotations

from pqqp_lightning.algorithms.rtn import quantize_int8
from pqqp_lightning.stages import Compressed, DenseScales, ExpectedGrid, ExpectedWeight, GridStage, Layer, LayerInputs


class INT8(GridStage):
    """Rounds weights to the integers from -127 to 127 times one scale an output row; needs no data.

    The codes equal those of bitsandbytes, in an ordinary layer. The rounding is our own, because later stages must
    round to the same grid. LLM.int8() also rounds activations to 8 bits, except outliers: put
    ``ActivationQuantization`` with ``bits: 8`` and ``outliers: 6.0`` after this stage.

    Example::

        stages:
          quantize: {class_path: INT8, init_args: {ignore: [lm_head]}}

    Args:
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339; bitsandbytes"

    def expected_grid(
        self, name: str, layer: Layer, before: ExpectedWeight, dense: DenseScales
    ) -> tuple[ExpectedGrid, bool]:
        return ExpectedGrid(8, before.shape[0], 4), True

    def compress_layer(self, inputs: LayerInputs) -> Compressed:
        quantized = quantize_int8(inputs.weight)
        return Compressed(quantized.weight, grid=quantized.grid)
