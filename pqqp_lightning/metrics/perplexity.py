"""Perplexity from a summed cross-entropy, finite where a softmax followed by a log is not."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

TOKENS_AT_ONCE = 64
LARGEST_MEAN = math.log(sys.float_info.max)


class Perplexity(Metric):
    """``exp`` of the mean negative log-likelihood per token, over everything seen.

    The log-softmax runs in float32 on a few tokens at a time, whatever the dtype of the logits; the sum is kept in
    float64 and stays there when the module around it is converted to half precision. A mean beyond 709 nats, where
    ``exp`` leaves float64, gives the largest float64 instead of infinity; NaN in the logits stays NaN.

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
            for some, wanted in zip(sequence.split(TOKENS_AT_ONCE), labels.split(TOKENS_AT_ONCE), strict=True):
                losses = F.cross_entropy(some.float(), wanted, ignore_index=self.ignore_index, reduction="none")
                self.total = self.total + losses.double().sum()
        self.count = self.count + (targets != self.ignore_index).sum()

    def compute(self) -> Tensor:
        """The perplexity, a float64 scalar; NaN if nothing was counted."""
        return (self.total / self.count).clamp(max=LARGEST_MEAN).exp()

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> torch.nn.Module:
        """Follow the module to another device, never to another dtype."""

        def move(state: Tensor) -> Tensor:
            return state.to(fn(state.new_empty(0)).device)

        return super()._apply(move, exclude_state)
