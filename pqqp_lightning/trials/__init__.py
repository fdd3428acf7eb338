"""Applies each sequence of stages once for all searches: prefix tree, strategies, verdict, executors.

- ``prefix_tree``: the results of sequences of stages; a common prefix is computed once. ``fingerprint``: their keys.
- ``strategies``: which orders to measure, and in which sequence. ``verdict``: which one is best, and how sure that is.
- ``executors``: measure in this process; ``ray_executor`` and ``ray_worker``: in Ray tasks.
- ``progress``: the time limit and progress lines.
"""
