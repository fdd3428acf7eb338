"""Learning from the dense model: the objective against loops, the teacher untouched, and what is refused."""

import json
import math

import pytest
import tiny
import torch
from torch import nn

from pqqp_lightning.callbacks import RTN, Finetune, Magnitude
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.runs.distillation import distillation_loss, hidden_loss, make_teacher
from pqqp_lightning.stages.distillation import Distillation


def slow_kl(student, teacher, temperature):
    """Mean over rows of T^2 * sum_c p_c (log p_c - log q_c), from Hinton et al. 2015, in plain Python."""
    total = 0.0
    for q_row, p_row in zip(student.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(x / temperature) for x in p_row]
        q = [math.exp(x / temperature) for x in q_row]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_objective_is_the_divergence_of_the_paper(temperature):
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    found = distillation_loss(student, teacher, Distillation(temperature=temperature))
    assert float(found) == pytest.approx(slow_kl(student, teacher, temperature), rel=1e-4)
    batched = distillation_loss(student.view(2, 3, 5), teacher.view(2, 3, 5), Distillation(temperature=temperature))
    assert torch.allclose(found, batched)
    assert float(distillation_loss(teacher, teacher, Distillation())) == pytest.approx(0, abs=1e-6)


def test_hidden_states_are_compared_relative_to_the_teachers():
    teacher = [torch.randn(4, 3), 10 * torch.randn(4, 3)]
    student = [1.1 * t for t in teacher]
    assert float(hidden_loss(student, teacher)) == pytest.approx(0.01, rel=1e-4)


def fit(folder, *stages, module=None):
    module = module or tiny.Regressor()
    trainer = tiny.trainer(folder, *stages)
    trainer.fit(module, tiny.regression_loader(96), tiny.regression_loader(64, seed=1))
    report = json.loads((folder / "report.json").read_text())
    return module, report["stages"]


def distance_to_dense(module):
    x = tiny.regression_data(64, seed=1).tensors[0]
    with torch.no_grad():
        return float((module(x) - tiny.Regressor()(x)).square().mean())


MIMIC = Distillation(weight=1.0, loss="mse")


def test_distillation_brings_a_pruned_model_back_to_the_dense_one(tmp_path):
    pruned, _ = fit(tmp_path / "a", Magnitude(0.6))
    taught, _ = fit(tmp_path / "b", Magnitude(0.6, epochs=8, distill=MIMIC))
    alone, _ = fit(tmp_path / "c", Magnitude(0.6, epochs=8))
    assert distance_to_dense(taught) < 0.5 * distance_to_dense(pruned)
    assert distance_to_dense(taught) < distance_to_dense(alone)


def test_the_teacher_of_a_later_stage_is_still_the_dense_model(tmp_path):
    once, _ = fit(tmp_path / "a", Magnitude(0.6), Finetune(epochs=4, distill=MIMIC))
    assert distance_to_dense(once) < distance_to_dense(fit(tmp_path / "b", Magnitude(0.6))[0])


def test_hidden_states_and_half_precision_train_too(tmp_path):
    settings = Distillation(hidden_weight=0.1, loss="mse", teacher_dtype="bfloat16")
    _, stages = fit(tmp_path, Magnitude(0.6, epochs=2, distill=settings))
    assert stages[1]["options"]["distill"]["teacher_dtype"] == "bfloat16"
    assert stages[1]["metrics"]["mse"] < stages[1]["metrics_before_finetuning"]["mse"]


def test_a_language_model_learns_from_its_dense_self(tmp_path):
    module = tiny.make_model("llama")
    stage = Magnitude(0.5, epochs=1, learning_rate=1e-3, distill=Distillation(hidden_weight=1.0))
    tiny.trainer(tmp_path / "run", stage).fit(module, datamodule=tiny.make_data("llama", tmp_path))
    assert "training_step" not in vars(module)


def test_the_teacher_is_frozen_and_apart():
    dense = tiny.Regressor()
    teacher = make_teacher(dense, "float16")
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    assert {p.dtype for p in teacher.parameters()} == {torch.float16}
    assert {p.dtype for p in dense.parameters()} == {torch.float32}


class Evasive(tiny.Regressor):
    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.head(self.blocks(self.inlet(batch[0]))), batch[1])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Magnitude(0.5, distill=Distillation())], r"distill has no effect with epochs=0. Set epochs, or drop it"),
        ([Magnitude(0.5, epochs=1, distill=Distillation(weight=0))], r"distill.weight=0 is not in \(0, 1\]"),
        ([Magnitude(0.5, epochs=1, distill=Distillation(temperature=0))], r"distill.temperature=0 is not above 0"),
        ([Finetune(1, distill=Distillation(hidden_weight=-1))], r"distill.hidden_weight=-1 is negative"),
        (
            [
                Magnitude(0.5, epochs=1, distill=Distillation()),
                Finetune(1, distill=Distillation(teacher_dtype="float16")),
            ],
            r"one teacher serves all, but distill.teacher_dtype differs \(magnitude: same, finetune: float16\)",
        ),
        ([RTN(4, epochs=1, distill=Distillation())], r"off the grid of stage 'rtn'.*recover with LoRA"),
    ],
)
def test_what_cannot_be_distilled_is_refused(tmp_path, stages, message):
    with pytest.raises(RecipeError, match=message):
        fit(tmp_path / "run", *stages)
    assert not (tmp_path / "run").exists()


def test_a_module_that_hides_its_outputs_is_told_how_to_show_them(tmp_path):
    with pytest.raises(RecipeError, match=r"distill needs a training_step of Evasive that calls self\(...\)"):
        fit(tmp_path, Finetune(1, distill=Distillation()), module=Evasive())
