"""Block-by-block calibration: replay the calibration set through one block at a time, collect, compress, go on."""
