"""Wrong types that Python code passes, where the command line would have read them: refused before any work."""

from __future__ import annotations

import pytest
import tiny
import torch
from composition import STAGES as STAGE_CLASSES

from pqqp_lightning import Trainer, export, load
from pqqp_lightning.argument_types import wrong_types
from pqqp_lightning.callbacks import GPTQ, NF4, RTN, Finetune, LoRA, Magnitude, Polish, SparseGPT
from pqqp_lightning.data import ImageData, TextData, TokenData
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.experiments import OrderOptions, PipelineOptions, SweepOptions
from pqqp_lightning.inference.classification import classify_images
from pqqp_lightning.inference.generation import generate_text
from pqqp_lightning.models import CausalLM, ImageClassifier
from pqqp_lightning.stages.arguments import argument_problems


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


CALLS = {
    "load None": (lambda: load(None), "run=None should be text or Path."),
    "load nothing": (lambda: load(""), "run='' is not a path. Name a run folder, such as runs/quickstart."),
    "packed": (lambda: load("run", packed="false"), "packed='false' should be true or false. Leave the quotes out."),
    "export": (
        lambda: export("run", to="hf", out="model", widen="false", check=1),
        "widen='false' should be true or false. Leave the quotes out.\ncheck=1 should be true or false.",
    ),
    "export nothing": (lambda: export(None, to="hf", out=""), "run=None is not a path"),
    "generate": (
        lambda: generate_text("run", prompt=None, max_new_tokens="10", packed="no"),
        "prompt=None should be text.\nmax_new_tokens='10' should be a whole number. Leave the quotes out.\n"
        "packed='no' should be true or false.",
    ),
    "classify a word": (lambda: classify_images("run", "photos"), "images='photos' should be [text or Path, ...]."),
    "classify nothing": (lambda: classify_images("run", []), "images=[] names no image"),
    "order": (lambda: OrderOptions(comparable_only="false"), "comparable_only='false' should be true or false."),
    "search": (lambda: PipelineOptions(objectives="size"), "objectives='size' should be [text, ...] or null."),
    "sweep": (lambda: SweepOptions(grid=[1]), "grid=[1] should be {name: a value}."),
    "text": (lambda: TextData(bos="false", sequence_length="8"), "data: sequence_length='8' should be a whole number."),
    "tokens": (
        lambda: TokenData(None, 5),
        "data: calibration=None should be text.\ndata: evaluation=5 should be text.",
    ),
    "images": (lambda: ImageData(mean="0.5"), "data: mean='0.5' should be [a number, ...] or null."),
    "language model": (lambda: CausalLM(5), "model: model=5 should be text or {name: a value}."),
    "language model without a name": (lambda: CausalLM(""), "model: model='' is empty."),
    "classifier": (
        lambda: ImageClassifier("resnet18", pretrained="false"),
        "model: pretrained='false' should be true or false.",
    ),
    "trainer": (lambda: Trainer(fold_parametrizations="no"), "trainer: fold_parametrizations='no' should be true or"),
    "a class among the callbacks": (lambda: Trainer(callbacks=[RTN, 5]), "is not a callback. Make one: RTN(...)."),
}


@pytest.mark.parametrize("what", CALLS)
def test_a_value_of_another_type_is_refused(what, folder):
    call, words = CALLS[what]
    with pytest.raises(RecipeError) as refused:
        call()
    assert words in str(refused.value)
    assert not list(folder.iterdir())


STAGES = {
    "bool": (lambda: GPTQ(4, symmetric="false"), "symmetric='false' should be true or false. Leave the quotes out."),
    "another bool": (lambda: Polish(scales="false"), "scales='false' should be true or false. Leave the quotes out."),
    "bool of a base": (lambda: RTN(4, allow_undo="no"), "allow_undo='no' should be true or false."),
    "number": (lambda: SparseGPT("0.5"), "sparsity='0.5' should be a number, {name: a number} or null."),
    "whole number": (lambda: GPTQ(4.5), "bits=4.5 should be a whole number or {name: a whole number}."),
    "truth for a number": (lambda: Magnitude(0.5, epochs=True), "epochs=True should be a whole number."),
    "epochs": (lambda: Finetune(epochs="1"), "epochs='1' should be a whole number."),
    "list": (lambda: RTN(4, targets=[5]), "targets=[5] should be [text, ...] or null."),
    "number or word": (lambda: NF4("64"), "group_size='64' should be a whole number, 'auto' or {name:"),
    "word": (lambda: LoRA(initialization=None), "initialization=None should be one of 'default', 'gaussian'"),
    "options": (lambda: LoRA(distill={"weight": 0.5}), "distill={'weight': 0.5} should be Distillation or null."),
}


@pytest.mark.parametrize("what", STAGES)
def test_a_stage_made_with_another_type_is_refused_with_the_rest(what, folder):
    make, words = STAGES[what]
    trainer = tiny.trainer(folder / "run", make(), RTN(12, targets=["nothing"]))
    with pytest.raises(RecipeError) as refused:
        trainer.fit(tiny.make_model("llama"), datamodule=tiny.make_data("llama", folder))
    text = str(refused.value)
    assert words in text
    assert "bits=12" in text
    assert not (folder / "run").exists()


@pytest.mark.parametrize("name", STAGE_CLASSES)
def test_a_stage_with_its_defaults_has_the_right_types(name):
    """Also where its constructor takes another type than its base's, as the bits of MixedPrecision."""
    assert [problem for stage in tiny.make_stages(STAGE_CLASSES[name]) for problem in argument_problems(stage)] == []


def test_values_of_the_right_types_pass():
    def function(flag: bool, number: float, count: int, names: list[str] | None, path: str, by_name: dict[str, float]):
        """Has one argument of each kind."""

    good = {
        "flag": True,
        "number": 1,
        "count": 2,
        "names": ("a",),
        "path": "b",
        "by_name": {"c": 0.5},
        "other": object(),
    }
    assert wrong_types(function, good) == []
    assert wrong_types(function, {"flag": torch.tensor(0.5).numpy() > 0, "number": torch.ones(1).numpy()[0]}) == []
    wrong = {"flag": 1, "number": True, "count": 2.0, "names": "a", "path": 3, "by_name": {"c": "d"}}
    assert [problem.key for problem in wrong_types(function, wrong)] == list(wrong)
