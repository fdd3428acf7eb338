"""Writes and reads a run's records, one per stage, and its report."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch

from pqqp_lightning.storage.files import append_line, read_lines, write_json
from pqqp_lightning.storage.reports import Record, SizeNumbers
from pqqp_lightning.storage.run_folder import RunFolder

PACKAGES = (
    *("pqqp-lightning", "torch", "lightning", "torchmetrics", "transformers", "timm", "datasets", "safetensors"),
    *("peft", "bitsandbytes", "torch-pruning", "torchvision", "scipy"),
)


def make_record(
    *,
    name: str,
    method: str,
    options: dict[str, Any],
    metrics: dict[str, float],
    size: SizeNumbers,
    dense: Record | None,
    elapsed_s: float,
    peak_memory_bytes: int,
    constraints_verified: bool,
    notes: list[str],
    undone: bool = False,
) -> Record:
    """Make one stage's record as plain data.

    Args:
        name: the stage's name, "dense" for the baseline.
        method: name of its class.
        options: its arguments.
        metrics: measured after it.
        size: counted after it, from :func:`~pqqp_lightning.checkpoint.size.size_numbers`.
        dense: the baseline's record, None for the baseline itself.
        elapsed_s: compression and finetuning, without evaluation.
        peak_memory_bytes: of compression and finetuning.
        constraints_verified: every promise of every stage so far holds exactly.
        notes: unusual events.
        undone: the stage gave up a constraint of an earlier stage.
    """
    odd = [f"{k} is {v}" for k, v in metrics.items() if not math.isfinite(v)]
    return {
        "name": name,
        "method": method,
        "options": options,
        "metrics": {k: finite_or_none(v) for k, v in metrics.items()},
        "nominal_rate": size["nominal_rate"],
        "size_bytes": size["size_bytes"],
        "compression_rate": (dense or size)["size_bytes"] / size["size_bytes"],
        "sparsity": size["sparsity"],
        "pruned": size["pruned"],
        "bits_per_weight": size["bits_per_weight"],
        "model_sparsity": size["model_sparsity"],
        "model_bits_per_weight": size["model_bits_per_weight"],
        "elapsed_s": round(elapsed_s, 3),
        "peak_memory_bytes": peak_memory_bytes,
        "constraints_verified": constraints_verified,
        "notes": [*notes, *odd],
        "undone": undone,
    }


def finite_or_none(value: float) -> float | None:
    """The value, or None if it is not finite: JSON has no infinity."""
    return value if math.isfinite(value) else None


def append_record(folder: Path, record: Record) -> None:
    """Append a finished stage to the run's records and flush it to the disk."""
    append_line(RunFolder(folder).records, json.dumps(record))


def read_records(folder: Path) -> list[Record]:
    """The records of the finished stages, baseline first."""
    return cast(list[Record], read_lines(RunFolder(folder).records))


def write_report(folder: Path, *, status: str, records: Sequence[Record], **more: Any) -> None:
    """Write ``report.json``: the whole run so far."""
    report = {
        "status": status,
        **more,
        "versions": package_versions(),
        "hardware": hardware(),
        "stages": list(records),
    }
    write_json(RunFolder(folder).report, report)


@cache
def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The properties of the machine that times and last digits depend on."""
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
