"""Importance of the channels of a coupled group, and the choice of the channels to keep.

A coupled group holds everything that one channel runs through: the rows of the layers that compute it, the columns of
the layers that read it, and the entries of the norms between them. A unit is a channel, or an attention head of
several rows. The importance of a unit is a sum over the whole group:

- norm: the l2 norm of all its weights (Fang et al. 2023, DepGraph, arXiv 2301.12900, section 3.3, without its learned
  sparsity weights; for one filter it is the criterion of Li et al. 2017, arXiv 1608.08710, with l2 instead of l1);
- activation: its mean squared activation at the input of each layer that reads it;
- taylor: first-order |weight * gradient|, summed over its weights and averaged over batches (Molchanov et al. 2019,
  arXiv 1906.10771, section 3.1, with the absolute value instead of the square).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pqqp_lightning.algorithms.selection import lowest


def sum_by_channel(values: Tensor, dim: int) -> Tensor:
    """Sum ``values`` [..., C, ...] over all dimensions except ``dim``, in float32 or wider: [C]."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return wide.movedim(dim, 0).flatten(1).sum(dim=1) if wide.dim() > 1 else wide


def sum_by_unit(channels: Tensor, index: Tensor) -> Tensor:
    """Sum over each unit's channels: [U].

    Args:
        channels: one number per channel, [C].
        index: the channels of each unit, [U, K].
    """
    return channels[index.to(channels.device)].sum(dim=1)


def group_norm(squares: Sequence[Tensor]) -> Tensor:
    """Compute the l2 norm of each unit [U] from the summed squared weights of every member of the group, each [U]."""
    return torch.stack(list(squares)).sum(dim=0).sqrt()


def taylor_terms(weight: Tensor, gradient: Tensor) -> Tensor:
    """Estimate to first order how much the loss changes when each weight is removed: same shape, float32, >= 0."""
    return (weight.float() * gradient.float()).abs()


def kept_count(width: int, ratio: float) -> int:
    """Units that stay of ``width``: ``width - round(ratio * width)``, at least 1."""
    return max(1, width - round(ratio * width))


def choose_units(scores: Tensor, ratio: float) -> Tensor:
    """The indices of the units that stay, ascending: the most important ones; of equal ones the later.

    Args:
        scores: importance of each unit, [U].
        ratio: fraction to remove.

    Raises:
        ArithmeticError: a score is NaN or infinite.
    """
    if not bool(torch.isfinite(scores).all()):
        raise ArithmeticError("its channels' importance holds NaN or infinite values")
    gone = lowest(scores[None], len(scores) - kept_count(len(scores), ratio))[0]
    return (~gone).nonzero().flatten()
