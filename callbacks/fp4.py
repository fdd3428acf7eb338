"""FP4, the 4-bit float of bitsandbytes."""

from __future__ import annotations

from pqqp_lightning.stages import CodebookStage


class FP4(CodebookStage):
    """Rounds weights to 4-bit floats (sign, two bits of exponent, one of mantissa); needs no data.

    The weights equal those of bitsandbytes bit for bit. NF4 is nearly always the better choice. Pruned weights stay
    zero.

    Example::

        stages:
          quantize: {class_path: FP4, init_args: {group_size: 64}}

    Args:
        group_size: input columns that share a scale, the block size of bitsandbytes; "auto" for 64, or, where that does
            not divide a layer's inputs, for their largest divisor below 64; or name pattern to size.
        kwargs: see :class:`~pqqp_lightning.stages.Stage`.
    """

    source = "Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 2; bitsandbytes"
    codebook = "fp4"
