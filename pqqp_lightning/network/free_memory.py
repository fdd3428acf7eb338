"""How much memory this process can still take."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_MEMORY = Path("/proc/meminfo")
_GROUP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes that the machine has free and the control groups of this process allow; None where nobody tells."""
    known = _limits()
    with suppress(OSError):
        for line in _MEMORY.read_text().splitlines():
            if line.startswith("MemAvailable"):  # "MemAvailable:   123456 kB"
                known.append(int(line.split()[1]) * 1024)
    return min(known, default=None)


def _limits() -> list[int]:
    """The limits of the control groups of both versions, in bytes."""
    files = [_GROUPS / "memory.max", _GROUPS / "memory" / "memory.limit_in_bytes"]  # those of a container
    with suppress(OSError):
        for line in _GROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                files.append(_GROUPS / path.strip("/") / "memory.max")
            elif "memory" in controllers.split(","):
                files.append(_GROUPS / "memory" / path.strip("/") / "memory.limit_in_bytes")
    limits = []
    for file in files:
        with suppress(OSError, ValueError):  # "max" is no number
            limits.append(int(file.read_text()))
    return limits
