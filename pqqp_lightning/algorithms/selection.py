"""Choice of the entries that a pruning method removes: exact counts, ties broken by position.

A mask is a bool tensor [O, I], True where the entry is kept. Scores are >= 0; the entries with the lowest scores are
removed. Entries that an earlier mask removed are removed first, and count towards the requested sparsity.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pattern = tuple[int, int]
"""N:M: at most N kept in every M consecutive columns of a row."""


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mark the ``count`` lowest entries of each row of ``scores`` [R, C]: bool [R, C]; exact under ties."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=-1, keepdim=True).values  # [R, 1]
    marked = scores <= threshold
    if bool((marked.sum(dim=-1) == count).all()):  # the usual case: no tie
        return marked
    below = scores < threshold
    tied = scores == threshold
    missing = count - below.sum(dim=-1, keepdim=True)  # how many of the tied entries to take: the first ones
    return below | (tied & (tied.cumsum(dim=-1) <= missing))


def keep_highest(
    scores: Tensor,
    *,
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    mask: Tensor | None = None,
    within: Literal["row", "matrix"] = "row",
) -> Tensor:
    """Keep-mask [O, I] of the highest ``scores`` [O, I].

    Args:
        scores: >= 0, [O, I].
        sparsity: fraction to remove, in [0, 1): ``round(sparsity * I)`` entries of every row, or
            ``round(sparsity * O * I)`` of the matrix.
        pattern: (N, M) instead: all but N of every M consecutive columns go.
        mask: [O, I], earlier keep-mask; its zeros stay removed and count.
        within: where scores are compared under ``sparsity``.
    """
    if pattern is not None:
        return keep_by_pattern(scores, pattern, mask)
    assert sparsity is not None
    if within == "row":
        return keep_by_score(scores, sparsity, mask)
    flat_mask = None if mask is None else mask.reshape(1, -1)
    return keep_by_score(scores.reshape(1, -1), sparsity, flat_mask).view_as(scores)


def keep_by_score(scores: Tensor, sparsity: float, mask: Tensor | None = None) -> Tensor:
    """Compute the keep-mask that removes the ``round(sparsity * C)`` lowest entries per row of ``scores`` [R, C]."""
    scores = removed_first(scores, mask)
    removed = lowest(scores, round(sparsity * scores.shape[-1]))
    return _within(~removed, mask)


def keep_by_pattern(scores: Tensor, pattern: Pattern, mask: Tensor | None = None) -> Tensor:
    """Compute the keep-mask of the N best of every M consecutive columns of ``scores`` [O, I]; M must divide I."""
    kept, size = pattern
    grouped = removed_first(scores, mask).unflatten(-1, (-1, size))  # [O, I / M, M]
    rank = grouped.argsort(dim=-1, stable=True).argsort(dim=-1)  # 0 is the lowest
    return _within((rank >= size - kept).flatten(-2), mask)


def keep_across(scores: list[Tensor], sparsity: float, masks: list[Tensor | None]) -> list[Tensor]:
    """Compute keep-masks that together remove ``round(sparsity * all entries)``: one threshold for all matrices.

    The threshold is found by bisection on the bits of the float32 scores, which avoids a copy of all matrices. The bits
    sort like the scores, since the scores are not negative.
    """
    total = sum(s.numel() for s in scores)
    count = round(sparsity * total)
    if count == 0:
        return [_within(torch.ones_like(s, dtype=torch.bool), m) for s, m in zip(scores, masks, strict=True)]

    def bits(index: int) -> Tensor:
        """Ordered integers [O, I]; -1 where an earlier mask removed the entry."""
        as_integers = scores[index].float().abs().contiguous().view(torch.int32)
        earlier = masks[index]
        return as_integers if earlier is None else as_integers.masked_fill(~earlier, -1)

    # Find the smallest value with at least `count` entries at or below it.
    low = -1
    high = torch.iinfo(torch.int32).max
    while low < high:
        middle = (low + high) // 2
        if sum(int((bits(i) <= middle).sum()) for i in range(len(scores))) >= count:
            high = middle
        else:
            low = middle + 1
    # All entries below the threshold go; of those equal to it, the first ones until the count is exact.
    missing = count - sum(int((bits(i) < low).sum()) for i in range(len(scores)))
    masks_out = []
    for i, earlier in enumerate(masks):
        ordered = bits(i)
        tied = (ordered == low).flatten()
        taken = tied & (tied.cumsum(0) <= missing)
        missing -= int(taken.sum())
        masks_out.append(_within(~((ordered < low) | taken.view_as(ordered)), earlier))
    return masks_out


def removed_first(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Give entries that ``mask`` removes a score below all others."""
    return scores if mask is None else scores.masked_fill(~mask, -1.0)


def _within(keep: Tensor, mask: Tensor | None) -> Tensor:
    return keep if mask is None else keep & mask
