"""Block-by-block calibration: replay the samples through a block, collect statistics, compress it."""
