"""What a change of a layer costs, and how a budget's remainder is spent, for allocating bits and sparsities.

The cost of a change dW [O, I] of a layer's weight, with inputs X [T, I] and H = X^T X, is
``sum_o g_o * dW_o H dW_o^T``: the squared error of each output, summed over the tokens and weighted. With g = 1 it is
the objective that SparseGPT and GPTQ minimize. With g_o the mean squared gradient of the loss with respect to output
o it estimates what the change does to the loss: the Gauss-Newton term with the empirical Fisher matrix's diagonal
over outputs (as in Optimal Brain Damage, LeCun et al. 1990, section 2, but per output, not per weight).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

Costs = Sequence[Sequence[float]]

Amounts = Sequence[Sequence[int]]


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


def allocate(costs: Costs, amounts: Amounts, budget: int) -> list[int]:
    """The index of one option for each layer: the least summed cost with summed amounts at most ``budget``.

    Of equally cheap choices one that spends more of the budget.

    Args:
        costs: for each layer the cost of each option, >= 0.
        amounts: for each layer what each option takes of the budget (bits, bytes, weights kept), integers >= 0.
        budget: the most that all may take together, in the same unit.

    Raises:
        ValueError: no choice fits, or a cost is NaN, infinite or negative.
    """
    if bad := [i for i, options in enumerate(costs) if not all(math.isfinite(c) and c >= 0 for c in options)]:
        raise ValueError(f"the costs of layer {bad[0]} are not all finite and >= 0: {list(costs[bad[0]])}")
    least = sum(map(min, amounts))
    if least > budget:
        raise ValueError(f"the smallest options take {least} together, more than the budget of {budget}")
    chosen = [min(range(len(row)), key=lambda k: (row[k], costs[i][k])) for i, row in enumerate(amounts)]
    for _ in range(3):  # the solver's tolerances are absolute: solve again at the scale of what was found
        scale = sum(costs[i][k] for i, k in enumerate(chosen))
        found = _solve(costs, amounts, budget, scale or 1.0)
        if sum(costs[i][k] for i, k in enumerate(found)) >= scale:
            break
        chosen = found
    return _spend(chosen, costs, amounts, budget)


def _spend(chosen: Sequence[int], costs: Costs, amounts: Amounts, budget: int) -> list[int]:
    """What is left of the budget goes round, one option at a time, to layers whose cost does not rise by it.

    So layers that cost nothing whatever they get share the rest evenly.
    """
    chosen, left = list(chosen), budget - sum(amounts[i][k] for i, k in enumerate(chosen))
    before = None
    while before != chosen:
        before = list(chosen)
        for i, k in enumerate(before):
            more = [j for j, a in enumerate(amounts[i]) if a > amounts[i][k] and costs[i][j] <= costs[i][k]]
            if more and (step := amounts[i][j := min(more, key=amounts[i].__getitem__)] - amounts[i][k]) <= left:
                chosen[i], left = j, left - step
    return chosen


def _solve(costs: Costs, amounts: Amounts, budget: int, scale: float) -> list[int]:
    """The optimum among options that cost at most ``scale``, which some feasible choice costs in all."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # here: most commands do without it
    from scipy.sparse import csr_matrix

    pairs = [(i, k) for i, row in enumerate(costs) for k, cost in enumerate(row) if cost <= scale]
    unit = math.gcd(*(amounts[i][k] for i, k in pairs)) or 1  # small integers: tolerances then cannot hide a unit
    sizes = np.array([amounts[i][k] // unit for i, k in pairs], dtype=float)
    prices = np.array([costs[i][k] for i, k in pairs]) * (len(costs) / scale)
    columns = np.arange(len(pairs))
    one_each = csr_matrix((np.ones(len(pairs)), ([i for i, _ in pairs], columns)), shape=(len(costs), len(pairs)))
    limit = budget // unit
    while True:
        fits = LinearConstraint(sizes[None], ub=limit)
        result = milp(
            prices,
            constraints=[LinearConstraint(one_each, 1, 1), fits],
            integrality=np.ones(len(pairs)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            raise ArithmeticError(f"the solver found no allocation: {result.message}")
        chosen = {i: k for (i, k), x in zip(pairs, result.x, strict=True) if x > 0.5}
        over = sum(amounts[i][k] for i, k in chosen.items()) - budget
        if over <= 0:
            return [chosen[i] for i in range(len(costs))]
        limit -= -(-over // unit)  # within the solver's tolerance, but not within the budget
