"""Perplexity from a summed cross-entropy; torchmetrics' own takes softmax and log, and overflows on damaged models."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

TOKENS_AT_ONCE = 64  # bounds the float32 copy of the logits: 33 MB for a vocabulary of 128,000
CPU_TOKENS_AT_ONCE = 8  # a copy that small is not mapped anew for each piece, which took most of the time in bfloat16
LARGEST_MEAN = math.log(sys.float_info.max)


class Perplexity(Metric):
    """``exp`` of the mean negative log-likelihood per token over all updates.

    The log-softmax runs in float32 for logits of any dtype, and the sum is float64 even inside a half-precision model.
    A mean above 709 nats, where ``exp`` overflows float64, gives the largest float64 instead of infinity. NaN in the
    logits gives NaN.

    Args:
        ignore_index: targets with this value are not counted.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ignore_index = ignore_index
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count ``targets`` [B, T] against ``logits`` [B, T, V]."""
        if logits.ndim != 3 or logits.shape[:2] != targets.shape:
            raise ValueError(
                f"Expected `logits` [B, T, V] and `targets` [B, T], but got {list(logits.shape)} and "
                f"{list(targets.shape)}."
            )
        for sequence, labels in zip(logits.detach(), targets, strict=True):  # [T, V], [T]
            chunks = zip(sequence.split(TOKENS_AT_ONCE), labels.split(TOKENS_AT_ONCE), strict=True)
            for chunk, chunk_labels in chunks:
                self.total = self.total + self._losses(chunk, chunk_labels).double().sum()
        self.count = self.count + (targets != self.ignore_index).sum()

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The negative log-likelihood [T] in nats of each of ``targets`` [T]; float32."""
        at_once = CPU_TOKENS_AT_ONCE if logits.device.type == "cpu" else TOKENS_AT_ONCE
        pieces = []
        for piece, labels in zip(logits.split(at_once), targets.split(at_once), strict=True):
            pieces.append(F.cross_entropy(piece.float(), labels, ignore_index=self.ignore_index, reduction="none"))
        return torch.cat(pieces)

    def compute(self) -> Tensor:
        """The perplexity, a float64 scalar; NaN if nothing was counted."""
        return (self.total / self.count).clamp(max=LARGEST_MEAN).exp()

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> torch.nn.Module:
        """Move the states with the module to another device, but never convert them: half precision loses the sum."""

        def move(state: Tensor) -> Tensor:
            return state.to(fn(state.new_empty(0)).device)

        return super()._apply(move, exclude_state)
