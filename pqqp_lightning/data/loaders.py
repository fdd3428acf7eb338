"""DataLoaders that leave the global random state alone, except where training augments with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Dataset, Sampler

from pqqp_lightning.data.samplers import EpochSampler
from pqqp_lightning.errors import Problem, RecipeError


def train_loader(
    data: Any, batch_size: int, seed: int, num_workers: int, collate: Callable | None = None
) -> DataLoader[Any]:
    """Batches in an order that depends on (seed, epoch) alone."""
    sampler = EpochSampler(data, seed)
    return DataLoader(data, batch_size, sampler=sampler, num_workers=num_workers, collate_fn=collate)


def fixed_loader(
    data: Any, batch_size: int, num_workers: int, collate: Callable | None = None, sampler: Sampler[int] | None = None
) -> DataLoader[Any]:
    """Batches in the order of the data; iterating draws nothing from the global random state."""
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        data, batch_size, sampler=sampler, num_workers=num_workers, collate_fn=collate, generator=generator
    )


def evaluation_loader(data: Any, batch_size: int, num_workers: int, collate: Callable | None = None) -> DataLoader[Any]:
    """As :func:`fixed_loader`; in a distributed run each process gets its share, and no sample counts twice.

    Raises:
        RecipeError: there are fewer samples than processes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return fixed_loader(data, batch_size, num_workers, collate)
    if len(data) < (ranks := torch.distributed.get_world_size()):
        text = f"needs at least one evaluation sample per process: got {len(data)} for {ranks}"
        raise RecipeError(Problem(text=text, way_out="Use more samples.").within("data"))
    return fixed_loader(data, batch_size, num_workers, collate, UnrepeatedDistributedSampler(data, shuffle=False))


def whole(loader: Any) -> Any:
    """The loader of all processes' shares together, the same on each of them, of one by :func:`evaluation_loader`."""
    if not isinstance(getattr(loader, "sampler", None), UnrepeatedDistributedSampler):
        return loader
    return fixed_loader(loader.dataset, loader.batch_size, loader.num_workers, loader.collate_fn)


def draw(count: int, samples: int, seed: int) -> list[int]:
    """``samples`` distinct indices below ``count``, in ascending order, the same for the same seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:samples].tolist())


def require(available: int, knob: str, wanted: int | None, what: str) -> int:
    """How many samples to take: all of them, or as many as the knob says, if there are so many."""
    if wanted is not None and wanted > available:
        text = f"is more than the {available} {what}"
        raise RecipeError(Problem(knob, wanted, text, f"Lower {knob}.").within("data"))
    return available if wanted is None else wanted


def check_positive(lowest: int = 1, **numbers: int | None) -> list[Problem]:
    """A problem for each number below ``lowest``; None passes."""
    return [
        Problem(name, value, "is too small", f"Use {lowest} or more.").within("data")
        for name, value in numbers.items()
        if value is not None and value < lowest
    ]


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Rows of token ids [N, T] as ``{"input_ids": LongTensor [T]}``.

    Args:
        rows: an integer tensor or array.
        indices: which rows, in this order; None for all.
    """

    def __init__(self, rows: Any, indices: Sequence[int] | None = None) -> None:
        self.rows = rows
        self.indices = range(len(rows)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[self.indices[index]]
        return {"input_ids": torch.as_tensor(row.astype("int64") if hasattr(row, "astype") else row).long()}
