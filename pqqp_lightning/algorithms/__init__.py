"""Compression algorithms in pure torch: functions of tensors and plain numbers that return new tensors.

Shapes: O output rows, I input columns, G groups of columns, T tokens (rows of calibration input).
"""
