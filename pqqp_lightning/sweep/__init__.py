"""Grids over the knobs of stages and over their orders, and what they say about the order of compression."""
