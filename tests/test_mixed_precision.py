"""Mixed precision: bits by sensitivity, within the budget, quantized in a schedule."""

import itertools

import pytest
import tiny
import torch

from pqqp_lightning import load
from pqqp_lightning.algorithms.rtn import quantize_rtn
from pqqp_lightning.callbacks import GPTQ, RTN, MixedPrecision, SparseGPT
from pqqp_lightning.checkpoint.size import measure_size
from pqqp_lightning.data import TokenData
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.models import CausalLM
from pqqp_lightning.network.constraints import broken_constraints, collect_constraints
from pqqp_lightning.network.layers import weight_matrix
from pqqp_lightning.storage.records import read_records


def fit(tmp_path, *stages, folder="run"):
    torch.manual_seed(0)
    module = CausalLM(tiny.LLAMA)
    tiny.trainer(tmp_path / folder, *stages).fit(module, datamodule=TokenData(**tiny.write_tokens(tmp_path)))
    return module


def bits_of(module):
    return {name: constraints.grid.bits for name, constraints in collect_constraints(module).items()}


def average(module):
    found = collect_constraints(module)
    return sum(c.grid.bits * c.kept() for c in found.values()) / sum(c.kept() for c in found.values())


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def notes(folder):
    return read_records(folder)[-1]["notes"]


@pytest.mark.parametrize("budget", [2.0, 2.5, 3.0, 3.3, 4.0, 8.0])
@pytest.mark.parametrize("sensitivity", ["loss", "output"])
def test_the_counted_average_is_within_the_budget_and_near_it(tmp_path, budget, sensitivity):
    module = fit(tmp_path, MixedPrecision(average_bits=budget, sensitivity=sensitivity, group_size=16))
    assert set(bits_of(module).values()) <= {2, 3, 4, 8}
    assert len(bits_of(module)) == 14
    assert budget - 0.15 < average(module) <= budget
    assert f"{average(module):.4f} bits a weight on average" in notes(tmp_path / "run")[-1]
    assert bits_of(load(tmp_path / "run")) == bits_of(module)


def test_the_record_says_how_many_layers_got_which_bits(tmp_path):
    module = fit(tmp_path, MixedPrecision(average_bits=3.5))
    found = list(bits_of(module).values())
    expected = ", ".join(f"{b} bits: {found.count(b)} layers" for b in sorted(set(found), reverse=True))
    assert notes(tmp_path / "run")[-1].startswith(expected)
    options = read_records(tmp_path / "run")[-1]["options"]
    assert options["bits"] == [2, 3, 4, 8]
    assert options["average_bits"] == 3.5
    assert MixedPrecision().average_bits is None  # as given, so that a sweep can set size_bytes instead
    assert 3.85 < average(fit(tmp_path, MixedPrecision(group_size=16), folder="default")) <= 4.0


def test_schedules_give_the_same_bits_and_different_weights(tmp_path):
    first = fit(tmp_path, MixedPrecision(average_bits=3.5, schedule="progressive"), folder="progressive")
    second = fit(tmp_path, MixedPrecision(average_bits=3.5, schedule="regressive"), folder="regressive")
    assert bits_of(first) == bits_of(second)
    assert not same_weights(first, second)
    assert notes(tmp_path / "progressive")[-1].startswith("8 bits: ")
    assert notes(tmp_path / "regressive")[-1].startswith("2 bits: ")
    rounded = [
        fit(tmp_path, MixedPrecision(average_bits=3.5, schedule=s, method="rtn"), folder=f"rtn-{s}")
        for s in ("progressive", "regressive")
    ]
    assert same_weights(*rounded)


@pytest.mark.parametrize("schedule", ["progressive", "regressive"])
def test_each_bit_width_is_one_gptq_stage_on_the_model_as_quantized_so_far(tmp_path, schedule):
    """So mixed precision by hand, several stages with disjoint targets, is the same to the last bit."""
    mixed = fit(tmp_path, MixedPrecision(average_bits=3.5, schedule=schedule, group_size=16, symmetric=False))
    found = bits_of(mixed)
    stages = []
    for bits in sorted(set(found.values()), reverse=schedule == "progressive"):
        stage = GPTQ(bits, group_size=16, symmetric=False, targets=[n for n, b in found.items() if b == bits])
        stage.name = f"bits{bits}"
        stages.append(stage)
    assert len(stages) > 2
    assert same_weights(mixed, fit(tmp_path, *stages, folder="by-hand"))


@pytest.mark.parametrize(("method", "stage"), [("gptq", GPTQ), ("rtn", RTN)])
def test_one_bit_width_is_the_method_alone(tmp_path, method, stage):
    mixed = fit(tmp_path, MixedPrecision([4], method=method, group_size=16))
    assert same_weights(mixed, fit(tmp_path, stage(4, group_size=16, clip=True), folder="alone"))


@pytest.mark.parametrize("schedule", ["progressive", "regressive"])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_an_earlier_mask_is_kept_and_the_average_is_over_what_is_kept(tmp_path, method, schedule):
    prune = SparseGPT({"mlp": 0.75, "*": 0.25})
    module = fit(tmp_path, prune, MixedPrecision(average_bits=3.5, method=method, schedule=schedule, group_size=16))
    found = collect_constraints(module)
    assert not broken_constraints(module, found)
    for name, constraints in found.items():
        entries = constraints.shape[0] * constraints.shape[1]
        assert constraints.kept() == entries * (1 if "mlp" in name else 3) // 4
    assert len(set(bits_of(module).values())) > 1
    assert 3.3 < average(module) <= 3.5


def test_pruning_comes_after_it_within_its_grids(tmp_path):
    module = fit(tmp_path, MixedPrecision(average_bits=3.5), SparseGPT(0.5))
    assert len(set(bits_of(module).values())) > 1
    assert all(c.kept() * 2 == c.shape[0] * c.shape[1] for c in collect_constraints(module).values())
    assert not broken_constraints(module, collect_constraints(module))


def change_of_outputs(tmp_path, stage, folder):
    module, x = tiny.Lopsided(), tiny.regression_data(64, seed=5).tensors[0]
    with torch.no_grad():
        dense = module(x)
        tiny.trainer(tmp_path / folder, stage).fit(module, datamodule=tiny.RegressionData())
        return float((module(x) - dense).square().mean()), module


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_sensitive_layer_gets_more_bits_and_the_model_changes_less_than_with_equal_bits(tmp_path, method):
    uniform, _ = change_of_outputs(tmp_path, {"gptq": GPTQ, "rtn": RTN}[method](4), "uniform")
    mixed, module = change_of_outputs(tmp_path, MixedPrecision([2, 3, 4, 6], method=method), "mixed")
    found = bits_of(module)
    assert found["blocks.0.down"] > 4 > found["blocks.1.down"]
    assert average(module) <= 4
    assert mixed < 0.7 * uniform


def test_the_bits_are_the_best_by_the_measured_costs(tmp_path, monkeypatch):
    """Every assignment within the budget, one by one, costs as much or more."""
    from pqqp_lightning.callbacks import mixed_precision

    seen = {}

    def keep(*args):
        seen.update(costs := measure(*args))
        return costs

    measure = mixed_precision.measure_costs
    monkeypatch.setattr(mixed_precision, "measure_costs", keep)
    _, module = change_of_outputs(tmp_path, MixedPrecision([2, 3, 4, 8], average_bits=3.7), "run")
    names, widths = list(seen), [2, 3, 4, 8]
    sizes = {name: weight_matrix(module.get_submodule(name)).numel() for name in names}
    best = min(
        sum(seen[n][widths.index(b)] for n, b in zip(names, bits, strict=True))
        for bits in itertools.product(widths, repeat=len(names))
        if sum(b * sizes[n] for n, b in zip(names, bits, strict=True)) <= 3.7 * sum(sizes.values())
    )
    assert sum(seen[n][widths.index(b)] for n, b in bits_of(module).items()) == pytest.approx(best)


@pytest.mark.parametrize("stages", [[], [SparseGPT(0.5)]], ids=["dense", "pruned"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_size_in_bytes_is_kept_by_the_whole_model(tmp_path, stages, symmetric):
    def size(stage, folder):
        fit(tmp_path, *stages, stage, folder=folder)
        return read_records(tmp_path / folder)[-1]["size_bytes"]

    options = {"group_size": 16, "symmetric": symmetric}
    least, most = (size(GPTQ(bits, **options), f"uniform-{bits}") for bits in (2, 8))
    for i, share in enumerate((0.1, 0.5, 0.9)):
        budget = int(least + share * (most - least))
        stage = MixedPrecision(size_bytes=budget, **options)
        counted = size(stage, f"mixed-{i}")
        assert 0.85 * budget < counted <= budget
        assert "above size_bytes" not in " ".join(notes(tmp_path / f"mixed-{i}"))


def test_a_size_that_cannot_be_kept_is_refused(tmp_path):
    module = CausalLM(tiny.LLAMA)
    rest = measure_size(module, []).size_bytes - sum(
        4 * layer.weight.numel() for layer in MixedPrecision().find_layers(module).values()
    )
    message = rf"stages.mixedprecision \(MixedPrecision\): size_bytes={rest} is too small: with 2 bits everywhere the"
    with pytest.raises(RecipeError, match=message):
        fit(tmp_path, MixedPrecision(size_bytes=rest))


@pytest.mark.parametrize(
    ("options", "blamed"),
    [
        ({"bits": []}, ("bits", [])),
        ({"bits": [1, 4]}, ("bits", 1)),
        ({"bits": [4, 16]}, ("bits", 16)),
        ({"bits": [3, 4], "average_bits": 2.5}, ("average_bits", 2.5)),
        ({"bits": [3, 4], "average_bits": 6}, ("average_bits", 6)),
        ({"average_bits": 4.0, "size_bytes": 10**6}, ("average_bits", 4.0)),
        ({"size_bytes": 0}, ("size_bytes", 0)),
        ({"group_size": 10}, ("group_size", 10)),
        ({"group_size": 0}, ("group_size", 0)),
        ({"damping": 2.0}, ("damping", 2.0)),
        ({"epochs": 1}, ("epochs", 1)),
    ],
)
def test_bad_values_are_refused_before_any_work(tmp_path, options, blamed):
    with pytest.raises(RecipeError) as caught:
        fit(tmp_path, MixedPrecision(**options))
    assert blamed in tiny.blamed(caught.value)
    assert not (tmp_path / "run").exists()


class Untrained(tiny.Regressor):
    """A module that can only be evaluated."""

    training_step = tiny.LightningModule.training_step


def test_a_model_without_a_loss_is_measured_by_its_outputs(tmp_path):
    with pytest.raises(RecipeError, match=r"sensitivity='loss' needs a training_step in Untrained\. Add one, or set"):
        tiny.trainer(tmp_path / "a", MixedPrecision()).fit(Untrained(), datamodule=tiny.RegressionData())
    module = Untrained()
    tiny.trainer(tmp_path / "b", MixedPrecision(sensitivity="output")).fit(module, datamodule=tiny.RegressionData())
    assert average(module) <= 4


def test_a_grid_before_it_is_refused_on_the_same_layers_only(tmp_path):
    with pytest.raises(RecipeError, match="would leave the grid of stage 'rtn'"):
        fit(tmp_path, RTN(4), MixedPrecision())
    module = fit(tmp_path, RTN(8, targets=["mlp"]), MixedPrecision(average_bits=3, targets=["self_attn"]))
    assert {b for n, b in bits_of(module).items() if "mlp" in n} == {8}


def test_rounding_alone_is_what_costs_are_measured_with(tmp_path):
    module = fit(tmp_path, MixedPrecision(average_bits=3.5, method="rtn", group_size=16, clip=False))
    torch.manual_seed(0)
    dense = CausalLM(tiny.LLAMA)
    for name, bits in bits_of(module).items():
        expected = quantize_rtn(weight_matrix(dense.get_submodule(name)), bits=bits, group_size=16).weight
        assert torch.equal(weight_matrix(module.get_submodule(name)), expected)
