"""Random state as a function of where the run is, not of how it got there."""

from __future__ import annotations

import hashlib
import os
import random

import numpy as np
import torch


def run_seed() -> int:
    """The run's seed: what ``seed_everything`` set, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def seed_from(*parts: int) -> None:
    """Seed Python, NumPy and torch from ``parts``."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    random.seed(digest)
    np.random.seed(int.from_bytes(digest[:4], "little"))
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
