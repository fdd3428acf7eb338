"""NF4, the 4-bit data type of QLoRA and bitsandbytes (Dettmers et al., arXiv 2305.14314)."""

from __future__ import annotations

from pqqp_lightning.stages import CodebookStage


class NF4(CodebookStage):
    """Rounds weights to 4-bit NormalFloat, whose levels are as dense as normally distributed weights; needs no data.

    The weights equal those of bitsandbytes bit for bit (``quantize_4bit`` without nested quantization of the scales),
    in an ordinary layer: pruned weights stay zero, and pruning, LoRA, calibration and saving work on any device.

    Example::

        stages:
          quantize: {class_path: NF4, init_args: {group_size: 64}}

    Args:
        group_size: input columns that share a scale, the block size of bitsandbytes; "auto" for 64, or, where that does
            not divide a layer's inputs, for their largest divisor below 64; or name pattern to size.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Dettmers et al. 2023, QLoRA, arXiv 2305.14314"
    codebook = "nf4"
