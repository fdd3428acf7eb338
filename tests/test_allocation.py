"""The cost of changing a layer, and the choice of one option per layer under a budget."""

import itertools
import random
import time

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from pqqp_lightning.algorithms.allocation import allocate, output_error, spend_rest
from pqqp_lightning.calibration.walk import Walk
from pqqp_lightning.data import ImageData, TokenData
from pqqp_lightning.models import CausalLM, ImageClassifier
from pqqp_lightning.network.blocks import find_blocks
from pqqp_lightning.network.layers import input_rows, weight_matrix
from pqqp_lightning.stages.sensitivity import mean_squared_gradients, measure_costs
from pqqp_lightning.stages.stage import Context

# ------------------------------------------------------------------------------------------------ the knapsack


def brute_force(costs, amounts, budget):
    best = float("inf")
    for choice in itertools.product(*[range(len(row)) for row in costs]):
        if sum(amounts[i][k] for i, k in enumerate(choice)) <= budget:
            best = min(best, sum(costs[i][k] for i, k in enumerate(choice)))
    return best


def greedy(costs, amounts, budget):
    """Start from the smallest options and take the step with the largest saving per unit first."""
    chosen = [min(range(len(row)), key=row.__getitem__) for row in amounts]
    while True:
        used = sum(amounts[i][k] for i, k in enumerate(chosen))
        steps = [
            ((costs[i][chosen[i]] - costs[i][k]) / (amounts[i][k] - amounts[i][chosen[i]]), i, k)
            for i in range(len(costs))
            for k in range(len(costs[i]))
            if amounts[i][k] > amounts[i][chosen[i]]
            and used + amounts[i][k] - amounts[i][chosen[i]] <= budget
            and costs[i][k] < costs[i][chosen[i]]
        ]
        if not steps:
            return chosen
        _, i, k = max(steps)
        chosen[i] = k


def total(rows, choice):
    return sum(rows[i][k] for i, k in enumerate(choice))


@pytest.mark.parametrize("seed", range(30))
def test_the_allocation_is_the_cheapest_of_all_that_fit(seed):
    rng = random.Random(seed)
    layers, options = rng.randint(1, 5), rng.randint(1, 4)
    costs = [[10 ** rng.uniform(-8, 3) for _ in range(options)] for _ in range(layers)]
    entries = [rng.choice([331776, 110592, 884736, rng.randint(1, 10**6)]) for _ in range(layers)]
    amounts = [[n * bits for bits in rng.sample([2, 3, 4, 5, 8], options)] for n in entries]
    budget = rng.randint(sum(map(min, amounts)), sum(map(max, amounts)))
    choice = allocate(costs, amounts, budget)
    assert total(amounts, choice) <= budget
    assert total(costs, choice) == pytest.approx(brute_force(costs, amounts, budget), rel=1e-9)


def test_the_allocation_beats_the_greedy_one_where_the_budget_has_a_remainder():
    costs, amounts = [[13.0, 0.0], [9.0, 0.0], [9.0, 0.0]], [[0, 6], [0, 5], [0, 5]]
    assert total(costs, greedy(costs, amounts, 10)) == 18
    assert total(costs, allocate(costs, amounts, 10)) == 13


def test_a_language_models_layers_are_allocated_at_once():
    rng = random.Random(0)
    entries = [n for _ in range(30) for n in (331776, 110592, 110592, 331776, 884736, 884736, 884736)]
    costs = [sorted((10 ** rng.uniform(-5, 3) for _ in range(4)), reverse=True) for _ in entries]
    amounts = [[n * bits for bits in (2, 3, 4, 8)] for n in entries]
    start = time.perf_counter()
    choice = allocate(costs, amounts, 3 * sum(entries))
    assert time.perf_counter() - start < 5  # some 0.1 s on a free core
    assert total(amounts, choice) <= 3 * sum(entries)
    assert total(costs, choice) <= total(costs, greedy(costs, amounts, 3 * sum(entries)))


def test_what_does_not_fit_and_what_is_no_cost_is_said():
    with pytest.raises(ValueError, match="the smallest options take 5 together, more than the budget of 4"):
        allocate([[1.0, 2.0], [1.0, 2.0]], [[2, 3], [3, 4]], 4)
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match=r"the costs of layer 1 are not all finite and >= 0: \["):
            allocate([[1.0], [bad]], [[1], [1]], 5)
    assert allocate([[0.0, 0.0]], [[1, 2]], 1) == [0]


def test_layers_that_cost_nothing_share_what_is_left():
    amounts = [[2, 3, 4, 8]] * 5
    assert allocate([[0.0] * 4] * 5, amounts, 17) == [2, 2, 1, 1, 1]
    assert allocate([[0.0] * 4] * 4 + [[9.0, 5.0, 1.0, 0.0]], amounts, 20) == [1, 1, 1, 1, 3]


@pytest.mark.parametrize("seed", range(5))
def test_the_rest_of_a_budget_is_spent_where_it_gains_most(seed):
    rng = random.Random(seed)
    lower = [rng.randint(0, 50) for _ in range(6)]
    chosen = [low + rng.randint(0, 40) for low in lower]
    granules, gains = [1, 1, 7, 7, 3, 1], [rng.random() for _ in range(6)]
    rest = rng.randint(0, sum(chosen) - sum(lower))
    counts = spend_rest(chosen, lower, gains, granules, rest)
    spent = [before - after for before, after in zip(chosen, counts, strict=True)]
    assert all(after >= low for after, low in zip(counts, lower, strict=True))
    assert all(s % g == 0 for s, g in zip(spent, granules, strict=True))
    left = rest - sum(spent)
    assert left >= 0
    room = [(after - low) // g for after, low, g in zip(counts, lower, granules, strict=True)]
    assert all(not r or g > left for r, g in zip(room, granules, strict=True))
    if spent[0] < chosen[0] - lower[0]:  # then what gains more, and fits, went first
        assert all(chosen[i] == lower[i] or spent[i] for i in range(1, 6) if gains[i] > gains[0] and granules[i] == 1)


# ---------------------------------------------------------------------------------------------------- the costs


def slow_error(change, hessian, importance):
    result = 0.0
    for o in range(change.shape[0]):
        for i in range(change.shape[1]):
            for j in range(change.shape[1]):
                result += importance[o] * change[o, i] * hessian[i, j] * change[o, j]
    return result


def test_the_output_error_equals_the_sum_over_tokens():
    generator = torch.Generator().manual_seed(0)
    x, change = torch.randn(20, 6, generator=generator), torch.randn(4, 6, generator=generator)
    importance = torch.rand(4, generator=generator)
    found = output_error(change, x.T @ x, importance)
    assert found == pytest.approx(slow_error(change.double().numpy(), (x.T @ x).numpy(), importance.numpy()), rel=1e-5)
    assert found == pytest.approx(float(((x @ change.T).square() * importance).sum()), rel=1e-5)
    assert output_error(change, x.T @ x) == pytest.approx(float((x @ change.T).square().sum()), rel=1e-5)


def make(kind, tmp_path):
    """A tiny model, its calibration batches, and what runs it and gives its loss."""
    torch.manual_seed(0)
    if kind == "llama":
        module, data = CausalLM(tiny.LLAMA), TokenData(**tiny.write_tokens(tmp_path, calibration=5), batch_size=2)
    elif kind == "regressor":
        module, data = tiny.Regressor(), tiny.RegressionData()
        data.prepare_data()
    else:
        options = {"model": "resnet18", "model_args": {"stem_width": 8, "channels": [8, 8, 8, 8]}}
        module = ImageClassifier(**options, pretrained=False, num_classes=10)
        data = ImageData(train_samples=8, calibration_samples=5, evaluation_samples=8, batch_size=2)
        data.prepare_data()
    data.setup("fit")
    loader = data.calibration_dataloader() if hasattr(data, "calibration_dataloader") else data.train_dataloader()
    batches = list(loader)
    module.log = module.log_dict = lambda *args, **kwargs: None
    blocks = find_blocks(module)
    run = lambda batch: module.validation_step(batch, 0)  # noqa: E731
    walk = lambda blocks: Walk(  # noqa: E731
        module, blocks, batches, batches[0], run, progress=False, loss=lambda b: module.training_step(b, 0)
    )
    layers = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    layers = {n: m for n, m in layers.items() if any(n.startswith(f"{b}.") for b in blocks)}
    return module, layers, blocks, walk


def slow_gradients(module, layers, batches):
    """Mean over tokens of the squared gradient of each sample's loss: something is added to each output, and the loss
    is differentiated by it."""
    sums, rows = {n: 0.0 for n in layers}, {n: 0 for n in layers}
    for batch in batches:
        added = {}

        def add(name, output, added=added):
            added[name] = torch.zeros_like(output, requires_grad=True)
            return output + added[name]

        handles = [
            layer.register_forward_hook(lambda _, __, output, name=name: add(name, output))
            for name, layer in layers.items()
        ]
        loss = module.training_step(batch, 0)
        for handle in handles:
            handle.remove()
        samples = len(batch["input_ids"]) if isinstance(batch, dict) else len(batch[0])
        gradients = torch.autograd.grad(loss, list(added.values()))
        for name, gradient in zip(added, gradients, strict=True):
            g = gradient.double().numpy() * samples
            g = np.moveaxis(g, 1, -1) if isinstance(layers[name], nn.Conv2d) else g
            for token in g.reshape(-1, g.shape[-1]):
                sums[name] = sums[name] + token**2
                rows[name] += 1
    return {name: sums[name] / rows[name] for name in layers}


@pytest.mark.parametrize("kind", ["llama", "regressor", "resnet"])
def test_costs_equal_slow_loops_over_tokens_and_outputs(tmp_path, kind):
    module, layers, blocks, walk = make(kind, tmp_path)
    module.eval()
    batches = walk(blocks).batches
    gradients = slow_gradients(module, layers, batches)
    found = mean_squared_gradients(walk(blocks), layers)
    for name in layers:
        np.testing.assert_allclose(found[name].numpy(), gradients[name], rtol=2e-4, atol=1e-12)

    inputs = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda m, args, n=name: inputs[n].append(input_rows(m, args[0].detach())))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for batch in batches:
            walk(blocks).run(batch)
    for handle in handles:
        handle.remove()
    halves = lambda name, layer, hessians: [weight_matrix(layer) * s for s in (0.5, 1.25)]  # noqa: E731
    for sensitivity in ("loss", "output"):
        costs = measure_costs(Context(walk, progress=False), blocks, layers, halves, sensitivity)
        assert list(costs) == list(layers)
        for name, layer in list(layers.items())[:3]:
            x = torch.cat(inputs[name], dim=1)[0].double().numpy()  # [T, I]
            outputs = x @ weight_matrix(layer).double().numpy().T  # [T, O]
            for cost, factor in zip(costs[name], (-0.5, 0.25), strict=True):
                squared = (factor * outputs) ** 2
                loss = float((squared * gradients[name]).sum())
                expected = loss if sensitivity == "loss" else float(squared.sum() / (outputs**2).sum())
                assert cost == pytest.approx(expected, rel=1e-3)


def test_a_grouped_convolutions_cost_is_that_of_its_outputs():
    network = nn.Sequential(nn.Conv2d(8, 12, 3, groups=4, padding=1), nn.ReLU())
    batches = [torch.randn(n, 8, 5, 5, generator=torch.Generator().manual_seed(n)) for n in (3, 2)]
    layers = {"0": network[0]}
    changed = torch.randn(12, 18, generator=torch.Generator().manual_seed(9))
    weigh = torch.linspace(0, 2, 12)[None, :, None, None]
    blocks = {"": network}
    walk = lambda blocks: Walk(  # noqa: E731
        network, blocks, batches, batches[0], network, progress=False, loss=lambda x: (network[0](x) * weigh).mean()
    )
    loss, output = (
        measure_costs(Context(walk, progress=False), blocks, layers, lambda *_: [changed], s)["0"][0]
        for s in ("loss", "output")
    )
    outputs = torch.cat([network[0](x) for x in batches]).detach()
    network[0].weight.data = changed.view(12, 3, 3, 2).permute(0, 3, 1, 2)
    squared = (torch.cat([network[0](x) for x in batches]).detach() - outputs).square()
    bias = network[0].bias.detach()[None, :, None, None]
    assert output == pytest.approx(float(squared.sum() / (outputs - bias).square().sum()), rel=1e-4)
    assert loss == pytest.approx(float((squared * (weigh / (12 * 25)).square()).sum()), rel=1e-4)


def test_measuring_leaves_the_model_as_it_was(tmp_path):
    module, layers, blocks, walk = make("llama", tmp_path)
    module.train()
    frozen = next(iter(layers.values())).weight
    frozen.requires_grad_(False)
    other = list(layers.values())[1].weight
    other.grad = torch.ones_like(other)
    before = {n: (p.requires_grad, p.grad, p.detach().clone()) for n, p in module.named_parameters()}
    state = torch.get_rng_state()
    context = Context(walk, progress=False)
    measure_costs(context, blocks, layers, lambda n, layer, h: [weight_matrix(layer) * 0], "loss")
    for name, parameter in module.named_parameters():
        requires_grad, gradient, value = before[name]
        assert parameter.requires_grad == requires_grad
        assert parameter.grad is gradient
        assert torch.equal(parameter, value)
        assert not parameter._backward_hooks
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in layers.values())
    assert all(m.training for m in module.modules())
    assert torch.equal(torch.get_rng_state(), state)
