"""Random state as a function of where the run is, not of how it got there."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Random state (Python, NumPy, torch, GPUs) is afterwards as before, also after an exception."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
