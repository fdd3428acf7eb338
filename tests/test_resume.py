"""A run that is killed with SIGKILL goes on with ``--ckpt_path last`` and ends as if nothing had happened."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from forked import run_forked
from safetensors.torch import load_file
from tiny import LLAMA, write_tokens

from pqqp_lightning.__main__ import main

KILLER = """
import os, pathlib, signal, sys
from importlib import import_module

target, count, when, *argv = sys.argv[1:]
import pqqp_lightning.cli.commands  # so that what is patched below is what the run uses
module, _, path = target.partition(":")
*owners, name = path.split(".")
owner = import_module(module)
for part in owners:
    owner = getattr(owner, part)
original, calls = getattr(owner, name), 0

def killing(*args, **kwargs):
    global calls
    weights = list(pathlib.Path(args[0]).glob("*.safetensors")) if when == "halfway" else []
    calls += when != "halfway" or bool(weights)
    if calls < int(count):
        return original(*args, **kwargs)
    for file in weights:  # a folder's removal that got as far as this file
        file.unlink()
    if when == "after":
        original(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, name, killing)
sys.argv = ["pqqp-lightning", *argv]
from pqqp_lightning.__main__ import main
main(argv)
"""
ROWS = "pqqp_lightning.calibration.statistics:Hessian.accumulate"
STEP = "pqqp_lightning.runs.training_callbacks:SeedSteps.on_train_batch_start"
KILLS = {  # one after another: each run goes on where the one before was killed at that call of that function
    "the first stage": {
        "after the dense baseline": ("pqqp_lightning.runs.run:append_record", 1, "after"),
        "in the calibration": (ROWS, 11, "after"),
        "while the pruned model is saved": ("pqqp_lightning.checkpoint.save:sha256_of", 1, "before"),
        "in the first epoch": (STEP, 3, "before"),
    },
    "finetuning": {
        "while the first epoch's state is saved": ("pqqp_lightning.runs.trainer:Trainer.save_checkpoint", 1, "after"),
        "in the second epoch": (STEP, 7, "before"),
        "when training is done": ("pqqp_lightning.runs.training_callbacks:HoldMasks.teardown", 1, "before"),
        "while the finetuned model replaces the pruned one": (
            "pqqp_lightning.storage.files:shutil.rmtree",
            1,
            "halfway",
        ),
        "before the stage is on record": ("pqqp_lightning.runs.run:append_record", 1, "before"),
    },
    "the second stage": {
        "between the stages": ("pqqp_lightning.runs.run:append_record", 2, "after"),
        "in the calibration": (ROWS, 5, "after"),
        "while the quantized model is saved": ("pqqp_lightning.checkpoint.save:save_file", 1, "after"),
        "after the evaluation": ("pqqp_lightning.runs.stage_runner:StageRunner.evaluate", 1, "after"),
        "before the stage is on record": ("pqqp_lightning.runs.run:append_record", 1, "before"),
        "before the final report": ("pqqp_lightning.runs.run:write_report", 2, "before"),
    },
}

ORDER = {
    "prune": {"class_path": "SparseGPT", "init_args": {"sparsity": 0.5}},
    "quantize": {"class_path": "GPTQ", "init_args": {"bits": 3, "group_size": 16}},
}


def write_recipe(folder: Path, name: str = "recipe.yaml", **changes) -> Path:
    """A recipe with dropout, an optimizer with state and a schedule: everything that a resumed run must get right."""
    step = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    model = {"model": LLAMA | {"attention_dropout": 0.1}, "optimizer": optimizer, "lr_scheduler": step}
    recipe = {
        "seed_everything": 7,
        "model": {"class_path": "CausalLM", "init_args": model},
        "data": {"class_path": "TokenData", "init_args": write_tokens(folder) | {"batch_size": 2}},
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "log_every_n_steps": 1},
        "stages": {
            "prune": {"class_path": "SparseGPT", "init_args": {"sparsity": 0.5, "epochs": 2}},
            "quantize": {"class_path": "GPTQ", "init_args": {"bits": 4, "group_size": 16}},
        },
    }
    path = folder / name
    path.write_text(yaml.safe_dump(recipe | changes, sort_keys=False))
    return path


def run_command(folder: Path, *arguments: str, kill: tuple[str, int, str] | None = None) -> subprocess.CompletedProcess:
    """Run the command line in ``folder``; with ``kill``, until SIGKILL at that call of that function."""
    launcher = ["-m", "pqqp_lightning"]
    if kill:
        (folder / "killer.py").write_text(KILLER)
        launcher = ["killer.py", *map(str, kill)]
    return run_forked([*launcher, *arguments], folder)


def finish(folder: Path, *arguments: str) -> str:
    """Run the command line to its end, and return what it printed."""
    result = run_command(folder, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def killed(folder: Path, *arguments: str, kills: dict[str, tuple[str, int, str]]) -> None:
    """Run the command line, killed at one place after another, and then to its end."""
    for number, (place, kill) in enumerate(kills.items()):
        resume = ("--ckpt_path", "last") if number else ()
        result = run_command(folder, *arguments, *resume, kill=kill)
        assert result.returncode == -signal.SIGKILL, f"not killed {place}: {result.stderr}"
    finish(folder, *arguments, "--ckpt_path", "last")


def plain(data):
    """Records without what no two runs have in common."""
    if isinstance(data, dict):
        return {k: plain(v) for k, v in data.items() if k not in ("elapsed_s", "peak_memory_bytes", "file_bytes")}
    return [plain(v) for v in data] if isinstance(data, list) else data


def read_result(run: Path) -> dict:
    """What must not depend on kills: records, report, and which files there are."""
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    files = sorted(p.name for p in [*run.iterdir(), *(run / "model").iterdir()])
    return {"records": plain(records), "report": plain(json.loads((run / "report.json").read_text())), "files": files}


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert tensor.numpy().tobytes() == theirs[name].numpy().tobytes(), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_recipe(folder)
    finish(folder, "fit", "--config", "recipe.yaml", "--run_dir", "undisturbed")
    return folder


def test_the_undisturbed_run_trains_and_compresses(undisturbed):
    dense, prune, quantize = read_result(undisturbed / "undisturbed")["records"]
    assert prune["metrics_before_finetuning"]["perplexity"] != prune["metrics"]["perplexity"]
    assert quantize["sparsity"] >= prune["sparsity"] == 0.5
    assert quantize["bits_per_weight"] < prune["bits_per_weight"] < dense["bits_per_weight"]


@pytest.mark.parametrize("part", KILLS)
def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(undisturbed, part):
    killed(undisturbed, "fit", "--config", "recipe.yaml", "--run_dir", part, kills=KILLS[part])
    assert read_result(undisturbed / part) == read_result(undisturbed / "undisturbed")
    assert_same_weights(undisturbed / part / "model", undisturbed / "undisturbed" / "model")


def test_resuming_a_finished_run_keeps_its_result(undisturbed):
    run = undisturbed / "finished"
    shutil.copytree(undisturbed / "undisturbed", run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and "logs" not in p.parts}
    before = {p: content for p, content in before.items() if p.suffix not in (".html", ".md")}  # name the folder
    shown = finish(undisturbed, "fit", "--config", "recipe.yaml", "--run_dir", "finished", "--ckpt_path", "last")
    assert {p: p.read_bytes() for p in before} == before
    assert "quantize (GPTQ)" in shown


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--stages.prune.sparsity", "0.6"), "stages.prune.init_args.sparsity is 0.5 there and 0.6 here"),
        (
            ("--stage_order", "[quantize,prune]", "--stages.prune.epochs", "0"),
            "stages are ['prune', 'quantize'] there and ['quantize', 'prune'] here",
        ),
        (("--seed_everything", "8"), "seed is 7 there and 8 here"),
        (("--model.model.attention_dropout", "0.2"), "attention_dropout is 0.1 there and 0.2 here"),
        (("--trainer.precision", "bf16-mixed"), "trainer.precision is None there and 'bf16-mixed' here"),
    ],
)
def test_another_recipe_does_not_go_on_with_the_run(undisturbed, option, message, monkeypatch, capsys):
    monkeypatch.chdir(undisturbed)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", "recipe.yaml", "--run_dir", "undisturbed", "--ckpt_path", "last", *option])
    assert message in capsys.readouterr().err


def test_a_killed_search_for_the_order_ends_as_an_undisturbed_one(undisturbed):
    write_recipe(undisturbed, "order.yaml", stages=ORDER)
    finish(undisturbed, "order", "--config", "order.yaml", "--run_dir", "order")
    kills = {
        "before the second order": ("pqqp_lightning.storage.result_store:ResultStore.write", 3, "after"),
        "in the second order": (ROWS, 3, "after"),
        "before the report": ("pqqp_lightning.experiments.order:write_json", 1, "before"),
    }
    words = ["--config", "order.yaml", "--run_dir", "killed order", "--store", "killed store"]
    killed(undisturbed, "order", *words, kills=kills)
    ours, theirs = (plain(json.loads((undisturbed / n / "order.json").read_text())) for n in ("killed order", "order"))
    assert ours.pop("applications") < theirs.pop("applications") == 4  # by the process that finished
    assert ours == theirs
    assert sorted(order["order"] for order in ours["orders"]) == [["prune", "quantize"], ["quantize", "prune"]]
    assert_same_weights(undisturbed / "killed order" / "model", undisturbed / "order" / "model")
