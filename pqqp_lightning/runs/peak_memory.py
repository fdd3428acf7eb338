"""Peak memory of a piece of work."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Filled in when the work is done: GPU memory on a GPU, else the process's resident memory, in bytes."""

    size_bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of work on ``device``; where the system cannot start anew (not Linux), the process's so far."""
    peak, on_gpu = Peak(), device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        _RESET.write_text("5")
    try:
        yield peak
    finally:
        peak.size_bytes = torch.cuda.max_memory_allocated() if on_gpu else _resident_peak()


def _resident_peak() -> int:
    if _STATUS.exists():
        line = next((s for s in _STATUS.read_text().splitlines() if s.startswith("VmHWM")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
