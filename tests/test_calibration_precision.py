"""Half precision and ``calibration_precision``: what computes in it, and what stays float32."""

from __future__ import annotations

import pytest
import torch
from command_line import prepare, run
from test_fingerprint import keys
from tiny import Regressor, make_data, make_model, regression_loader, trainer

from pqqp_lightning import Stage
from pqqp_lightning.algorithms import gptq, sparsegpt
from pqqp_lightning.algorithms.grid import round_to_grid
from pqqp_lightning.calibration import statistics
from pqqp_lightning.callbacks import GPTQ, RTN, SparseGPT
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.layers import named_layers, weight_matrix
from pqqp_lightning.runs.run import run_identity
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.stages import hessian


@pytest.fixture
def seen(monkeypatch):
    """Torch's setting and the dtype of the first tensor in each part of a stage."""
    found: dict[str, set] = {}

    def watch(module, name):
        original = getattr(module, name)

        def watched(first, *args, **options):
            found.setdefault(name, set()).add((torch.get_float32_matmul_precision(), first.dtype))
            return original(first, *args, **options)

        monkeypatch.setattr(module, name, watched)

    watch(statistics, "add_gram")
    watch(hessian, "factorize_inverse")
    watch(gptq, "sweep_columns")
    watch(sparsegpt, "sweep_columns")
    return found


class Watched(Regressor):
    """Notes torch's setting in evaluations."""

    settings: tuple = ()

    def validation_step(self, batch, batch_idx):
        self.settings = (*self.settings, torch.get_float32_matmul_precision())
        return super().validation_step(batch, batch_idx)


def test_products_of_calibration_alone_get_the_precision(tmp_path, seen):
    module = Watched()
    engine = trainer(tmp_path, SparseGPT(0.5), GPTQ(4), calibration_precision="medium")
    engine.fit(module, regression_loader(), regression_loader(16))
    assert seen["add_gram"] == {("medium", torch.float32)}
    assert seen["factorize_inverse"] == seen["sweep_columns"] == {("highest", torch.float32)}
    assert module.settings[0] == module.settings[-1] == "highest"  # the dense model's evaluation and the last
    assert torch.get_float32_matmul_precision() == "highest"


def test_without_the_option_torch_decides(tmp_path, seen):
    torch.set_float32_matmul_precision("high")
    try:
        trainer(tmp_path, SparseGPT(0.5)).fit(Regressor(), regression_loader(), regression_loader(16))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen["add_gram"] == {("high", torch.float32)}


class Failing(SparseGPT):
    def prepare(self, statistic, found):
        raise ArithmeticError("cannot")


def test_a_failure_puts_the_setting_back(tmp_path):
    engine = trainer(tmp_path, Failing(0.5), calibration_precision="medium")
    with pytest.raises(RecipeError, match="cannot"):
        engine.fit(Regressor(), regression_loader(), regression_loader(16))
    assert torch.get_float32_matmul_precision() == "highest"


def test_results_and_runs_of_another_precision_are_others(tmp_path):
    plain = keys(tmp_path, [RTN()])
    high = keys(tmp_path, [RTN()], calibration_precision="high")
    assert plain[0] != high[0]
    assert plain[1] != high[1]
    data = RunData(Regressor(), regression_loader(), regression_loader(16))
    assert "calibration_precision" not in run_identity(trainer(tmp_path), data, [])  # as in runs before it
    engine = trainer(tmp_path, calibration_precision="high")
    assert run_identity(engine, data, [])["calibration_precision"] == "high"


def test_another_word_is_refused(tmp_path):
    with pytest.raises(RecipeError) as error:
        trainer(tmp_path, calibration_precision="fast")
    [problem] = error.value.problems
    assert (problem.key, problem.value) == ("trainer.calibration_precision", "fast")


def test_the_command_line_has_it(tmp_path, monkeypatch, seen):
    prepare(tmp_path, monkeypatch)
    stages = ("--stages.prune", "SparseGPT", "--stages.prune.sparsity", "0.5")
    assert run("fit", "--config", "recipe.yaml", *stages, "--calibration_precision", "medium") == 0
    assert {precision for precision, _ in seen["add_gram"]} == {"medium"}
    assert "  calibration_precision: medium" in (tmp_path / "run" / "recipe.yaml").read_text()  # of the trainer


@pytest.mark.parametrize("stages", [lambda: [SparseGPT(0.5), GPTQ(4)], lambda: [GPTQ(4), SparseGPT(0.5)]])
def test_bf16_weights_have_float32_statistics_and_an_exact_grid(tmp_path, seen, stages: list[Stage]):
    module = make_model("llama")
    engine = trainer(tmp_path / "run", *stages(), precision="bf16-true")
    engine.fit(module, datamodule=make_data("llama", tmp_path))
    settings = seen["add_gram"] | seen["factorize_inverse"] | seen["sweep_columns"]
    assert {dtype for _, dtype in settings} == {torch.float32}
    layers = [layer for name, layer in named_layers(module.model) if "layers" in name]
    for layer in layers:
        weight, constraints = weight_matrix(layer), constraints_of(layer)
        assert weight.dtype is torch.bfloat16
        assert torch.equal(round_to_grid(weight, constraints.grid), weight)
        kept = constraints.mask(weight.device)
        assert not weight[~kept].any()
        assert kept.float().mean() == 0.5
