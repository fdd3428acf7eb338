"""Statistics of a layer's calibration inputs that stages use: float32 sums over tokens and ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pqqp_lightning.algorithms.hessian import add_gram, mirror_upper_triangle


def sum_over_ranks(total: Tensor) -> Tensor:
    """Sum ``total`` over the ranks of a distributed run, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total


class Statistic(ABC):
    """A sum over the input rows of a layer, separately for each group of the layer.

    Attributes:
        counts: the rows that each group has seen, [groups].
        total: the sum.

    Args:
        groups: a grouped convolution's groups, the experts of a fused weight, else 1.
        columns: I, the columns of the weight matrix.
        device: where to accumulate.
    """

    def __init__(self, groups: int, columns: int, device: torch.device) -> None:
        self.counts = torch.zeros(groups, dtype=torch.int64, device=device)
        self.total = self.empty(groups, columns, device)

    @abstractmethod
    def empty(self, groups: int, columns: int, device: torch.device) -> Tensor:
        """Return the sum over no rows: zeros."""

    @abstractmethod
    def accumulate(self, rows: Tensor) -> None:
        """Add ``rows`` [groups, T, I]."""

    @abstractmethod
    def value(self) -> Tensor:
        """Return the finished statistic; its first dimension is groups."""

    @classmethod
    def of_hessian(cls, hessians: Tensor) -> Tensor:
        """The value for a known X^T X per group [groups, I, I]; ``allocation: sensitivity`` needs it.

        Raises:
            NotImplementedError: the statistic does not follow from X^T X.
        """
        raise NotImplementedError(f"{cls.__name__} defines no of_hessian, which allocation: sensitivity needs")

    @property
    def rows(self) -> Tensor:
        """The rows that the groups have seen; where they see different ones, the most of any."""
        return self.counts.max()

    def add(self, rows: Tensor) -> None:
        """Add ``rows`` [groups, T, I] and count them."""
        self.counts += rows.shape[1]
        self.accumulate(rows)

    def add_to(self, group: int, rows: Tensor) -> None:
        """Add ``rows`` [T, I] to one group and count them."""
        self.counts[group] += rows.shape[0]
        whole = self.total
        self.total = whole[group : group + 1]
        self.accumulate(rows[None])
        whole[group : group + 1] = self.total
        self.total = whole

    def reduce(self) -> None:
        """Sum over the ranks of a distributed run."""
        sum_over_ranks(self.total)
        sum_over_ranks(self.counts)


class Hessian(Statistic):
    """X^T X per group: [groups, I, I] (SparseGPT, GPTQ)."""

    def empty(self, groups: int, columns: int, device: torch.device) -> Tensor:
        return torch.zeros(groups, columns, columns, dtype=torch.float32, device=device)

    def accumulate(self, rows: Tensor) -> None:
        for total, group in zip(self.total, rows, strict=True):
            add_gram(total, group)

    def value(self) -> Tensor:
        for total in self.total:
            mirror_upper_triangle(total)
        return self.total

    @classmethod
    def of_hessian(cls, hessians: Tensor) -> Tensor:
        return hessians


class PairedHessian(Hessian):
    """X^T X, and X^T Y with the rows Y that the layer reads in the dense model: [groups, 2, I, I].

    X^T Y is 0 for a group some of whose rows have no counterpart in the dense model (another expert reads them there).
    """

    def __init__(self, groups: int, columns: int, device: torch.device) -> None:
        super().__init__(groups, columns, device)
        self._paired = torch.zeros_like(self.counts)

    def empty(self, groups: int, columns: int, device: torch.device) -> Tensor:
        return torch.zeros(groups, 2, columns, columns, dtype=torch.float32, device=device)

    def accumulate(self, rows: Tensor) -> None:
        for total, group in zip(self.total, rows, strict=True):
            add_gram(total[0], group)

    def add_pair(self, rows: Tensor, dense: Tensor) -> None:
        """Add ``rows`` [groups, T, I] and the rows of the same tokens in the dense model."""
        self.add(rows)
        for total, group, dense_group in zip(self.total, rows, dense, strict=True):
            total[1].addmm_(group.float().T, dense_group.float())
        self._paired += rows.shape[1]

    def reduce(self) -> None:
        super().reduce()
        sum_over_ranks(self._paired)

    def value(self) -> Tensor:
        for total, complete in zip(self.total, self._paired.eq(self.counts).tolist(), strict=True):
            mirror_upper_triangle(total[0])
            if not complete:
                total[1].zero_()
        return self.total

    @classmethod
    def of_hessian(cls, hessians: Tensor) -> Tensor:
        return torch.stack([hessians, hessians], dim=1)


class SquaredNorm(Statistic):
    """The squared l2 norm of every input column: [groups, I] (Wanda)."""

    def empty(self, groups: int, columns: int, device: torch.device) -> Tensor:
        return torch.zeros(groups, columns, dtype=torch.float32, device=device)

    def accumulate(self, rows: Tensor) -> None:
        self.total += rows.float().square().sum(dim=1)

    def value(self) -> Tensor:
        return self.total

    @classmethod
    def of_hessian(cls, hessians: Tensor) -> Tensor:
        return hessians.diagonal(dim1=1, dim2=2)
