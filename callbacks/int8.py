"""INT8, the weights of LLM.int8() (Dettmers et al., arXiv 2208.07339)."""

from __future__ import annotations

from lightning.pytorch import LightningModule

from pqqp_lightning.algorithms.rtn import quantize_int8
from pqqp_lightning.network.layers import weight_matrix
from pqqp_lightning.stages.quantization import GridStage
from pqqp_lightning.stages.stage import Context, Plan


class INT8(GridStage):
    """Rounds weights to the integers from -127 to 127 times one scale an output row; needs no data.

    The codes are those that bitsandbytes gives a weight, in an ordinary layer; rounding is our own, since later stages
    must round to the same grid. LLM.int8() rounds activations to 8 bits too, apart from outliers: put
    ``ActivationQuantization`` with ``bits: 8`` and ``outliers: 6.0`` behind this stage.

    Example::

        stages:
          quantize: {class_path: INT8, init_args: {ignore: [lm_head]}}

    Args:
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339; bitsandbytes"

    def compress(self, model: LightningModule, context: Context) -> Plan:
        for _, layer in context.each(self.find_layers(model)):
            self.write_grid(layer, quantize_int8(weight_matrix(layer)))
        return {}
