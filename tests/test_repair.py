"""Stages that repair, on whole models: what they keep, what they leave and what they refuse."""

from __future__ import annotations

import json

import kinds
import pytest
import tiny
import torch

from pqqp_lightning.callbacks import GPTQ, INT8, NF4, RTN, Finetune, Magnitude, Polish, QuaRot, Refit, SparseGPT
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.constraints import collect_constraints
from pqqp_lightning.stages.repair import RepairStage

GRIDS = {
    "tensor": lambda: RTN(3, group_size="tensor"),
    "channel": lambda: GPTQ(4),
    "asymmetric in groups": lambda: GPTQ(3, group_size=4, symmetric=False),
    "NF4": lambda: NF4(),
    "INT8": lambda: INT8(),
}


def errors_of(stage: RepairStage, monkeypatch) -> list[tuple[float, float]]:
    """Filled while ``stage`` runs: the layers' errors before and after, computed here from what it gets and returns."""
    found: list[tuple[float, float]] = []
    original = stage.compress_layer

    def watched(inputs):
        done = original(inputs)
        hessian = inputs.statistic.double()
        error = [(w.double() - inputs.dense.double()) for w in (inputs.weight, done.weight)]
        found.append(tuple(float(((e @ hessian) * e).sum()) for e in error))
        return done

    monkeypatch.setattr(stage, "compress_layer", watched)
    return found


@pytest.mark.parametrize("kind", ["linear", "conv2d", "experts"])
@pytest.mark.parametrize("grid", GRIDS)
def test_no_layer_gets_worse_and_masks_bits_and_groups_stay(tmp_path, monkeypatch, kind, grid):
    polish = Polish()
    found = errors_of(polish, monkeypatch)
    before = {}
    on_grid = GRIDS[grid]()

    def remember(model, context):
        before.update(collect_constraints(model))
        return type(polish).compress(polish, model, context)

    monkeypatch.setattr(polish, "compress", remember)
    model = tiny.Regressor() if kind == "linear" else kinds.KindModule(kind)
    stages = [SparseGPT(pattern="2:4"), on_grid, polish]
    tiny.trainer(tmp_path / "run", *stages).fit(model, datamodule=tiny.RegressionData())
    assert found
    assert all(after <= start * (1 + 1e-6) for start, after in found)
    assert sum(after for _, after in found) < 0.95 * sum(start for start, _ in found)
    for name, now in collect_constraints(model).items():
        earlier = before[name]
        assert torch.equal(now.mask(), earlier.mask())
        assert now.pattern == earlier.pattern == (2, 4)
        assert now.grid.is_like(earlier.grid)
        assert now.grid.scale.dtype == earlier.grid.scale.dtype


def test_a_layer_with_a_mask_alone_is_refitted(tmp_path):
    results = []
    for name, repair in (("polish", Polish()), ("refit", Refit())):
        model = tiny.Regressor()
        trainer = tiny.trainer(tmp_path / name, Magnitude(0.5), repair)
        trainer.fit(model, datamodule=tiny.RegressionData())
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_the_record_says_how_much_of_the_error_is_left(tmp_path):
    trainer = tiny.trainer(tmp_path / "run", SparseGPT(0.5), GPTQ(3), Polish())
    trainer.fit(tiny.Regressor(), datamodule=tiny.RegressionData())
    notes = json.loads((tmp_path / "run/report.json").read_text())["stages"][-1]["notes"]
    assert any("squared output error towards the dense weights: 0." in note for note in notes)


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        ([Polish()], "has nothing to repair"),
        ([GPTQ(4), Refit()], "has nothing to repair"),
        ([Magnitude(0.5), Finetune(epochs=1), Polish()], "would undo the training of stage 'finetune'"),
        ([Polish(passes=0, damping=2.0)], "is not above 0"),
    ],
)
def test_is_refused_before_any_work(tmp_path, stages, reason):
    with pytest.raises(RecipeError) as caught:
        tiny.trainer(tmp_path / "run", *stages).fit(tiny.Regressor(), datamodule=tiny.RegressionData())
    assert any(reason in problem.text and problem.way_out for problem in caught.value.problems)
    assert not (tmp_path / "run").exists()


def test_a_rotation_before_it_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="changed what the layers compute"):
        trainer = tiny.trainer(tmp_path / "run", QuaRot(), GPTQ(4), Polish())
        trainer.fit(tiny.make_model("llama"), datamodule=tiny.make_data("llama", tmp_path))


def test_a_resumed_run_aims_at_the_dense_weights_too(tmp_path, monkeypatch):
    """Those that the model has before the checkpoint is loaded."""

    def fit(folder, **options):
        model = tiny.Regressor()
        trainer = tiny.trainer(tmp_path / folder, GPTQ(3), Polish())
        trainer.fit(model, datamodule=tiny.RegressionData(), **options)
        return model

    def stop(*_):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(Polish, "compress", stop)
        with pytest.raises(InterruptedError):
            fit("run")
    resumed = fit("run", ckpt_path="last")
    whole = fit("whole")
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
