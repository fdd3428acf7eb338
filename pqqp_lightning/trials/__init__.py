"""Applies each sequence of stages once, whoever asks: prefix tree, strategies, verdict, executors."""
