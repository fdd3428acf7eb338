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
        hessian = inputs.statistic.hessian.double()
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


def inputs_of(model, name):
    """The rows [T, I] that the layer ``name`` reads on the calibration data."""
    rows = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    with torch.no_grad():
        model.eval()(tiny.regression_data(24).tensors[0])
    handle.remove()
    return rows[0]


def test_dense_inputs_are_paired_with_the_compressed_models(tmp_path, monkeypatch):
    polish = Polish(inputs="dense")
    statistics = []
    original = polish.prepare

    def watched(value, found):
        statistics.append(value.clone())
        return original(value, found)

    monkeypatch.setattr(polish, "prepare", watched)
    dense, model = tiny.Regressor(), tiny.Regressor()
    trainer = tiny.trainer(tmp_path / "run", SparseGPT(0.5), GPTQ(3), polish)
    trainer.fit(model, datamodule=tiny.RegressionData())
    assert len(statistics) == 4  # up and down of two blocks
    x, y = inputs_of(model, "blocks.1.up"), inputs_of(dense, "blocks.1.up")
    assert not torch.allclose(x, y, atol=1e-2)
    assert torch.allclose(statistics[2][0, 0], x.T @ x, atol=1e-3)
    assert torch.allclose(statistics[2][0, 1], x.T @ y, atol=1e-3)
    # nothing before the first block is compressed
    assert torch.allclose(statistics[0][0, 0], statistics[0][0, 1], atol=1e-4)


@pytest.mark.parametrize("kind", ["conv2d", "experts", "attention", "llama", "resnet"])
def test_every_kind_of_layer_is_repaired_towards_the_dense_models_outputs(tmp_path, kind):
    model = kinds.KindModule(kind) if kind in kinds.NETWORKS else tiny.make_model(kind)
    data = tiny.RegressionData() if kind in kinds.NETWORKS else tiny.make_data(kind, tmp_path)
    means = {name: value.clone() for name, value in model.named_buffers() if name.endswith("running_mean")}
    trainer = tiny.trainer(tmp_path / "run", SparseGPT(0.5), GPTQ(3), Polish(inputs="dense"))
    trainer.fit(model, datamodule=data)
    notes = json.loads((tmp_path / "run/report.json").read_text())["stages"][-1]["notes"]
    assert any("squared output error that masks and grids cause: 0." in note for note in notes)
    paired = not any("the dense model computes other rows here" in note for note in notes)
    assert paired == (kind not in ("experts", "attention"))  # parts of a weight, which read inputs of their own
    for name, mean in means.items():  # the dense statistics were for the dense passes only
        assert not torch.equal(model.get_buffer(name), mean)


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
    assert any("squared output error that masks and grids cause: 0." in note for note in notes)


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        ([Polish()], "has nothing to repair"),
        ([GPTQ(4), Refit()], "has nothing to repair"),
        ([Magnitude(0.5), Finetune(epochs=1), Polish()], "would undo the training of stage 'finetune'"),
        ([GPTQ(4), Polish(passes=0)], "is not above 0"),
        ([GPTQ(4), Polish(inputs="sparse")], "is not one of dense, compressed, mixed"),
        ([GPTQ(4), Polish(inputs="dense", damping=0.0)], "leaves the target of inputs=dense undetermined"),
        ([Magnitude(0.5), Refit(iterations=0)], "is not above 0"),
    ],
)
def test_is_refused_before_any_work(tmp_path, stages, reason):
    with pytest.raises(RecipeError) as caught:
        tiny.trainer(tmp_path / "run", *stages).fit(tiny.Regressor(), datamodule=tiny.RegressionData())
    assert any(reason in problem.text and problem.way_out for problem in caught.value.problems)
    assert not (tmp_path / "run").exists()


def test_a_rotation_before_it_is_refused(tmp_path):
    trainer = tiny.trainer(tmp_path / "run", QuaRot(), GPTQ(4), Polish())
    with pytest.raises(RecipeError, match="changed what the layers compute"):
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
