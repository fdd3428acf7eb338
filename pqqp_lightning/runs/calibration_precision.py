"""The precision of float32 matrix products in calibration's forward passes and in the statistics of their inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from lightning.pytorch import Trainer

MatmulPrecision = Literal["highest", "high", "medium"]
"""The words of ``torch.set_float32_matmul_precision``."""


@contextmanager
def forward_context(trainer: Trainer) -> Iterator[None]:
    """The precision of calibration's forward passes; factorizations and sweeps lie outside of them."""
    precision = getattr(trainer, "calibration_precision", None)  # only our own trainer has it
    with trainer.precision_plugin.forward_context(), matmul_precision(precision):
        yield


@contextmanager
def matmul_precision(precision: MatmulPrecision | None) -> Iterator[None]:
    """Compute float32 matrix products with ``precision`` inside; None changes nothing. Restores torch's on exit."""
    if precision is None:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
