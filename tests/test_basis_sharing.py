"""Basis Sharing: the factors against a generalised eigenproblem, the inequalities that justify it, and the stage."""

import json
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from scipy.linalg import eigh
from torch import nn

from pqqp_lightning import load
from pqqp_lightning.algorithms.basis_sharing import rank_for, share_basis
from pqqp_lightning.algorithms.hadamard import Rotation
from pqqp_lightning.callbacks import GPTQ, RTN, LoRA, SparseGPT
from pqqp_lightning.callbacks.basis_sharing import BasisSharing
from pqqp_lightning.checkpoint.encoding import stored_tensors
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.activation_hooks import RotateInput, transforms_of
from pqqp_lightning.network.constraints import broken_constraints, collect_constraints
from pqqp_lightning.network.structure import weightless_copy
from pqqp_lightning.surgery.factored import Factored, factor_layers, factors_of, group_layers

KINDS = ["llama", "opt", "deit"]

# ------------------------------------------------------------------------------------------------ the mathematics


def best_product(weights, gram, rank):
    """The best product of the given rank and its error, float64: from A q = l G q with A = G W^T W G, no whitening.

    With the leading q, normalised to q^T G q = 1, the best approximation of W is W G Q Q^T, and what is lost is the sum
    of the other eigenvalues.
    """
    w, g = np.concatenate([np.asarray(w, float) for w in weights]), np.asarray(gram, float)
    values, vectors = eigh(g @ w.T @ w @ g, g)
    leading = vectors[:, ::-1][:, :rank]
    return w @ g @ leading @ leading.T, float(values[::-1][rank:].sum())


def plain_svd(weight, rank):
    """Truncated SVD of the weights alone, which ignores the inputs."""
    u, s, vt = np.linalg.svd(np.asarray(weight, float), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def output_error(weight, changed, gram):
    difference = np.asarray(weight, float) - np.asarray(changed, float)
    return float(np.trace(difference @ np.asarray(gram, float) @ difference.T))


def inputs(tokens, columns, seed=0):
    """Correlated: a random mixture of independent ones with decaying scales."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -1.5, columns)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    return (torch.randn(tokens, columns, generator=generator) * scales) @ mix


def gram_of(x):
    """X^T X, float64: exactly symmetric for the reference, which reads all of it."""
    gram = x.double().T @ x.double()
    return (gram + gram.T) / 2


def make_weights(count, rows, columns, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator) for _ in range(count)]


def product(shared):
    return torch.cat(shared.coefficients) @ shared.basis


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 10, 24), (1, 24, 10), (2, 10, 24), (3, 20, 16)])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_factors_equal_the_reference(count, rows, columns, rank):
    weights, gram = make_weights(count, rows, columns), gram_of(inputs(200, columns))
    shared = share_basis(weights, gram, rank, damping=0.0)
    expected, lost = best_product(weights, gram, rank)
    assert shared.basis.shape == (rank, columns)
    assert [c.shape for c in shared.coefficients] == [(rows, rank)] * count
    scale = np.abs(expected).max()
    np.testing.assert_allclose(product(shared), expected, atol=2e-5 * scale)
    assert output_error(torch.cat(weights), product(shared), gram) == pytest.approx(lost, rel=1e-4)


def test_no_least_squares_fit_from_a_random_start_is_better():
    weights, gram = make_weights(2, 12, 16), gram_of(inputs(200, 16))
    w = torch.cat(weights).double()
    least = output_error(w, product(share_basis(weights, gram, 5, damping=0.0)), gram)
    for seed in range(3):
        basis = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for _ in range(60):  # alternating: the best coefficients of a basis, the best basis of the coefficients
            coefficients = torch.linalg.solve(basis @ gram @ basis.T, basis @ gram @ w.T).T
            basis = torch.linalg.lstsq(coefficients, w).solution
            assert output_error(w, coefficients @ basis, gram) >= least * (1 - 1e-5)


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 8, 12), (2, 8, 12), (2, 4, 12), (1, 12, 8)])
def test_full_rank_changes_nothing(count, rows, columns):
    weights, gram = make_weights(count, rows, columns), gram_of(inputs(200, columns))
    shared = share_basis(weights, gram, min(columns, count * rows))
    torch.testing.assert_close(product(shared), torch.cat(weights), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 8, 12), (3, 8, 12)])
def test_coefficients_have_columns_of_norm_one_in_falling_order(count, rows, columns):
    weights, gram = make_weights(count, rows, columns), gram_of(inputs(200, columns))
    shared = share_basis(weights, gram, 6)
    torch.testing.assert_close(torch.cat(shared.coefficients).norm(dim=0), torch.ones(6))
    kept = (shared.basis.double() @ gram @ shared.basis.double().T).diagonal()
    assert all(a >= b for a, b in pairwise(kept))


def test_inputs_that_are_always_zero_are_reported_and_cost_no_accuracy():
    x = inputs(200, 12)
    x[:, [2, 7]] = 0
    weights, gram = make_weights(2, 10, 12), gram_of(x)
    shared = share_basis(weights, gram, 5)
    live = [i for i in range(12) if i not in (2, 7)]
    _, lost = best_product([w[:, live] for w in weights], gram[live][:, live], 5)
    assert shared.dead.nonzero().flatten().tolist() == [2, 7]
    assert bool(torch.isfinite(product(shared)).all())
    assert output_error(torch.cat(weights), product(shared), gram) == pytest.approx(lost, rel=0.01)


def test_fewer_tokens_than_inputs_raise_the_damping_and_say_so():
    weights, gram = make_weights(2, 10, 12), gram_of(inputs(5, 12))
    shared = share_basis(weights, gram, 5, damping=0.0)
    assert shared.damping > 0
    # five tokens span five directions: rank 5 loses nothing on them
    assert output_error(torch.cat(weights), product(shared), gram) < 1e-4 * output_error(
        torch.cat(weights), torch.zeros(20, 12), gram
    )


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.zeros(4, 4), "all zero"),
        (torch.full((4, 4), torch.nan), "NaN"),
        (5 - 4 * torch.eye(4), "not positive definite"),
    ],
)
def test_inputs_that_cannot_be_used_are_refused(gram, message):
    with pytest.raises(ArithmeticError, match=message):
        share_basis(make_weights(1, 4, 4), gram, 2)


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_that_does_not_exist_is_refused(rank):
    with pytest.raises(ValueError, match=rf"Expected `rank` to be in 1..4, but got {rank}."):
        share_basis(make_weights(1, 4, 4), torch.eye(4), rank)


def test_weights_without_any_value_stay_so():
    shared = share_basis([torch.zeros(6, 4), torch.zeros(6, 4)], gram_of(inputs(50, 4)), 2)
    assert bool((product(shared) == 0).all())


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize(("columns", "rows"), [(576, 1152), (576, 3072), (1536, 576), (7, 5)])
def test_the_rank_is_the_largest_that_saves_the_ratio(ratio, columns, rows):
    rank, dense = rank_for(ratio, columns, rows), columns * rows
    assert rank * (columns + rows) <= (1 - ratio) * dense + 1e-6
    assert (rank + 1) * (columns + rows) > (1 - ratio) * dense


def shares(ratio, weights, grams):
    """(shared, per layer): the output errors at the same saving."""
    rows, columns = weights[0].shape
    shared = share_basis(weights, sum(grams), rank_for(ratio, columns, rows * len(weights)))
    together = [
        output_error(w, c @ shared.basis, g) for w, c, g in zip(weights, shared.coefficients, grams, strict=True)
    ]
    alone = []
    for w, g in zip(weights, grams, strict=True):
        own = share_basis([w], g, rank_for(ratio, columns, rows))
        alone.append(output_error(w, product(own), g))
    return sum(together), sum(alone)


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_layers_that_have_structure_in_common_lose_less_with_one_basis_at_equal_parameters(ratio):
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(24, 48, generator=generator)  # what both layers read from their inputs
    weights = [torch.randn(48, 24, generator=generator) @ common + 0.5 * w for w in make_weights(2, 48, 48, seed=3)]
    grams = [gram_of(inputs(400, 48) + 0.02 * torch.randn(400, 48, generator=generator)) for _ in range(2)]
    together, alone = shares(ratio, weights, grams)
    assert together < 0.8 * alone


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_whitening_by_the_inputs_loses_less_than_a_plain_decomposition(ratio):
    weights, gram = make_weights(2, 32, 32), gram_of(inputs(400, 32))
    rank = rank_for(ratio, 32, 64)
    whitened = output_error(torch.cat(weights), product(share_basis(weights, gram, rank)), gram)
    assert whitened < 0.5 * output_error(torch.cat(weights), plain_svd(torch.cat(weights), rank), gram)


# -------------------------------------------------------------------------------------------------------- grouping


def linears(widths, name="fc1"):
    return {f"blocks.{i}.{name}": nn.Linear(width, 4) for i, width in enumerate(widths)}


def blocks_of(count):
    return {f"blocks.{i}": nn.Module() for i in range(count)}


def test_the_last_group_may_be_smaller():
    groups, odd = group_layers(linears([8] * 5), blocks_of(5), ["fc1"], 2)
    assert groups == [["blocks.0.fc1", "blocks.1.fc1"], ["blocks.2.fc1", "blocks.3.fc1"], ["blocks.4.fc1"]]
    assert odd == []


def test_layers_whose_inputs_differ_in_width_stand_alone():
    groups, odd = group_layers(linears([8, 6, 8, 8]), blocks_of(4), ["fc1"], 2)
    assert groups == [["blocks.0.fc1"], ["blocks.1.fc1"], ["blocks.2.fc1", "blocks.3.fc1"]]
    assert odd == ["blocks.0.fc1", "blocks.1.fc1"]


def test_layers_that_do_not_share_or_lie_outside_the_blocks_stand_alone():
    layers = linears([8, 8]) | linears([8, 8], "fc2") | {"fc1": nn.Linear(8, 4)}
    groups, _ = group_layers(layers, blocks_of(2), ["fc1"], 2)
    assert groups == [["blocks.0.fc1", "blocks.1.fc1"], ["blocks.0.fc2"], ["blocks.1.fc2"], ["fc1"]]


# ------------------------------------------------------------------------------------------------------- the stage


def run(folder, kind, *stages, layers=2):
    module = tiny.make_model(kind, layers)
    tiny.trainer(folder / "run", *stages).fit(module, datamodule=tiny.make_data(kind, folder))
    return module


def records(folder):
    return json.loads((folder / "run" / "report.json").read_text())["stages"]


def outputs(module, kind):
    module.eval()
    with torch.no_grad():
        if kind in ("llama", "opt"):
            return module.model(tiny.token_rows(2, seed=5)).logits
        return module.model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)))


def factored(module):
    return {name: m for name, m in module.named_modules() if isinstance(m, Factored)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_stage_saves_its_ratio_and_its_checkpoint_gives_the_same_logits(tmp_path, kind):
    dense = tiny.make_model(kind)
    stage = BasisSharing(0.2)
    replaced = stage.find_layers(dense)
    module = run(tmp_path, kind, stage, layers=2)
    assert set(factored(module)) == set(replaced)
    entries = sum(layer.weight.numel() for layer in replaced.values())
    factors = sum(layer.weight.numel() for layer in factors_of(module).values())
    plan = stage.expected_plan(dense)["groups"]
    shapes = {name: layer.weight.shape for name, layer in replaced.items()}
    assert factors == sum(
        g["rank"] * (shapes[g["layers"][0]][1] + sum(shapes[n][0] for n in g["layers"])) for g in plan
    )
    assert 0.7 * entries < factors <= 0.8 * entries
    saved = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in module.parameters())
    assert saved == entries - factors
    sizes = [record["size_bytes"] for record in records(tmp_path)]
    assert sizes[0] - sizes[1] == 4 * saved  # a shared basis is counted once
    loaded = load(tmp_path / "run")
    assert torch.equal(outputs(loaded, kind), outputs(module, kind))
    assert len(stored_tensors(loaded)[0]) == len(stored_tensors(module)[0])
    assert not torch.equal(outputs(module, kind), outputs(dense, kind))


@pytest.mark.parametrize(
    ("kind", "alone"),
    [("llama", ("o_proj", "down_proj")), ("opt", ("out_proj", "fc2")), ("deit", ("attn.proj", "fc2"))],
)
def test_neighbours_share_the_projections_that_read_the_residual_stream(tmp_path, kind, alone):
    module = run(tmp_path, kind, BasisSharing(0.2), layers=3)
    found = factored(module)
    for name, layer in found.items():
        same = {n for n, other in found.items() if other.basis is layer.basis}
        block = next(part for part in name.split(".") if part.isdigit())
        partners = [block] if name.endswith(alone) or block == "2" else ["0", "1"]
        assert same == {name.replace(f".{block}.", f".{partner}.") for partner in partners}
    shared = len(found) // 3 - 2
    assert (
        f"{len(found)} layers on {len(found) - shared} bases, {shared} of them shared"
        in records(tmp_path)[1]["notes"][0]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_gives_the_dense_outputs(tmp_path, kind):
    class FullRank(BasisSharing):
        def expected_plan(self, model):
            plan, layers = super().expected_plan(model), self.find_layers(model)
            for group in plan["groups"]:
                rows = sum(layers[name].weight.shape[0] for name in group["layers"])
                group["rank"] = min(rows, layers[group["layers"][0]].weight.shape[1])
            return plan

    module = run(tmp_path, kind, FullRank())
    torch.testing.assert_close(outputs(module, kind), outputs(tiny.make_model(kind), kind), atol=1e-4, rtol=1e-4)


def test_the_factors_are_those_of_the_inputs_of_both_layers(tmp_path):
    stage = BasisSharing(0.3, targets=["q_proj"])
    module = run(tmp_path, "llama", stage)
    dense, grams = tiny.make_model("llama").eval(), []
    attention = [block.self_attn for block in dense.model.model.layers]
    for layer in attention:
        layer.q_proj.register_forward_pre_hook(lambda _, args: grams.append(gram_of(args[0].flatten(0, 1))))
    with torch.no_grad():
        dense.model(torch.from_numpy(np.load(tmp_path / "calibration.npy")))
    expected = share_basis([layer.q_proj.weight.detach() for layer in attention], sum(grams), rank_for(0.3, 32, 64))
    for layer, coefficients in zip(module.model.model.layers, expected.coefficients, strict=True):
        made = layer.self_attn.q_proj
        torch.testing.assert_close(
            made.coefficients.weight @ made.basis.weight, coefficients @ expected.basis, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_structure_follows_from_the_plan_alone(tmp_path, kind):
    stage = BasisSharing(0.2)
    copy, module = weightless_copy(tiny.make_model(kind)), run(tmp_path, kind, stage)
    plan = json.loads(json.dumps(stage.expected_plan(copy)))
    BasisSharing.restructure(copy, plan)
    assert all(parameter.is_meta for parameter in copy.parameters())
    shapes = [{name: p.shape for name, p in m.named_parameters(remove_duplicate=False)} for m in (copy, module)]
    assert shapes[0] == shapes[1]
    assert list(factors_of(copy)) == list(factors_of(module))  # the same ones are shared


@pytest.mark.parametrize("kind", KINDS)
def test_later_stages_act_on_the_factors_and_keep_their_promises(tmp_path, kind):
    module = run(tmp_path, kind, BasisSharing(0.2), SparseGPT(0.5), GPTQ(4))
    constraints = collect_constraints(module)
    assert set(constraints) == set(factors_of(module))
    assert all(c.mask_bits is not None and c.grid is not None for c in constraints.values())
    assert not broken_constraints(module, constraints)
    entries = sum(c.shape[0] * c.shape[1] for c in constraints.values())
    assert sum(c.kept() for c in constraints.values()) == pytest.approx(entries / 2, abs=len(constraints))
    loaded = load(tmp_path / "run")
    assert torch.equal(outputs(loaded, kind), outputs(module, kind))


def test_a_shared_basis_is_trained_as_one(tmp_path):
    module = run(tmp_path, "llama", BasisSharing(0.2, epochs=1))
    q_projs = [block.self_attn.q_proj for block in module.model.model.layers]
    assert q_projs[0].basis is q_projs[1].basis
    assert records(tmp_path)[1]["metrics"] != records(tmp_path)[1]["metrics_before_finetuning"]
    assert torch.equal(outputs(load(tmp_path / "run"), "llama"), outputs(module, "llama"))


def test_transforms_in_front_of_a_layer_stand_in_front_of_its_factors():
    model = nn.Sequential(nn.Linear(8, 6))
    RotateInput(Rotation(torch.ones(1, 1), 8)).attach(model[0])
    (made,) = factor_layers(model, ["0"], 2)
    assert model[0] is made
    assert len(transforms_of(made)) == 1


@pytest.mark.parametrize(
    ("options", "blamed"),
    [
        ({"ratio": 0.0}, ("ratio", 0.0)),
        ({"ratio": 1.0}, ("ratio", 1.0)),
        ({"ratio": 0.99}, ("ratio", 0.99)),
        ({"group": 0}, ("group", 0)),
        ({"damping": 2.0}, ("damping", 2.0)),
        ({"share": ["q_prj"]}, ("share", "q_prj")),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, blamed):
    with pytest.raises(RecipeError) as caught:
        run(tmp_path, "llama", BasisSharing(**options))
    assert blamed in tiny.blamed(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([SparseGPT(0.5)], r"carry the mask of stage 'sparsegpt'. Put BasisSharing first, or set allow_undo: true"),
        ([RTN(4)], r"carry the grid of stage 'rtn'. Put BasisSharing first, or set allow_undo: true"),
        ([BasisSharing(0.2, targets=["self_attn"])], r"are factors that an earlier BasisSharing made. Use one"),
        ([LoRA(merge=False)], r"carry adapters that were kept apart, .* Merge them \(merge: true\), or put"),
    ],
)
def test_what_an_earlier_stage_made_is_refused_with_the_way_out(tmp_path, stages, message):
    last = BasisSharing(0.2)
    last.name = "last"
    with pytest.raises(RecipeError, match=message):
        run(tmp_path, "llama", *stages, last)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"group": 0}, {"ratio": 2.0}, {"ratio": 0.99}, {"ratio": float("nan")}])
def test_a_bad_argument_does_not_hide_the_problems_of_later_stages(tmp_path, options):
    with pytest.raises(RecipeError, match=r"stages.basissharing (?s:.*)sparsity=7 is not in"):
        run(tmp_path, "llama", BasisSharing(**options), SparseGPT(7))


def test_convolutions_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"factorises Linear layers, but .* that it would act on are Conv2d"):
        run(tmp_path, "resnet", BasisSharing(0.2))


def test_two_stages_with_disjoint_targets_run(tmp_path):
    first, second = BasisSharing(0.2, targets=["self_attn"]), BasisSharing(0.4, group=1, targets=["mlp"])
    first.name, second.name = "attention", "mlp"
    module = run(tmp_path, "llama", first, second)
    assert len(factored(module)) == 2 * 7


def test_a_mask_is_lost_only_if_asked_and_the_record_says_so(tmp_path):
    module = run(tmp_path, "llama", SparseGPT(0.5), BasisSharing(0.2, allow_undo=True))
    assert not collect_constraints(module)
    assert records(tmp_path)[2]["notes"][0] == "undone: the mask of 14 layers, which became products of dense factors"
    assert records(tmp_path)[2]["sparsity"] < 0.3
    assert torch.equal(outputs(load(tmp_path / "run"), "llama"), outputs(module, "llama"))
