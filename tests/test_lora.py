"""LoRA and QLoRA: merging within masks and grids, adapters kept apart, resuming, and what is refused."""

import copy

import numpy as np
import pytest
import tiny
import torch

from pqqp_lightning import load
from pqqp_lightning.algorithms.grid import fit_grid, round_to_grid
from pqqp_lightning.algorithms.lora import change_through_merge, low_rank_update, merge_low_rank
from pqqp_lightning.callbacks import GPTQ, NF4, RTN, Finetune, LoRA, Magnitude, QLoRA, SparseGPT
from pqqp_lightning.checkpoint.size import measure_size
from pqqp_lightning.data import TokenData
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.models import CausalLM
from pqqp_lightning.network.constraints import broken_constraints, collect_constraints
from pqqp_lightning.runs.checks import check_stages
from pqqp_lightning.runs.run_data import RunData

MODELS = ["llama", "opt", "resnet", "deit", "regressor"]
FAST = {"rank": 4, "learning_rate": 0.01}


def make_model(kind):
    if kind != "regressor":
        return tiny.make_model(kind)
    torch.manual_seed(0)
    return tiny.Regressor(optimizer=torch.optim.Adam, lr=0.01)


def make_data(kind, tmp_path):
    return tiny.RegressionData() if kind == "regressor" else tiny.make_data(kind, tmp_path, batch_size=2)


def run(tmp_path, kind, *stages, folder="run", module=None):
    module = module if module is not None else make_model(kind)
    trainer = tiny.trainer(tmp_path / folder, *stages)
    trainer.fit(module, datamodule=make_data(kind, tmp_path))
    return module, trainer


def records(tmp_path, folder="run"):
    from pqqp_lightning.storage.records import read_records

    return read_records(tmp_path / folder)


def problems_of(tmp_path, kind, *stages, module=None):
    data = RunData(module if module is not None else make_model(kind), datamodule=make_data(kind, tmp_path))
    return [problem for found in check_stages(stages, data) for problem in found]


def inputs_of(kind):
    generator = torch.Generator().manual_seed(7)
    if kind == "regressor":
        return torch.randn(5, 8, generator=generator)
    return tiny.token_rows(2, 7) if kind in ("llama", "opt") else torch.randn(2, 3, 32, 32, generator=generator)


@torch.no_grad()
def logits(module, kind):
    return copy.deepcopy(module).eval()(inputs_of(kind))


def adapter_names(module):
    return [name for name, _ in module.named_parameters() if "lora_" in name]


# The mathematics


def merge_slowly(weight, a, b, scaling, mask=None, grid=None):
    """W' = Q(mask * (W + s B A)), entry by entry, in float64."""
    rows, columns = weight.shape
    merged = np.zeros((rows, columns))
    for i in range(rows):
        for j in range(columns):
            value = weight[i, j] + scaling * sum(b[i, k] * a[k, j] for k in range(len(a)))
            if mask is not None and not mask[i, j]:
                value = 0.0
            if grid is not None:
                levels = [float(grid.scale[i, j // grid.group_size]) * (q - 2 ** (grid.bits - 1)) for q in range(16)]
                value = min(levels, key=lambda level, value=value: abs(level - value))
            merged[i, j] = value
    return merged


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gridded", [False, True])
def test_merging_agrees_with_a_slow_reference(masked, gridded):
    generator = torch.Generator().manual_seed(1)
    weight, a, b = (torch.randn(*shape, generator=generator) for shape in ((6, 8), (3, 8), (6, 3)))
    mask = torch.rand(6, 8, generator=generator) < 0.5 if masked else None
    grid = fit_grid(weight, 4, group_size=4) if gridded else None
    merged = merge_low_rank(weight, low_rank_update(a, b, 0.5), mask=mask, grid=grid)
    expected = merge_slowly(
        *(t.double().numpy() for t in (weight, a, b)), 0.5, None if mask is None else mask.numpy(), grid
    )
    np.testing.assert_allclose(merged.weight, expected, atol=1e-5)
    free = merge_slowly(*(t.double().numpy() for t in (weight, a, b)), 0.5)
    assert merged.norm == pytest.approx(np.linalg.norm(free), rel=1e-5)
    assert merged.update == pytest.approx(np.linalg.norm(free - weight.double().numpy()), rel=1e-5)
    assert merged.lost == pytest.approx(np.linalg.norm(expected - free), rel=1e-4, abs=1e-5)


def test_merging_keeps_zeros_and_grid_exactly_in_half_precision():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(16, 32, generator=generator).bfloat16()
    grid = fit_grid(weight, 4, group_size=16)
    mask = torch.rand(16, 32, generator=generator) < 0.5
    merged = merge_low_rank(weight, torch.randn(16, 32, generator=generator), mask=mask, grid=grid).weight
    assert merged.dtype == torch.bfloat16
    assert not merged[~mask].any()
    assert torch.equal(round_to_grid(merged, grid), merged)


# Training, and what it leaves


@pytest.fixture
def seen(monkeypatch):
    """What a model was before and after the adapters' end: filled by LoRA.finish."""
    found = {}
    finish = LoRA.finish

    def watched(self, model, context, plan):
        found["before"] = copy.deepcopy(model).cpu()
        found["trained"] = found["before"].state_dict()
        plan = finish(self, model, context, plan)
        found["after"] = copy.deepcopy(model).cpu()
        return plan

    monkeypatch.setattr(LoRA, "finish", watched)
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_only_adapters_are_trained_and_merging_keeps_the_function(tmp_path, kind, seen):
    dense = make_model(kind)
    module, _ = run(tmp_path, kind, LoRA(**FAST, epochs=3))
    torch.testing.assert_close(logits(seen["after"], kind), logits(seen["before"], kind), rtol=1e-3, atol=1e-4)
    parameters = {name for name, _ in dense.named_parameters()}
    compared = [name for name in seen["trained"] if name.replace(".base_layer", "") in parameters]
    assert len(compared) == len(parameters)
    for name in compared:
        assert torch.equal(seen["trained"][name], dense.state_dict()[name.replace(".base_layer", "")]), name
    assert [type(m) for m in module.modules()] == [type(m) for m in dense.modules()]
    assert all(p.requires_grad for p in module.parameters())
    assert not torch.equal(logits(module, kind), logits(dense, kind))
    loaded = load(tmp_path / "run", make_model(kind) if kind == "regressor" else None)
    assert torch.equal(logits(loaded, kind), logits(module, kind))


@pytest.mark.parametrize("kind", ["llama", "opt", "regressor"])
@pytest.mark.parametrize("options", [{}, {"merge_aware": False}, {"merge": False}], ids=str)
def test_recovery_lowers_the_loss_of_a_pruned_model(tmp_path, kind, options):
    """On the rows that it is trained on: tiny models do not generalise."""
    if kind == "regressor":
        data = {"train_dataloaders": tiny.regression_loader(), "val_dataloaders": tiny.regression_loader()}
    else:
        files = tiny.write_tokens(tmp_path)
        data = {"datamodule": TokenData(**files | {"evaluation": files["train"]}, batch_size=2)}
    module = make_model(kind)
    tiny.trainer(tmp_path / "run", Magnitude(0.6), LoRA(**FAST, epochs=6, **options)).fit(module, **data)
    pruned, recovered = (record["metrics"] for record in records(tmp_path)[1:])
    metric = "mse" if kind == "regressor" else "perplexity"
    assert recovered[metric] < 0.97 * pruned[metric]
    for name, constraints in collect_constraints(module).items():
        layer = module.get_submodule(name)
        zeros = int((layer.weight == 0).sum())
        assert zeros == layer.weight.numel() - constraints.kept(), name


@pytest.mark.parametrize("merge", [True, False])
def test_training_is_deterministic(tmp_path, merge):
    first, _ = run(tmp_path, "llama", LoRA(**FAST, dropout=0.1, merge=merge), folder="a")
    second, _ = run(tmp_path, "llama", LoRA(**FAST, dropout=0.1, merge=merge), folder="b")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("merge", [True, False])
def test_what_required_a_gradient_before_does_so_again(tmp_path, merge):
    module = make_model("llama")
    module.model.model.embed_tokens.weight.requires_grad_(False)
    module.model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    run(tmp_path, "llama", LoRA(**FAST, merge=merge), module=module)
    frozen = {name.replace(".base_layer", "") for name, p in module.named_parameters() if not p.requires_grad}
    assert {name.rpartition("model.")[2] for name in frozen} == {
        "embed_tokens.weight",
        "layers.0.self_attn.q_proj.weight",
    }


@pytest.mark.parametrize("initialization", ["gaussian", "orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("merge", [True, False])
def test_every_initialization_starts_at_the_same_function(tmp_path, initialization, merge):
    module = make_model("llama")
    before = logits(module, "llama")
    stage = LoRA(rank=4, initialization=initialization, merge=merge)
    plan = stage.compress(module, None)
    torch.testing.assert_close(logits(module, "llama"), before, rtol=1e-4, atol=1e-5)
    restructured = make_model("llama")
    stage.restructure(restructured, plan)
    assert {n: p.shape for n, p in restructured.named_parameters()} == {
        n: p.shape for n, p in module.named_parameters()
    }
    module, _ = run(tmp_path, "llama", stage)
    assert torch.equal(logits(load(tmp_path / "run"), "llama"), logits(module, "llama"))


# Merging under constraints

EARLIER = {
    "sparsegpt": lambda: SparseGPT(0.5),
    "2:4": lambda: Magnitude(pattern="2:4"),
    "gptq": lambda: GPTQ(4, 16),
    "rtn 3 bits": lambda: RTN(3),
}


@pytest.mark.parametrize("kind", ["llama", "opt", "deit"])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("earlier", EARLIER)
def test_earlier_promises_hold_exactly(tmp_path, kind, earlier, merge, seen):
    module, _ = run(tmp_path, kind, EARLIER[earlier](), LoRA(**FAST, epochs=2, merge=merge))
    constraints = collect_constraints(module)
    assert len(constraints) == len(EARLIER[earlier]().find_layers(make_model(kind)))
    assert not broken_constraints(module, constraints)
    if earlier in ("sparsegpt", "2:4"):
        for name, found in constraints.items():
            assert int((module.get_submodule(name).weight == 0).sum()) * 2 == found.shape[0] * found.shape[1], name
    assert bool(adapter_names(module)) != merge
    assert torch.equal(logits(load(tmp_path / "run"), kind), logits(module, kind))
    notes = records(tmp_path)[-1]["notes"]
    assert any(note.startswith("merged into the ") for note in notes) == merge
    assert any(note.startswith("before merging, after the last epoch: ") for note in notes) == merge


def test_a_mask_and_a_grid_hold_together_after_merging(tmp_path, seen):
    module, _ = run(tmp_path, "llama", SparseGPT(0.5), GPTQ(4, 16), LoRA(**FAST, epochs=2))
    before, after = seen["before"].state_dict(), seen["after"].state_dict()
    moved = 0
    for name, constraints in collect_constraints(module).items():
        assert int((module.get_submodule(name).weight == 0).sum()) * 2 >= constraints.shape[0] * constraints.shape[1]
        moved += not torch.equal(before[f"{name}.base_layer.weight"], after[f"{name}.weight"])
    assert moved  # something was learnt that the grid could take up
    assert not broken_constraints(module, collect_constraints(module))


def test_the_metrics_before_merging_are_on_record(tmp_path, seen):
    run(tmp_path, "deit", RTN(2), LoRA(**FAST, epochs=2))
    note = next(n for n in records(tmp_path)[-1]["notes"] if n.startswith("before merging"))
    noted = dict(part.rsplit(" ", 1) for part in note.partition(": ")[2].split(", "))
    again = tiny.trainer(tmp_path / "again").validate(seen["before"], datamodule=make_data("deit", tmp_path))[0]
    assert {k: float(v) for k, v in noted.items()} == pytest.approx(again, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "resnet", "regressor"])
@pytest.mark.parametrize("earlier", ["mask", "grid", "both"])
def test_training_through_the_merge_leaves_nothing_to_lose(tmp_path, kind, earlier, seen):
    promises = {"mask": [Magnitude(0.5)], "grid": [RTN(2)], "both": [Magnitude(0.5), RTN(2)]}[earlier]
    for aware in (True, False):
        run(tmp_path, kind, *promises, LoRA(**FAST, epochs=2, merge_aware=aware), folder=str(aware))
        before, after = (logits(seen[when], kind) for when in ("before", "after"))
        assert torch.allclose(before, after, rtol=1e-3, atol=1e-4) == aware
        note = records(tmp_path, str(aware))[-1]["notes"][0]
        assert (", as trained, which moved their weights by" in note) == aware
        assert ("moved the result by" in note) != aware


def test_the_record_says_when_a_grid_swallows_the_update(tmp_path):
    run(tmp_path, "llama", RTN(4), LoRA(rank=4, learning_rate=1e-6, merge_aware=True))
    note = records(tmp_path)[-1]["notes"][0]
    assert "which left less than 10% (use merge: false, or recover before quantizing)" in note
    assert note.endswith("as trained, which moved their weights by 0.00%")


def test_what_training_through_the_merge_computes_is_what_merging_leaves():
    generator = torch.Generator().manual_seed(3)
    weight, update = (torch.randn(6, 8, generator=generator) for _ in range(2))
    mask = torch.rand(6, 8, generator=generator) < 0.5
    grid = fit_grid(weight, 4, group_size=4)
    weight = round_to_grid(weight.masked_fill(~mask, 0), grid)
    update.requires_grad_(True)
    change = change_through_merge(weight, update, mask, grid)
    merged = merge_low_rank(weight, update.detach(), mask=mask, grid=grid).weight
    torch.testing.assert_close(weight + change, merged)
    change.sum().backward()
    assert torch.equal(update.grad, mask.float())  # straight through the rounding, and not to what is pruned


# Adapters apart


@pytest.mark.parametrize("later", [SparseGPT(0.5), GPTQ(4, 16), Magnitude(pattern="2:4")], ids=lambda s: s.name)
def test_later_stages_act_on_the_weight_below_and_leave_adapters_alone(tmp_path, later, seen):
    module, _ = run(tmp_path, "llama", LoRA(**FAST, merge=False), later)
    constraints = collect_constraints(module)
    assert set(constraints) == {f"{n}.base_layer" for n in GPTQ().find_layers(make_model("llama"))}
    for name in adapter_names(module):
        assert torch.equal(module.state_dict()[name], seen["trained"][name]), name
    assert not broken_constraints(module, constraints)
    size = measure_size(module, GPTQ().find_layers(make_model("llama")))
    below = measure_size(module, constraints)
    adapters = sum(module.get_parameter(name).numel() for name in adapter_names(module))
    assert sum(x.size_bytes for x in size.layers) == sum(x.size_bytes for x in below.layers) + 4 * adapters
    assert torch.equal(logits(load(tmp_path / "run"), "llama"), logits(module, "llama"))


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_apart_are_saved_and_loaded(tmp_path, kind):
    module, _ = run(tmp_path, kind, LoRA(**FAST, dropout=0.1, merge=False))
    assert adapter_names(module)
    loaded = load(tmp_path / "run", make_model(kind) if kind == "regressor" else None)
    assert torch.equal(logits(loaded, kind), logits(module, kind))
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in module.named_parameters()
    }


def test_adapters_apart_add_to_the_bits_and_leave_the_zeros(tmp_path):
    module, _ = run(tmp_path, "llama", SparseGPT(0.5), LoRA(merge=False, **FAST))
    _, pruned, recovered = records(tmp_path)
    assert pruned["sparsity"] == pruned["pruned"] == recovered["sparsity"] == recovered["pruned"] == 0.5
    adapters = sum(p.numel() for name, p in module.named_parameters() if "lora_" in name)
    targeted = sum(c.shape[0] * c.shape[1] for c in collect_constraints(module).values())
    assert recovered["bits_per_weight"] - pruned["bits_per_weight"] == pytest.approx(32 * adapters / targeted)
    assert recovered["nominal_rate"] == pytest.approx(targeted / (targeted / 2 + adapters))


@pytest.mark.parametrize("merges", [(False, False), (False, True), (True, False), (True, True)])
def test_a_second_lora_stage_trains_adapters_of_its_own(tmp_path, merges, seen):
    stages = [LoRA(**FAST, merge=merge) for merge in merges]
    module, _ = run(tmp_path, "llama", stages[0], SparseGPT(0.5), stages[1])
    left = {name.split(".")[-2] for name in adapter_names(module)}
    assert left == {n for n, merge in zip(("lora_adapter", "lora-2_adapter"), merges, strict=True) if not merge}
    torch.testing.assert_close(logits(seen["after"], "llama"), logits(seen["before"], "llama")) if not merges[
        1
    ] else None
    loaded = load(tmp_path / "run")
    assert torch.equal(logits(loaded, "llama"), logits(module, "llama"))
    assert not broken_constraints(loaded, collect_constraints(module))
    for stage in range(2):  # whichever is left takes part
        name = ("lora_adapter", "lora-2_adapter")[stage]
        for parameter in (p for n, p in loaded.named_parameters() if f".{name}." in n):
            parameter.data.zero_()
        assert torch.equal(logits(loaded, "llama"), logits(module, "llama")) == merges[stage]
        loaded = load(tmp_path / "run")


def test_a_second_stage_does_not_train_the_first_ones_adapters(tmp_path, monkeypatch):
    finished, finish = [], LoRA.finish

    def watched(self, model, context, plan):
        finished.append(copy.deepcopy(model.state_dict()))
        return finish(self, model, context, plan)

    monkeypatch.setattr(LoRA, "finish", watched)
    run(tmp_path, "llama", LoRA(**FAST, merge=False), LoRA(**FAST, merge=False))
    assert all(torch.equal(finished[0][name], finished[1][name]) for name in finished[0])


def test_two_adapters_on_one_layer_survive_saving(tmp_path):
    stages = LoRA(**FAST, merge=False), LoRA(**FAST, merge=False, targets=["q_proj"])
    module, _ = run(tmp_path, "llama", *stages)
    assert set(module.model.model.layers[0].self_attn.q_proj.lora_A) == {"lora_adapter", "lora-2_adapter"}
    assert set(module.model.model.layers[0].self_attn.k_proj.active_adapters) == {"lora_adapter"}
    assert torch.equal(logits(load(tmp_path / "run"), "llama"), logits(module, "llama"))


def test_finetuning_after_adapters_apart_trains_both(tmp_path, seen):
    module, _ = run(tmp_path, "llama", SparseGPT(0.5), LoRA(**FAST, merge=False), Finetune(1, 0.01))
    now = module.state_dict()
    for name in ("lora_A.lora_adapter", "lora_B.lora_adapter", "base_layer"):
        name = f"model.model.layers.0.self_attn.q_proj.{name}.weight"
        assert not torch.equal(now[name], seen["trained"][name])
    assert not broken_constraints(module, collect_constraints(module))


def test_a_half_precision_model_keeps_its_dtype(tmp_path):
    torch.manual_seed(0)
    for merge in (True, False):
        module = CausalLM(tiny.LLAMA, dtype="bfloat16")
        run(tmp_path, "llama", SparseGPT(0.5), LoRA(**FAST, merge=merge), module=module, folder=str(merge))
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert torch.equal(logits(load(tmp_path / str(merge)), "llama"), logits(module, "llama"))


def test_a_layer_that_stands_at_two_places_gets_no_adapter(tmp_path):
    module = make_model("regressor")
    module.blocks[1].up = module.blocks[0].up
    run(tmp_path, "regressor", LoRA(**FAST, merge=False), module=module)
    assert isinstance(module.blocks[0].up, torch.nn.Linear)
    assert {n.split(".lora_")[0] for n in adapter_names(module)} == {"blocks.0.down", "blocks.1.down"}


# Resuming


def test_a_run_that_stops_after_training_goes_on_to_the_same_end(tmp_path, monkeypatch):
    stages = lambda: (SparseGPT(0.5), LoRA(**FAST, dropout=0.1, epochs=2))  # noqa: E731
    whole, _ = run(tmp_path, "llama", *stages(), folder="whole")
    finish = LoRA.finish

    def killed(*args):
        raise KeyboardInterrupt

    for place in ("on_train_epoch_end", "finish"):
        monkeypatch.setattr(LoRA, place, killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(tmp_path, "llama", *stages(), folder=place)
        monkeypatch.undo()
        module = make_model("llama")
        trainer = tiny.trainer(tmp_path / place, *stages())
        trainer.fit(module, datamodule=make_data("llama", tmp_path), ckpt_path="last")
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), whole.parameters(), strict=True))
        assert all(p.requires_grad for p in module.parameters())
        assert [r["notes"] for r in records(tmp_path, place)] == [r["notes"] for r in records(tmp_path, "whole")]
    assert LoRA.finish is finish


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0 trains no adapter. Use 1 or more"),
        ({"rank": 0}, "rank=0 is not above 0"),
        ({"alpha": 0}, "alpha=0 is not above 0"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
        (
            {"initialization": "orthogonal", "rank": 3},
            "rank=3 is odd, which initialization='orthogonal' does not support",
        ),
        ({"initialization": "pissa", "rank": 64}, "takes rank=64 directions out of the weight"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 is not above 0"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(RecipeError, match=message):
        run(tmp_path, "llama", LoRA(**options))


@pytest.mark.parametrize("initialization", ["pissa", "olora"])
def test_an_initialization_that_changes_the_weight_is_refused_after_a_promise(tmp_path, initialization):
    for earlier in (SparseGPT(0.5), GPTQ(4)):
        found = problems_of(tmp_path, "llama", earlier, LoRA(rank=4, initialization=initialization))
        assert len(found) == 1
        assert (found[0].key, found[0].value) == ("initialization", initialization)
        assert found[0].way_out == "Use default or gaussian."


def test_convolutions_have_fewer_initializations(tmp_path):
    found = problems_of(tmp_path, "resnet", LoRA(rank=4, initialization="orthogonal"))
    assert (found[0].key, found[0].value) == ("initialization", "orthogonal")


def test_layers_that_no_adapter_fits_are_refused_with_the_way_out(tmp_path):
    module = make_model("resnet")
    module.model.layer1[0].conv1 = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    found = problems_of(tmp_path, "resnet", LoRA(rank=4), module=module)
    assert "(model.layer1.0.conv1) cannot carry an adapter" in found[0].text
    assert found[0].way_out == "Add them to ignore."
    assert not problems_of(tmp_path, "resnet", LoRA(rank=4, ignore=["layer1.0.conv1"]), module=module)


def test_finetuning_after_a_merge_into_a_grid_is_refused(tmp_path):
    found = problems_of(tmp_path, "llama", GPTQ(4), LoRA(), Finetune(1))
    assert "off the grid of stage 'gptq'" in found[0].text


# QLoRA


@pytest.mark.parametrize("kind", ["llama", "opt", "deit"])
def test_qlora_quantizes_to_nf4_and_keeps_adapters_apart(tmp_path, kind, seen):
    module, _ = run(tmp_path, kind, QLoRA(**FAST, epochs=2))
    plain, _ = run(tmp_path, kind, NF4(), folder="nf4")
    constraints, expected = collect_constraints(module), collect_constraints(plain)
    assert {name.removesuffix(".base_layer") for name in constraints} == set(expected)
    assert {c.grid.codebook for c in constraints.values()} == {"nf4"}
    for name in expected:  # the base is NF4's, before and after the training
        assert torch.equal(module.get_submodule(f"{name}.base_layer").weight, plain.get_submodule(name).weight)
    assert not broken_constraints(module, constraints)
    record, nf4 = records(tmp_path)[-1], records(tmp_path, "nf4")[-1]
    adapters = sum(module.get_parameter(name).numel() for name in adapter_names(module))
    assert record["size_bytes"] == nf4["size_bytes"] + 4 * adapters
    assert torch.equal(logits(load(tmp_path / "run"), kind), logits(module, kind))


def test_qlora_recovers_what_quantization_lost(tmp_path):
    module = make_model("regressor")
    run(tmp_path, "regressor", Finetune(10), RTN(2), QLoRA(**FAST, epochs=5), module=module)
    trained, rounded, recovered = (record["metrics"]["mse"] for record in records(tmp_path)[1:])
    assert max(trained, recovered) < rounded


def test_qlora_keeps_an_earlier_grid_and_mask(tmp_path):
    stages = Magnitude(pattern="2:4"), RTN(3, targets=["q_proj"]), QLoRA(**FAST)
    module, _ = run(tmp_path, "llama", *stages)
    for name, constraints in collect_constraints(module).items():
        assert constraints.grid.bits == (3 if "q_proj" in name else 4)
        assert (constraints.grid.codebook is None) == ("q_proj" in name)
        assert constraints.kept() * 2 == constraints.shape[0] * constraints.shape[1]
    assert not broken_constraints(module, collect_constraints(module))


@pytest.mark.parametrize("order", ["prune first", "recover first"])
@pytest.mark.parametrize("merge", [True, False])
def test_qlora_and_sparsegpt_go_in_either_order(tmp_path, order, merge):
    stages = [SparseGPT(0.5), QLoRA(**FAST, merge=merge)]
    module, _ = run(tmp_path, "llama", *(stages if order == "prune first" else stages[::-1]))
    constraints = collect_constraints(module)
    assert not broken_constraints(module, constraints)
    assert all(c.grid is not None for c in constraints.values())
    assert all(c.kept() * 2 == c.shape[0] * c.shape[1] for c in constraints.values())
    assert bool(adapter_names(module)) != merge
    assert torch.equal(logits(load(tmp_path / "run"), "llama"), logits(module, "llama"))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([QLoRA(group_size=24)], "group_size=24 does not divide in_features=32"),
        ([QLoRA(group_size=0)], "group_size=0 is not above 0"),
        ([QLoRA(initialization="pissa")], "initialization='pissa' would move the weights off their grid"),
        ([GPTQ(4), QLoRA(group_size=32)], "group_size=32 has no effect: every layer is already quantized"),
        ([QLoRA(), GPTQ(4)], "would leave the grid of stage 'qlora'"),
        ([QLoRA(), Finetune(1)], "off the grid of stage 'qlora'"),
        ([QLoRA(epochs=0)], "epochs=0 trains no adapter"),
    ],
)
def test_what_qlora_cannot_do_is_refused(tmp_path, stages, message):
    found = problems_of(tmp_path, "llama", *stages)
    assert found
    assert any(message in str(problem) for problem in found)
