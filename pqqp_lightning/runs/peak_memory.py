"""Measures the peak memory of a piece of work, in bytes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """The peak, set when the work is done: allocated GPU memory on a GPU, else the process's resident memory."""

    size_bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of the work inside on ``device``.

    Only Linux can reset the resident peak. Other systems report the peak since the process began.
    """
    peak = Peak()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    reset_resident_peak()
    try:
        yield peak
    finally:
        peak.size_bytes = torch.cuda.max_memory_allocated() if on_gpu else resident_peak()


def reset_resident_peak() -> None:
    """Let :func:`resident_peak` begin anew, on Linux."""
    with suppress(OSError):
        _CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident set size (VmHWM)


def resident_peak() -> int:
    """The process's resident peak in bytes."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM"):  # "VmHWM:   123456 kB"
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
