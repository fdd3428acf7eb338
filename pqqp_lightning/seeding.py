"""Seeds that depend on the position in a run (stage, epoch, step), so that a resumed run draws the same numbers."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def run_seed() -> int:
    """The run's seed: the one that Lightning's ``seed_everything`` set, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def seed_from(*parts: int) -> None:
    """Seed Python, NumPy and torch from ``parts``, such as (run seed, segment, epoch, step)."""
    # A hash mixes the parts: sums would give neighbouring steps and epochs the same seed.
    digest = hashlib.sha256(repr(parts).encode()).digest()
    random.seed(digest)
    np.random.seed(int.from_bytes(digest[:4], "little"))
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # manual_seed takes 63 bits


def random_state() -> dict[str, Any]:
    """The random state of Python, NumPy, torch and all GPUs, as tensors and plain data."""
    version, python, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()  # a tuple, unlike what its type says
    name, numpy, *rest = numpy_state
    return {
        "python": [version, torch.tensor(python), gauss],
        "numpy": [name, torch.from_numpy(numpy.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the random state that :func:`random_state` returned."""
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python.tolist()), gauss))
    name, numpy, *rest = state["numpy"]
    np.random.set_state((name, numpy.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Restore the random state of Python, NumPy, torch and all GPUs on exit, also after an exception."""
    python = random.getstate()
    numpy = np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
