"""Allocation of bits and sparsities to layers under a budget, and the cost that it minimizes.

The cost of a change dW [O, I] of a layer's weight, with inputs X [T, I] and H = X^T X, is
``sum_o g_o * dW_o H dW_o^T``: the squared error of each output, summed over the tokens and weighted. With g = 1 it is
the objective that SparseGPT and GPTQ minimize. With g_o the mean squared gradient of the loss with respect to output
o it estimates what the change does to the loss: the Gauss-Newton term with the empirical Fisher matrix's diagonal
over outputs (as in Optimal Brain Damage, LeCun et al. 1990, section 2, but per output, not per weight).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

Costs = Sequence[Sequence[float]]
"""The cost of each option of each layer."""

Amounts = Sequence[Sequence[int]]
"""What each option of each layer takes of the budget."""


def output_error(change: Tensor, hessian: Tensor, importance: Tensor | None = None) -> float:
    """Compute ``sum_o g_o * dW_o H dW_o^T``.

    Args:
        change: dW [O, I].
        hessian: X^T X [I, I].
        importance: g [O], >= 0; by default 1 for every output.
    """
    change = change.float()
    rows = (change @ hessian).mul_(change).sum(dim=1).clamp_(min=0)  # [O]; rounding can make it slightly negative
    if importance is not None:
        rows = rows * importance
    return float(rows.double().sum())


def spend_rest(
    chosen: Sequence[int], lower: Sequence[int], gains: Sequence[float], granules: Sequence[int], rest: int
) -> list[int]:
    """Lower the ``chosen`` counts by ``rest`` in total, or by as much less as whole granules allow.

    An allocation from a few options per layer does not use up its budget. This function lowers each layer's count
    towards its next option, in whole granules, and starts with the layers that gain most.

    Args:
        chosen: count of each layer (weights to remove).
        lower: the count that each layer may be lowered to; equal to ``chosen`` for a layer that must not change.
        gains: what a layer gains per unit by which its count is lowered.
        granules: the step in which each count can change.
        rest: by how much to lower the sum.

    Returns:
        The new count of each layer.
    """
    counts = list(chosen)
    most_gain_first = sorted(range(len(counts)), key=lambda layer: -gains[layer])
    for layer in most_gain_first:
        step = min(rest, counts[layer] - lower[layer]) // granules[layer] * granules[layer]
        counts[layer] -= step
        rest -= step
    return counts


@dataclass(frozen=True)
class SparsityOptions:
    """What each of the sparsities to choose from would do to one layer.

    Attributes:
        entries: weights of the layer.
        parts: parts of the matrix, of equal size, that each lose the same number of entries.
        removed: entries that go, for each sparsity; more than its share where an earlier mask removed more.
        costs: what that costs, for each sparsity.
    """

    entries: int
    parts: int
    removed: Sequence[int]
    costs: Sequence[float]


def allocate_sparsities(sparsity: float, sparsities: Sequence[float], layers: Sequence[SparsityOptions]) -> list[float]:
    """Each layer's sparsity: the cheapest of ``sparsities``, with ``sparsity`` over all layers together.

    The options rarely add up to the entries that are due. The cheapest choice that removes at least as many is found,
    and then the layers that gain most by it get entries back, until as many go as were asked for.

    Args:
        sparsity: fraction of all entries to remove.
        sparsities: those to choose from.
        layers: of each layer, what they would do.
    """
    entries = sum(layer.entries for layer in layers)
    due = round(sparsity * entries)
    kept = []
    for layer in layers:
        kept.append([layer.entries - count for count in layer.removed])
    budget = max(entries - due, sum(map(min, kept)))  # earlier masks may have removed more than is due
    picked = allocate([layer.costs for layer in layers], kept, budget)
    chosen, lower, gains = [], [], []
    for layer, k in zip(layers, picked, strict=True):
        below = _option_below(layer.removed, k)
        chosen.append(layer.removed[k])
        lower.append(layer.removed[below])
        gains.append((layer.costs[k] - layer.costs[below]) / max(1, layer.removed[k] - layer.removed[below]))
    rest = max(0, sum(chosen) - due)
    lowered = spend_rest(chosen, lower, gains, [layer.parts for layer in layers], rest)
    fractions = []
    for layer, k, before, after in zip(layers, picked, chosen, lowered, strict=True):
        part = layer.entries // layer.parts  # the entries of which the fraction is rounded to a count
        fractions.append((round(sparsities[k] * part) - (before - after) // layer.parts) / part)
    return fractions


def _option_below(removed: Sequence[int], chosen: int) -> int:
    """The option that removes the next fewer entries, or the one chosen where there is none."""
    fewer = [k for k, count in enumerate(removed) if count < removed[chosen]]
    return max(fewer, key=removed.__getitem__, default=chosen)


def allocate(costs: Costs, amounts: Amounts, budget: int) -> list[int]:
    """Choose one option per layer: the least total cost whose total amount is within ``budget``.

    Among equally cheap choices it prefers one that spends more of the budget.

    Args:
        costs: the cost of each option of each layer, >= 0.
        amounts: what each option of each layer takes of the budget (bits, bytes, weights kept), integers >= 0.
        budget: the largest total amount, in the same unit.

    Returns:
        The index of the chosen option of each layer.

    Raises:
        ValueError: no choice fits, or a cost is NaN, infinite or negative.
    """
    for layer, options in enumerate(costs):
        if not all(math.isfinite(cost) and cost >= 0 for cost in options):
            raise ValueError(f"the costs of layer {layer} are not all finite and >= 0: {list(options)}")
    least = sum(map(min, amounts))
    if least > budget:
        raise ValueError(f"the smallest options take {least} together, more than the budget of {budget}")
    chosen = []  # start from each layer's smallest option, the cheaper one of equals: it fits
    for row, prices in zip(amounts, costs, strict=True):
        chosen.append(min(range(len(row)), key=list(zip(row, prices, strict=True)).__getitem__))
    # The solver's tolerances are absolute, so its answer is only as exact as the scale of the costs. Solve again at
    # the scale of the last answer until that no longer helps.
    for _ in range(3):
        cost = _total(costs, chosen)
        better = _solve(costs, amounts, budget, cost or 1.0)
        if _total(costs, better) >= cost:
            break
        chosen = better
    return _spend_for_free(chosen, costs, amounts, budget)


def _total(values: Sequence[Sequence[float]], chosen: Sequence[int]) -> float:
    """The sum of the chosen options' values over the layers."""
    return sum(row[option] for row, option in zip(values, chosen, strict=True))


def _spend_for_free(chosen: Sequence[int], costs: Costs, amounts: Amounts, budget: int) -> list[int]:
    """Spend the unused budget on layers whose cost does not rise.

    Each round offers every layer its next larger option. Layers that cost nothing therefore share the budget evenly.
    """
    chosen = list(chosen)
    unused = budget - sum(row[option] for row, option in zip(amounts, chosen, strict=True))
    changed = True
    while changed:
        changed = False
        for layer, option in enumerate(chosen):
            amount = amounts[layer]
            cost = costs[layer]
            larger = [k for k in range(len(amount)) if amount[k] > amount[option] and cost[k] <= cost[option]]
            if not larger:
                continue
            next_option = min(larger, key=amount.__getitem__)
            extra = amount[next_option] - amount[option]
            if extra <= unused:
                chosen[layer] = next_option
                unused -= extra
                changed = True
    return chosen


def _solve(costs: Costs, amounts: Amounts, budget: int, scale: float) -> list[int]:
    """Solve the allocation as a multiple-choice knapsack by integer programming.

    ``scale`` is the total cost of some feasible choice. Options that alone cost more cannot be part of the optimum.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # here: most commands do without it
    from scipy.sparse import csr_matrix

    pairs: list[tuple[int, int]] = []  # (layer, option), one binary variable each
    for layer, row in enumerate(costs):
        pairs.extend((layer, option) for option, cost in enumerate(row) if cost <= scale)
    # In units of their greatest common divisor the sizes are small integers, so that the solver's tolerance cannot
    # hide a unit. The prices are scaled to about 1 per layer for the same reason.
    unit = math.gcd(*(amounts[layer][option] for layer, option in pairs)) or 1
    sizes = np.array([amounts[layer][option] // unit for layer, option in pairs], dtype=float)
    prices = np.array([costs[layer][option] for layer, option in pairs]) * (len(costs) / scale)
    variables = np.arange(len(pairs))
    rows = [layer for layer, _ in pairs]
    one_each = csr_matrix((np.ones(len(pairs)), (rows, variables)), shape=(len(costs), len(pairs)))
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
        chosen = {}
        for (layer, option), selected in zip(pairs, result.x, strict=True):
            if selected > 0.5:
                chosen[layer] = option
        excess = sum(amounts[layer][option] for layer, option in chosen.items()) - budget
        if excess <= 0:
            return [chosen[layer] for layer in range(len(costs))]
        # The answer is within the solver's tolerance but over the budget: lower the limit by the excess, rounded up.
        limit -= -(-excess // unit)
