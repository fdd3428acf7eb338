"""What a change of a layer costs, and how a budget's remainder is spent, for allocating bits and sparsities.

The cost of a change dW [O, I] of a layer's weight, with inputs X [T, I] and H = X^T X, is
``sum_o g_o * dW_o H dW_o^T``: the squared error of each output, summed over the tokens and weighted. With g = 1 it is
the objective that SparseGPT and GPTQ minimize. With g_o the mean squared gradient of the loss with respect to output
o it estimates what the change does to the loss: the Gauss-Newton term with the empirical Fisher matrix's diagonal
over outputs (as in Optimal Brain Damage, LeCun et al. 1990, section 2, but per output, not per weight).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def output_error(change: Tensor, hessian: Tensor, importance: Tensor | None = None) -> float:
    """``sum_o g_o * dW_o H dW_o^T``.

    Args:
        change: dW [O, I].
        hessian: X^T X [I, I].
        importance: g [O], >= 0; 1 for every output if left out.
    """
    change = change.float()
    rows = (change @ hessian).mul_(change).sum(dim=1).clamp_(min=0)  # [O]; rounding may leave it below 0
    return float((rows if importance is None else rows * importance).double().sum())


def spend_rest(
    chosen: Sequence[int], lower: Sequence[int], gains: Sequence[float], granules: Sequence[int], rest: int
) -> list[int]:
    """Counts that together are ``rest`` below those ``chosen``, as nearly as the granules allow and never further.

    An allocation from a few options a layer leaves some of its budget over. Here each layer's count is lowered towards
    its next option, the layers that gain most by it first, by whole granules.

    Args:
        chosen: count of each layer (weights to remove).
        lower: the count that each may be lowered to; equal to ``chosen`` where there is none.
        gains: what a layer gains by each unit that its count is lowered.
        granules: units by which each count can change.
        rest: how far the sum is to be lowered.
    """
    counts = list(chosen)
    for i in sorted(range(len(counts)), key=lambda i: -gains[i]):
        step = min(rest, counts[i] - lower[i]) // granules[i] * granules[i]
        counts[i] -= step
        rest -= step
    return counts
