"""DataLoaders that leave the global random state alone; only the augmentation of training images draws from it."""

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
    """Batches in the order of the data."""
    # Without a generator of its own, a DataLoader draws its workers' base seed from the global random state.
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        data, batch_size, sampler=sampler, num_workers=num_workers, collate_fn=collate, generator=generator
    )


def evaluation_loader(data: Any, batch_size: int, num_workers: int, collate: Callable | None = None) -> DataLoader[Any]:
    """Batches in the order of the data; in a distributed run, of this process's share.

    Raises:
        RecipeError: there are fewer samples than processes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return fixed_loader(data, batch_size, num_workers, collate)
    ranks = torch.distributed.get_world_size()
    if len(data) < ranks:
        text = f"needs at least one evaluation sample per process: got {len(data)} for {ranks}"
        raise RecipeError(Problem(text=text, way_out="Use more samples.").within("data"))
    # Lightning's default sampler repeats samples to fill the last batch, which would change the metric.
    return fixed_loader(data, batch_size, num_workers, collate, UnrepeatedDistributedSampler(data, shuffle=False))


def undivided_loader(loader: Any) -> Any:
    """The same loader over the samples of all processes, given one that :func:`evaluation_loader` divided."""
    if not isinstance(getattr(loader, "sampler", None), UnrepeatedDistributedSampler):
        return loader
    return fixed_loader(loader.dataset, loader.batch_size, loader.num_workers, loader.collate_fn)


def draw_indices(count: int, samples: int, seed: int) -> list[int]:
    """Draw ``samples`` distinct indices below ``count``, in ascending order; they depend on ``seed`` only."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:samples].tolist())


def require_samples(available: int, argument: str, wanted: int | None, what: str) -> int:
    """How many samples to take: ``wanted``, or all of them if it is None.

    Raises:
        RecipeError: fewer than ``wanted`` are available.
    """
    if wanted is not None and wanted > available:
        text = f"is more than the {available} {what}"
        raise RecipeError(Problem(argument, wanted, text, f"Lower {argument}.").within("data"))
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
        if hasattr(row, "astype"):  # a NumPy array may have a type that torch lacks, such as uint16
            row = row.astype("int64")
        return {"input_ids": torch.as_tensor(row).long()}
