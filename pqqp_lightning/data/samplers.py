"""The order of training: a function of seed and epoch, so that a resumed run goes on as if it had not stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """A permutation of ``data`` that depends on ``(seed, epoch)`` alone, drawn when iteration begins.

    Lightning calls ``set_epoch`` before each epoch. Nothing is read from or left in the global random state.

    Args:
        data: what is sampled from; only its length matters.
        seed: of the order.
    """

    def __init__(self, data: Sized, seed: int = 0) -> None:
        self.data = data
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The next iteration gives the order of this epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        yield from torch.randperm(len(self.data), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.data)
