"""Wrong recipes and command lines: which setting is to blame, who set it, and its value; for a dozen, every word.

Every problem at once, exit code 2, no traceback, before any work; nothing is written and nothing is lost.
"""

from __future__ import annotations

import gzip
import os
import re
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from command_line import RECIPE, prepare, refused, run, run_command, run_process, write_recipe
from wrong_input import WRONG, Wrong

from pqqp_lightning import Trainer
from pqqp_lightning.callbacks import RTN, Magnitude
from pqqp_lightning.data import TokenData
from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.models import CausalLM
from pqqp_lightning.storage.run_folder import MANIFEST, WEIGHTS

DECODER = "model.model.layers"

ODD_MODELS = """
import torch
from pqqp_lightning.models import CausalLM


class NaNWeights(CausalLM):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with torch.no_grad():
            self.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")


class NaNActivations(CausalLM):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with torch.no_grad():
            for layer in (self.model.model.layers[1].mlp.up_proj, self.model.model.layers[1].mlp.gate_proj):
                layer.weight.mul_(3e38)


class Buggy(CausalLM):
    def forward(self, input_ids):
        raise KeyError("a bug of ours")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "odd_models.py").write_text(ODD_MODELS)
    sys.modules.pop("odd_models", None)
    return prepare(tmp_path, monkeypatch)


def everything_in(folder: Path) -> dict[str, bytes | None]:
    """All files but the store's: what a search measured before it met the mistake is kept for the next try."""
    found = (path for path in folder.rglob("*") if not {"__pycache__", "store"} & set(path.parts))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


def is_about(problem: Problem, expected: str) -> bool:
    """Whether a problem is the one that ``"SOURCE: KEY=VALUE ~ WORDS"`` names."""
    setting, _, words = expected.partition(" ~ ")
    source, _, setting = setting.partition(": ")
    key, _, value = setting.partition("=")
    message = str(problem)
    if value not in message or words not in message:
        return False
    if not key:
        return not problem.key and message.startswith(f"{source}: " if source else "")
    return problem.source == source and f"{problem.key}.".startswith(f"{key}.")


def write_files(wrong: Wrong, folder: Path) -> None:
    write_recipe(folder, wrong.recipe)
    for name, content in wrong.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.what)
def test_it_is_refused_before_any_work(wrong, folder, capfd):
    write_files(wrong, folder)
    before = everything_in(folder)
    problems = refused(*wrong.command.split(), *wrong.arguments.split())
    expected = [wrong.problems] if isinstance(wrong.problems, str) else wrong.problems
    assert len(problems) == len(expected), "\n".join(map(str, problems))
    for problem, one in zip(problems, expected, strict=True):
        assert is_about(problem, one), f"{problem.source}: {problem.key}: {problem}"
    printed = capfd.readouterr().err
    assert printed == "".join(f"{problem}\n" for problem in problems)
    assert not wrong.message or printed == f"{wrong.message}\n"
    assert everything_in(folder) == before


@pytest.mark.parametrize(
    "what", ["corrupt GGUF", pytest.param("a model that cannot be built, and the rest", marks=pytest.mark.long)]
)
def test_a_real_process_says_the_same(what, folder, capfd):
    wrong = next(wrong for wrong in WRONG if wrong.what == what)
    write_files(wrong, folder)
    command = [*wrong.command.split(), *wrong.arguments.split()]
    done = run_process(folder, *command)
    assert (done.returncode, done.stdout) == (2, "")
    assert not (folder / "run").exists()
    refused(*command)
    assert done.stderr == capfd.readouterr().err


def test_accelerator_that_is_none(folder):
    (problem,) = refused("fit", "--config", "recipe.yaml", "--trainer.accelerator", "quantum")
    assert (problem.source, problem.key, problem.value) == ("command line", "trainer.accelerator", "quantum")
    assert not (folder / "run").exists()


def test_environment_variable_with_a_wrong_value(folder, monkeypatch):
    monkeypatch.setenv("PQQP_FIT__TRAINER__MAX_EPOCHS", "many")
    (problem,) = refused("fit", "--config", "recipe.yaml")
    where = "PQQP_FIT__TRAINER__MAX_EPOCHS"
    assert (problem.source, problem.key, problem.value) == (where, "trainer.max_epochs", "many")
    assert str(problem) == f"{where}: trainer: max_epochs='many' should be a whole number or null."


def test_unquoted_pattern_is_understood(folder):
    write_recipe(folder, {"sparsity: 0.5": "pattern: 2:4"})  # which YAML 1.1 reads as 124
    assert run("fit", "--config", "recipe.yaml") == 0
    report = (folder / "run" / "report.json").read_text()
    assert '"pruned": 0.5' in report


def test_folder_without_permission(folder, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and (mode, path) != (os.W_OK, folder))
    (problem,) = refused("fit", "--config", "recipe.yaml")
    assert is_about(problem, f"recipe.yaml: run_dir='run' ~ {folder} is not writable. Choose another --run_dir.")


# What is found while a run goes on: it ends with the words, and what was finished stays.


def test_nan_activations_end_the_run_with_the_layer_named(folder, capfd):
    write_recipe(folder, {"CausalLM": "odd_models.NaNActivations", "RTN": "GPTQ"})
    (problem,) = refused("fit", "--config", "recipe.yaml")
    assert is_about(problem, f"recipe.yaml: stages.quantize ~ 1 layer ({DECODER}.1.mlp.down_proj) cannot be calibrated")
    assert '"status": "failed"' in (folder / "run" / "report.json").read_text()
    assert len((folder / "run" / "records.jsonl").read_text().splitlines()) == 2
    assert run("fit", "--config", "recipe.yaml", "--ckpt_path", "last") == 2
    assert run("report", "run") == 0
    assert "prune (Magnitude)" in capfd.readouterr().out


def test_disk_full_loses_nothing_and_the_run_goes_on_once_there_is_room(folder):
    write_recipe(folder, {"Magnitude": "SparseGPT"})
    assert run("fit", "--config", "recipe.yaml", "--run_dir", "whole") == 0
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, {resource.RLIM_INFINITY}))"
    (folder / "sitecustomize.py").write_text(limit)  # the disk of this process: no file above 250 kB
    done = run_process(folder, "fit", "--config", "recipe.yaml", PYTHONPATH=str(folder))
    (folder / "sitecustomize.py").unlink()
    assert done.returncode == 2
    assert done.stderr.startswith("recipe.yaml: run/stages/1-prune: cannot be written: ")
    assert "--ckpt_path last" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in (folder / "run" / "stages").iterdir()] == []
    assert len((folder / "run" / "records.jsonl").read_text().splitlines()) == 1
    assert run("fit", "--config", "recipe.yaml", "--ckpt_path", "last") == 0
    assert (folder / "run/model" / WEIGHTS).read_bytes() == (folder / "whole/model" / WEIGHTS).read_bytes()


def test_disk_full_in_the_second_stage_keeps_the_first(folder, monkeypatch):
    import pqqp_lightning.checkpoint.save as checkpoint

    save, calls = checkpoint.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    (problem,) = refused("fit", "--config", "recipe.yaml")
    assert str(problem).startswith("recipe.yaml: run/stages/2-quantize: cannot be written: No space left on device.")
    assert (folder / "run/stages/1-prune" / MANIFEST).is_file()
    assert run("fit", "--config", "recipe.yaml", "--ckpt_path", "last") == 0


@pytest.mark.long  # the test above fills the disk while a stage is saved
def test_disk_full_while_lightning_writes_is_worded_too(folder, capfd):
    arguments = ["--data.train", "train.npy", "--stages.prune.epochs", "1"]
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, {resource.RLIM_INFINITY}))"
    (folder / "sitecustomize.py").write_text(limit)  # room for the stage's checkpoint, not for the training state
    done = run_process(folder, "fit", "--config", "recipe.yaml", *arguments, PYTHONPATH=str(folder))
    assert done.returncode == 2
    assert done.stderr.startswith("recipe.yaml: a file of the run: cannot be written: File too large.")
    assert done.stderr.count("\n") == 1
    assert run("fit", "--config", "recipe.yaml", *arguments, "--ckpt_path", "last") == 0


def test_a_bug_shows_its_traceback(folder):
    write_recipe(folder, {"CausalLM": "odd_models.Buggy"})
    with pytest.raises(KeyError, match="a bug of ours"):
        run("fit", "--config", "recipe.yaml")
    done = run_command(folder, "fit", "--config", "recipe.yaml", "--run_dir", "other")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "KeyError: 'a bug of ours'" in done.stderr


# A finished run that was damaged, or is of another recipe.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        prepare(folder, monkeypatch)
        assert run("fit", "--config", "recipe.yaml") == 0
    return folder / "run"


@pytest.fixture
def damaged(finished, folder):
    shutil.copytree(finished, folder / "run")
    return folder / "run"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def exchange(path: Path) -> None:
    manifest = gzip.decompress(path.read_bytes())
    assert b'"bits": 4' in manifest
    path.write_bytes(gzip.compress(manifest.replace(b'"bits": 4', b'"bits": 5', 1)))


SIZE = "has HALF bytes instead of WHOLE: truncated or altered. Run the recipe again."


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (f"model/{WEIGHTS}", cut, f"run/model/{WEIGHTS}: {SIZE}"),
        (f"model/{WEIGHTS}", flip, f"run/model/{WEIGHTS}: its checksum differs: altered. Run the recipe again."),
        (
            f"model/{WEIGHTS}",
            Path.unlink,
            f"run/model/{WEIGHTS}: {SIZE.replace('HALF', '0')}",
        ),
        (
            f"model/{MANIFEST}",
            cut,
            f"run/model/{MANIFEST}: is truncated or altered: not a manifest. Run the recipe again.",
        ),
        (
            f"model/{MANIFEST}",
            exchange,
            f"run/model/{MANIFEST}: is truncated or altered: its checksum differs. Run the recipe again.",
        ),
        (
            f"model/{MANIFEST}",
            Path.unlink,
            f"run/model: has no checkpoint ({MANIFEST} is missing). Name a run folder or its model/.",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("command", ["test", "validate"])
def test_damaged_checkpoint_is_refused(command, file, damage, message, damaged, capfd):
    whole = (damaged / file).stat().st_size
    damage(damaged / file)
    assert run(command, "--run_dir", "run") == 2
    message = message.replace("HALF", str(whole // 2)).replace("WHOLE", str(whole))
    assert capfd.readouterr().err == f"run/recipe.yaml: {message}\n"


@pytest.mark.parametrize("file", ["run.json", "records.jsonl"])
def test_damaged_records_are_refused(file, damaged, capfd):
    content = (damaged / file).read_text()
    (damaged / file).write_text(content[:50] + "\n" + content[60:])
    before = everything_in(damaged)
    assert run("fit", "--config", "recipe.yaml", "--ckpt_path", "last") == 2
    words = capfd.readouterr().err
    assert words.startswith(f"recipe.yaml: run/{file}: is truncated or altered (")
    assert words.endswith("). Run the recipe again.\n")
    assert everything_in(damaged) == before


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_damaged_report_is_refused(content, damaged, capfd):
    (damaged / "report.json").write_text(content)
    (damaged / "report.html").unlink()
    assert run("report", "run") == 2
    words = capfd.readouterr().err
    assert words.startswith("run/report.json: is truncated or altered (")
    assert words.count("\n") == 1
    assert not (damaged / "report.html").exists()


def test_a_page_that_cannot_be_written_costs_only_the_page(damaged, capfd):
    (damaged / "report.html").unlink()
    (damaged / "report.html").mkdir()
    assert run("report", "run") == 2
    printed, words = capfd.readouterr()
    assert "quantize (RTN)" in printed
    assert words == (
        "run/report.html: the page cannot be written: Is a directory. Make the folder writable, or run the "
        "command on a copy of it.\n"
    )


def test_checkpoint_of_another_architecture(damaged):
    (problem,) = refused("test", "--run_dir", "run", "--model.model.vocab_size", "400")
    assert "embed_tokens.weight has shape [300, 64] instead of [400, 64]" in str(problem)


@pytest.mark.parametrize(
    ("command", "arguments", "difference"),
    [
        ("fit", "--seed_everything 3", "seed is 0 there and 3 here"),
        ("fit", "--stages.quantize.bits 3", "stages.quantize.init_args.bits is 4 there and 3 here"),
        (
            "fit",
            "--stage_order [quantize,prune]",
            "stages are ['prune', 'quantize'] there and ['quantize', 'prune'] here",
        ),
        ("fit", "--model.dtype bfloat16", "model.init_args.dtype is 'float32' there and 'bfloat16' here"),
        ("order", "", "command is 'fit' there and 'order' here"),
    ],
)
def test_last_of_another_recipe_is_refused_and_nothing_is_lost(command, arguments, difference, damaged):
    before = everything_in(damaged)
    (problem,) = refused(command, "--config", "recipe.yaml", "--ckpt_path", "last", *arguments.split())
    assert difference in str(problem)
    assert everything_in(damaged) == before


def test_damaged_lightning_checkpoint(folder):
    (folder / "some.ckpt").write_bytes(b"PK nonsense")
    (problem,) = refused("test", "--config", "recipe.yaml", "--ckpt_path", "some.ckpt")
    assert (problem.source, problem.key, problem.value) == ("command line", "ckpt_path", "some.ckpt")


# The same from Python.


def model() -> CausalLM:
    settings = RECIPE[RECIPE.index("{model_type") : RECIPE.index("data:")]
    pairs = (pair.partition(":") for pair in settings.strip("{}\n ").replace("\n", "").split(","))
    plain = {key.strip(): value.strip() for key, _, value in pairs}
    return CausalLM({key: int(value) if value.isdigit() else value for key, value in plain.items()})


def test_python_raises_every_problem_at_once(folder):
    trainer = Trainer(callbacks=[Magnitude(1.5), RTN(9)], accelerator="cpu", default_root_dir="run")
    with pytest.raises(RecipeError, match=re.escape("sparsity=1.5")) as caught:
        trainer.fit(model(), datamodule=TokenData("nothing.npy", "evaluation.npy"))
    assert [str(problem) for problem in caught.value.problems] == [
        f"data: calibration='nothing.npy' does not exist (looked at {folder}/nothing.npy).",
        "stages.magnitude (Magnitude): sparsity=1.5 is not in (0, 1). 0.5 removes half of the weights.",
        "stages.rtn (RTN): bits=9 is not between 2 and 8.",
    ]
    assert not (folder / "run").exists()


def test_python_two_stages_of_one_name(folder):
    first, second = Magnitude(0.3), RTN(4)
    trainer = Trainer(callbacks=[first, second], accelerator="cpu", default_root_dir="run")
    first.name = second.name = "both"
    with pytest.raises(RecipeError, match=re.escape("stages: two stages are named 'both'. Give each its own name.")):
        trainer.fit(model(), datamodule=TokenData("calibration.npy", "evaluation.npy"))


def test_python_stages_of_one_class_get_names_of_their_own(folder):
    trainer = Trainer(callbacks=[Magnitude(0.3), RTN(4), Magnitude(0.5)], accelerator="cpu", default_root_dir="run")
    assert [stage.name for stage in trainer.stages] == ["magnitude", "rtn", "magnitude-2"]


def test_python_without_evaluation_data(folder):
    trainer = Trainer(callbacks=[Magnitude(0.3)], accelerator="cpu", default_root_dir="run")
    loader = torch.utils.data.DataLoader(torch.zeros(4, 8))
    words = "data: there is no evaluation data. Add data: {class_path: TextData}, a datamodule or val_dataloaders."
    with pytest.raises(RecipeError, match=re.escape(words)):
        trainer.fit(model(), loader)
