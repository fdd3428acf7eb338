"""The order of the training samples, a function of seed and epoch: a resumed run sees the same order."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """A permutation of ``data`` that depends on ``(seed, epoch)`` alone, drawn when iteration begins.

    Lightning calls ``set_epoch`` before each epoch. The global random state is neither read nor changed.

    Args:
        data: the samples; only their number is used.
        seed: of the permutation.
    """

    def __init__(self, data: Sized, seed: int = 0) -> None:
        self.data = data
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration yields."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # A large prime keeps the epochs of neighbouring seeds apart: seed 0, epoch 1 is not seed 1, epoch 0.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        yield from torch.randperm(len(self.data), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.data)
