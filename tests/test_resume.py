"""A run that is killed with SIGKILL goes on with ``--ckpt_path last`` and ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny import LLAMA, write_tokens

import pqqp_lightning

KILLER = """
import os, pathlib, signal, sys
from importlib import import_module

target, count, when, *argv = sys.argv[1:]
import pqqp_lightning.cli  # so that what is patched below is what the run uses
module, _, path = target.partition(":")
*owners, name = path.split(".")
owner = import_module(module)
for part in owners:
    owner = getattr(owner, part)
original, calls = getattr(owner, name), 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def killing(*args, **kwargs):
    global calls
    calls += 1
    if calls < int(count):
        return original(*args, **kwargs)
    if when == "halfway":  # a removal that got as far as one file
        next(pathlib.Path(args[0]).glob("*.safetensors")).unlink()
    elif when == "after":
        original(*args, **kwargs)
    die()

setattr(owner, name, killing)
sys.argv = ["pqqp-lightning", *argv]
from pqqp_lightning.__main__ import main
main(argv)
"""
KILLS = {
    "after the dense baseline": ("pqqp_lightning.run:append_record", 1, "after"),
    "in the calibration of the first stage": ("pqqp_lightning.calibration.statistics:Hessian.accumulate", 11, "after"),
    "while the pruned model is saved": ("pqqp_lightning.checkpoint:sha256_of", 1, "before"),
    "in the middle of the first epoch": ("pqqp_lightning.hold:SeedSteps.on_train_batch_start", 3, "before"),
    "while the first epoch's state is saved": ("pqqp_lightning.trainer:Trainer.save_checkpoint", 1, "after"),
    "in the middle of the second epoch": ("pqqp_lightning.hold:SeedSteps.on_train_batch_start", 7, "before"),
    "after the last epoch's state was saved": ("pqqp_lightning.hold:HoldMasks.teardown", 1, "before"),
    "while the finetuned model replaces the pruned one": ("pqqp_lightning.storage:shutil.rmtree", 3, "halfway"),
    "before the first stage is on record": ("pqqp_lightning.run:append_record", 2, "before"),
    "between the stages": ("pqqp_lightning.run:append_record", 2, "after"),
    "in the calibration of the second stage": ("pqqp_lightning.calibration.statistics:Hessian.accumulate", 20, "after"),
    "while the quantized model is saved": ("pqqp_lightning.checkpoint:save_file", 3, "after"),
    "before the final report": ("pqqp_lightning.run:write_report", 4, "before"),
}


def write_recipe(folder: Path, **changes) -> Path:
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
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes, sort_keys=False))
    return path


def run_command(folder: Path, *arguments: str, killed: tuple[str, int, str] | None = None) -> subprocess.CompletedProcess:
    """Run the command line in ``folder``; with ``killed``, until SIGKILL at that call of that function."""
    launcher = ["-m", "pqqp_lightning"]
    if killed:
        (folder / "killer.py").write_text(KILLER)
        launcher = ["killer.py", *map(str, killed)]
    command = [sys.executable, *launcher, *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(pqqp_lightning.__file__).parents[1])}
    environment.pop("PL_GLOBAL_SEED", None)
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=120)


def finish(folder: Path, *arguments: str) -> str:
    """Run the command line to its end, and return what it printed."""
    result = run_command(folder, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def plain(data):
    """Records without what no two runs have in common."""
    if isinstance(data, dict):
        return {k: plain(v) for k, v in data.items() if k not in ("elapsed_s", "peak_memory_bytes", "file_bytes")}
    return [plain(v) for v in data] if isinstance(data, list) else data


def result_of(run: Path) -> dict:
    """What must not depend on kills: weights, records, report."""
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    return {"records": plain(records), "report": plain(json.loads((run / "report.json").read_text()))}


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
    dense, prune, quantize = result_of(undisturbed / "undisturbed")["records"]
    assert prune["metrics_before_finetuning"]["perplexity"] != prune["metrics"]["perplexity"]
    assert quantize["sparsity"] >= prune["sparsity"] == 0.5
    assert quantize["bits_per_weight"] < prune["bits_per_weight"] < dense["bits_per_weight"]


@pytest.mark.parametrize("when", KILLS)
def test_a_killed_run_ends_as_an_undisturbed_one(undisturbed, when):
    arguments = ("fit", "--config", "recipe.yaml", "--run_dir", f"killed {when}")
    killed = run_command(undisturbed, *arguments, killed=KILLS[when])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finish(undisturbed, *arguments, "--ckpt_path", "last")
    run = undisturbed / f"killed {when}"
    assert result_of(run) == result_of(undisturbed / "undisturbed")
    assert_same_weights(run / "model", undisturbed / "undisturbed" / "model")
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in (undisturbed / "undisturbed").iterdir())
