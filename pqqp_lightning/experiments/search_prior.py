"""Which pipelines a search under a budget measures first: those that use it best as far as sizes alone can say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pqqp_lightning.experiments.search_space import Names, Space
from pqqp_lightning.trials.prefix_tree import Order


def count_weaker(space: Space, fitting: Sequence[Order], savings: Mapping[str, int]) -> dict[Order, int]:
    """For each pipeline that fits, how many weaker ones fit.

    A pipeline is weaker than another if its stages stand in the other's order, none saves more bytes alone, and one
    saves fewer; a stage that is left out saves none. A weaker pipeline is rarely worse.

    Args:
        space: what the pipelines are made of.
        fitting: those that can run and fit.
        savings: the bytes that each step alone saves of the dense model.
    """
    steps = space.steps
    stages = list(space.variants)
    by_sequence: dict[Names, list[Order]] = {}
    for pipeline in fitting:
        by_sequence.setdefault(tuple(steps[step].name for step in pipeline), []).append(pipeline)
    saved: dict[Names, torch.Tensor] = {}
    for sequence, pipelines in by_sequence.items():
        saved[sequence] = torch.zeros(len(pipelines), len(stages), dtype=torch.float64)
        for row, pipeline in zip(saved[sequence], pipelines, strict=True):
            for step in pipeline:
                row[stages.index(steps[step].name)] = savings[step]
    found: dict[Order, int] = {}
    for sequence, pipelines in by_sequence.items():
        others = torch.cat([rows for other, rows in saved.items() if _is_within(other, sequence)])
        for row, pipeline in zip(saved[sequence], pipelines, strict=True):
            weaker = (others <= row).all(1) & (others < row).any(1)
            found[pipeline] = int(weaker.sum())
    return found


def _is_within(part: Names, sequence: Names) -> bool:
    """Whether the stages of ``part`` stand in ``sequence``, in this order."""
    return part == tuple(name for name in sequence if name in part)
