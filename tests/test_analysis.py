"""``analyze``: the layers' errors against a slow reference, interference, and the theorems' assumptions."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from command_line import prepare, run
from tiny import MODELS, make_data, make_model, trainer

from pqqp_lightning.algorithms.interference import additivity, mixed_units
from pqqp_lightning.callbacks import GPTQ, RTN, SLEB, BasisSharing, ChannelPruning, LoRA, Magnitude, QuaRot, SparseGPT
from pqqp_lightning.checkpoint.load import load
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.experiments.analysis import analyze_pair


def named(**stages):
    for name, stage in stages.items():
        stage.name = name
    return list(stages.values())


def analyze(folder, *stages, kind="llama", layers=2, **options):
    folder.mkdir(exist_ok=True)
    model = make_model(kind, layers)
    analyze_pair(trainer(folder / "run", *stages), model, make_data(kind, folder), **options)
    return json.loads((folder / "run/analysis.json").read_text())


def fitted(folder, *stages, kind="llama"):
    model = make_model(kind)
    trainer(folder, *stages).fit(model, datamodule=make_data(kind, folder.parent))
    return load(folder)


def slow_errors(dense, compressed, data):
    """Layer by layer, from the inputs that one pass of the dense model gives it: a loop over samples in float64."""
    data.setup("fit")
    inputs: dict[str, list] = {}
    layers = {n: m for n, m in dense.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, n=n: inputs.setdefault(n, []).append(args[0]))
        for n, layer in layers.items()
    ]
    with torch.no_grad():
        for batch in data.calibration_dataloader():
            dense.eval().calibration_step(batch, 0)
    for hook in hooks:
        hook.remove()
    other, errors = dict(compressed.named_modules()), {}
    for name, layer in layers.items():
        change = (other[name].weight - layer.weight).double()
        moved = sum(float((x.double() @ change.T).square().sum()) for x in inputs[name])
        errors[name] = moved / sum(float((x.double() @ layer.weight.double().T).square().sum()) for x in inputs[name])
    return errors


def test_errors_are_those_of_a_slow_reference_on_plain_fits(tmp_path):
    stages = {"prune": lambda: SparseGPT(0.5), "quantize": lambda: GPTQ(4)}
    report = analyze(tmp_path, *named(prune=SparseGPT(0.5), quantize=GPTQ(4)))
    assert len(report["layers"]) == 2 * 7
    for key in ("prune", "quantize", "prune->quantize", "quantize->prune"):
        names = key.split("->")
        run_folder = tmp_path / key.replace("->", "-")
        compressed = fitted(run_folder, *named(**{name: stages[name]() for name in names}))
        expected = slow_errors(make_model("llama"), compressed, make_data("llama", tmp_path))
        for layer in report["layers"]:
            assert layer["errors"][key] == pytest.approx(expected[layer["name"]], rel=1e-4), (key, layer["name"])


def test_what_is_written_says_the_same(tmp_path, monkeypatch, capsys):
    folder = prepare(tmp_path, monkeypatch)
    assert run("analyze", "--config", "recipe.yaml", "--run_dir", "found") == 0
    printed = capsys.readouterr().out
    report = json.loads((folder / "found/analysis.json").read_text())
    with (folder / "found/layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, layer in zip(rows, report["layers"], strict=True):
        errors = layer["errors"]
        assert row["layer"] == layer["name"]
        for order in ("prune->quantize", "quantize->prune"):
            expected = errors[order] - errors["prune"] - errors["quantize"]
            assert float(row[f"Δ {order}"]) == pytest.approx(expected, abs=1e-12)
    assert "100.0% of" in printed
    assert "A(prune -> quantize) = " in printed
    assert (folder / "found/layers.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "found/report.html").read_text()
    assert "Layer by layer (14)" in page
    assert run("report", "found") == 0
    assert printed.rstrip().endswith(capsys.readouterr().out.rstrip())


def test_stages_on_other_layers_do_not_interfere_and_their_order_does_not_matter(tmp_path):
    report = analyze(tmp_path, *named(prune=Magnitude(0.5, targets=["self_attn"]), quantize=RTN(3, targets=["mlp"])))
    for layer in report["layers"]:
        errors = layer["errors"]
        assert errors["prune->quantize"] == errors["quantize->prune"] == errors["prune"] + errors["quantize"]
    assert report["advantage"]["value"] == 0
    assert report["selectivity"]["prune->quantize"][0] == 0
    assert report["selectivity"]["prune->quantize"][1] > 0


def test_pruning_within_quantization_units_interferes(tmp_path):
    report = analyze(tmp_path, *named(prune=Magnitude(0.5), quantize=RTN(3)))
    mixed, units = report["selectivity"]["quantize->prune"]
    assert mixed == units == 2 * (32 + 16 + 16 + 32 + 64 + 64 + 32)  # a unit a row
    deltas = [e["quantize->prune"] - e["prune"] - e["quantize"] for e in (la["errors"] for la in report["layers"])]
    assert max(map(abs, deltas)) > 1e-4


def test_removed_blocks_and_rounding_commute_while_the_same_blocks_go(tmp_path):
    report = analyze(tmp_path, *named(shorten=SLEB(1), quantize=RTN(8)), layers=4)
    gone = report["gone"]
    assert len(gone["shorten"]) == 7
    assert gone["shorten->quantize"] == gone["quantize->shorten"] == gone["shorten"]
    assert report["advantage"]["value"] == 0
    for layer in report["layers"]:
        errors = layer["errors"]
        if layer["name"] in gone["shorten"]:
            assert errors["shorten"] == errors["shorten->quantize"] == 1
        else:  # renumbered, and found by what they were
            assert errors["shorten"] == 0
            assert errors["shorten->quantize"] == errors["quantize"] > 0


def test_factors_and_adapters_are_compared_by_what_they_compute(tmp_path):
    shared = BasisSharing(ratio=0.2, group=2, targets=["q_proj", "up_proj"])
    report = analyze(tmp_path / "a", *named(share=shared, prune=Magnitude(0.5)))
    for layer in report["layers"]:
        inside = layer["name"].endswith(("q_proj", "up_proj"))
        assert (0 < layer["errors"]["share"] < 1) == inside
    adapted = named(recover=LoRA(rank=2, epochs=1, learning_rate=0.01, merge=False), quantize=RTN(4))
    report = analyze(tmp_path / "b", *adapted)
    assert all(layer["errors"]["recover"] > 0 for layer in report["layers"] if layer["name"].endswith("q_proj"))


@pytest.mark.parametrize("kind", MODELS)
def test_every_model(tmp_path, kind):
    report = analyze(tmp_path, *named(prune=Magnitude(0.5), quantize=RTN(4)), kind=kind)
    assert all(0 <= e < 1.5 for layer in report["layers"] for e in layer["errors"].values())
    assert report["additivity"]["parts"] >= 2


def test_the_model_is_the_dense_one_again_and_a_second_analysis_applies_nothing(tmp_path):
    stages = named(prune=Magnitude(0.5), quantize=RTN(4))
    first = analyze(tmp_path, *stages)
    again = json.loads(json.dumps(analyze(tmp_path, *stages)))
    assert first["layers"] == again["layers"]
    assert [r["elapsed_s"] for r in first["records"].values()] == [r["elapsed_s"] for r in again["records"].values()]


def test_independent_errors_add_up_and_equal_ones_do_not():
    parts = [torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0]), torch.zeros(3)]
    found = additivity(parts, sum(parts))
    assert (found.ratio, found.cosine, found.parts) == (1.0, 0.0, 2)
    same = additivity([parts[0]] * 3, 3 * parts[0])
    assert (same.ratio, same.cosine, same.parts) == (pytest.approx(3.0), pytest.approx(1.0), 3)
    assert additivity(parts[1:], parts[1]) is None


def test_units_that_are_pruned_in_part():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)
    assert mixed_units(mask, torch.Size([2, 2])) == (1, 4)
    assert mixed_units(mask, torch.Size([2, 1])) == (2, 2)
    assert mixed_units(mask, torch.Size([1, 1])) == (1, 1)
    assert mixed_units(torch.ones_like(mask), torch.Size([2, 2])) == (0, 4)


@pytest.mark.parametrize(
    ("stages", "options", "words"),
    [
        ([Magnitude(0.5)], {}, "needs 2 stages, but the recipe has 1"),
        (named(a=Magnitude(0.5), b=RTN(4), c=RTN(3)), {}, "needs 2 stages, but the recipe has 3"),
        (named(a=QuaRot(), b=RTN(4)), {}, "stages.a (QuaRot): changes the inputs and outputs of layers"),
        (named(a=ChannelPruning(0.5), b=RTN(4)), {"samples": 0}, "samples=0 compares nothing"),
    ],
)
def test_what_cannot_be_analyzed_is_refused_before_any_work(tmp_path, stages, options, words):
    with pytest.raises(RecipeError) as caught:
        analyze(tmp_path, *stages, **options)
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "store").exists()
