"""``order --strategy predict``: an order from calibration alone."""

from __future__ import annotations

import json

import pytest
from command_line import RECIPE, prepare, run, write_recipe
from test_analysis import fitted, named, slow_errors
from tiny import make_data, make_model, trainer

from pqqp_lightning.callbacks import GPTQ, RTN, SLEB, BasisSharing, QuaRot, SparseGPT
from pqqp_lightning.experiments import OrderOptions, search_orders
from pqqp_lightning.report.pages import show_run
from pqqp_lightning.runs.stage_runner import StageRunner

TWO = RECIPE[RECIPE.index("stages:") :]
STAGES = {
    "prune": lambda: SparseGPT(0.5),
    "quantize": lambda: GPTQ(4, allow_undo=True),
    "coarse": lambda: RTN(2, allow_undo=True),
}


def predict(folder, *stages, show=None, **options):
    chosen = OrderOptions(strategy="predict", **options)
    data = make_data("llama", folder)
    search_orders(trainer(folder / "run", *stages), make_model("llama"), data, chosen, show=show)
    return json.loads((folder / "run/prediction.json").read_text())


def test_intensities_are_the_layers_errors_and_nothing_is_evaluated(tmp_path, monkeypatch):
    records = []
    monkeypatch.setattr(StageRunner, "measure_dense", lambda *_: records.append("dense"))
    monkeypatch.setattr(StageRunner, "_record", lambda *_: records.append("stage"))
    report = predict(tmp_path, *named(**{name: make() for name, make in STAGES.items()}))
    assert not records
    monkeypatch.undo()
    for name, make in STAGES.items():
        compressed = fitted(tmp_path / name, *named(**{name: make()}))
        errors = slow_errors(make_model("llama"), compressed, make_data("llama", tmp_path))
        assert report["intensity"][name] == pytest.approx(sum(errors.values()) / len(errors), rel=1e-4)
    assert report["predicted"] == sorted(STAGES, key=report["intensity"].__getitem__)
    assert report["exactly"]


def test_a_rotation_has_no_intensity_and_orders_that_cannot_run_are_left_out(tmp_path):
    report = predict(tmp_path, *named(quantize=RTN(4), rotate=QuaRot()))
    assert report["intensity"]["rotate"] == 0
    assert report["predicted"] == ["rotate", "quantize"]
    assert [refused["order"] for refused in report["refused"]] == [["quantize", "rotate"]]


def test_layers_that_go_count_as_wholly_wrong_and_that_is_said(tmp_path, capsys):
    report = predict(tmp_path, *named(shorten=SLEB(1), quantize=RTN(8)), show=show_run)
    assert report["intensity"]["shorten"] == pytest.approx(0.5)  # one block of two
    assert report["gone"] == {"shorten": report["layers"] // 2, "quantize": 0}
    printed = capsys.readouterr().out
    assert f"shorten removes {report['layers'] // 2} of {report['layers']} layers, each of which counts" in printed
    assert "quantize removes" not in printed


def test_factors_have_the_intensity_of_what_they_compute(tmp_path):
    report = predict(tmp_path, *named(prune=SparseGPT(0.1), share=BasisSharing(ratio=0.6, group=2, allow_undo=True)))
    assert 0 < report["intensity"]["prune"] < report["intensity"]["share"] < 1


def test_what_was_measured_before_is_compared(tmp_path, monkeypatch, capsys):
    folder = prepare(tmp_path, monkeypatch)
    arguments = ["order", "--config", "recipe.yaml", "--run_dir", "predicted", "--strategy", "predict"]
    assert run(*arguments) == 0
    printed = capsys.readouterr().out
    report = json.loads((folder / "predicted/prediction.json").read_text())
    assert report["measured"] is None
    assert f"fit --stage_order [{','.join(report['predicted'])}]" in printed
    assert "Nothing was evaluated." in printed
    assert not list((folder / "store").glob("*/model"))
    assert run("order", "--config", "recipe.yaml", "--run_dir", "searched") == 0
    best = json.loads((folder / "searched/order.json").read_text())["best"]
    capsys.readouterr()
    assert run(*arguments[:4], "again", *arguments[5:]) == 0
    measured = json.loads((folder / "again/prediction.json").read_text())["measured"]
    assert measured["best"] == best
    assert ("An earlier search measured it as the best." in capsys.readouterr().out) == (best == report["predicted"])
    assert (folder / "again/report.html").is_file()


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("{class_path: Finetune, init_args: {epochs: 1}}", "stages.other (Finetune): epochs=1 trains"),
        (
            "{class_path: ChannelPruning, init_args: {ratio: 0.5}}",
            "stages.other (ChannelPruning): changes the inputs and outputs",
        ),
    ],
)
def test_what_calibration_does_not_foresee_is_refused(tmp_path, monkeypatch, capsys, stage, words):
    folder = prepare(tmp_path, monkeypatch)
    data = "calibration: calibration.npy"
    write_recipe(folder, {TWO: f"{TWO}  other: {stage}\n", data: f"{data}, train: train.npy"})
    assert run("order", "--config", "recipe.yaml", "--strategy", "predict") == 2
    error = capsys.readouterr().err
    assert words in error
    assert "--strategy progressive" in error
    assert not (folder / "runs").exists()
