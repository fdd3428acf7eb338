"""Block-by-block calibration: replay the calibration set through one block, collect statistics, compress, continue.

- ``walk``: goes over the blocks; ``chain``: how blocks follow one another; ``collect``, ``statistics``: layer inputs.
- ``channel_scores``: importance of channels; ``removal_losses``: losses without a block; ``layer_errors``: analysis.
"""
