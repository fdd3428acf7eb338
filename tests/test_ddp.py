"""Two gloo processes on the CPU, started by the real command line, share the calibration and end with one model."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from forked import run_forked
from safetensors.torch import load_file
from tiny import LLAMA, write_tokens

import pqqp_lightning
from pqqp_lightning.__main__ import main
from pqqp_lightning.checkpoint.load import load_weights

WATCHER = '''
"""A user's own file beside the recipe: a callback that dumps what each rank holds, and a stage that does harm."""

import hashlib
import json
import os
import signal
from pathlib import Path

import torch
from lightning.pytorch import Callback

from pqqp_lightning import Stage
from pqqp_lightning.callbacks import GPTQ
from pqqp_lightning.checkpoint import finished_blocks

finished_blocks.PAUSE_S, finished_blocks.SHARE = 0.0, float("inf")  # tiny blocks are kept, too


class Dump(Callback):
    """Appends a digest of this rank's weights, and its world, to a file of its own after each evaluation."""

    def on_validation_end(self, trainer, pl_module):
        weights = b"".join(p.detach().numpy().tobytes() for p in pl_module.parameters())
        line = {"digest": hashlib.sha256(weights).hexdigest(), "world": trainer.world_size, "rank": trainer.global_rank}
        with Path(f"digests-{Path(trainer.default_root_dir).name}-{trainer.global_rank}.jsonl").open("a") as file:
            print(json.dumps(line), file=file)


class Differ(Stage):
    """Ranks write different weights."""

    source = "none"
    compresses = True

    def compress(self, model, context):
        with torch.no_grad():
            next(model.parameters()).add_(int(os.environ.get("LOCAL_RANK", "0")))
        return {}


class Die(Stage):
    """Kills the first process, once."""

    source = "none"
    compresses = True

    def compress(self, model, context):
        die_once("died")
        return {}


class Mortal(GPTQ):
    """Kills the first process at the second block, once; every process says which layers it quantizes."""

    def compress_layer(self, inputs):
        if ".layers.1." in inputs.name:
            die_once("died-in-block")
        with Path(f"quantized-{os.environ.get('LOCAL_RANK', '0')}.txt").open("a") as file:
            print(inputs.name, file=file)
        return super().compress_layer(inputs)


def die_once(name):
    if os.environ.get("LOCAL_RANK", "0") == "0" and not Path(name).exists():
        Path(name).touch()
        os.kill(os.getpid(), signal.SIGKILL)
'''
PRUNE = {"class_path": "SparseGPT", "init_args": {"sparsity": 0.5}}
QUANTIZE = {"class_path": "GPTQ", "init_args": {"bits": 4, "group_size": 16}}
POLISH = {"class_path": "Polish", "init_args": {"inputs": "dense"}}
MATCH = {"class_path": "BlockMatching"}
FINETUNE = {"class_path": "Finetune", "init_args": {"epochs": 2, "learning_rate": 0.01}}


def write_recipe(folder: Path, name: str, stages: dict) -> None:
    recipe = {
        "seed_everything": 3,
        "model": {"class_path": "CausalLM", "init_args": {"model": LLAMA}},
        "data": {"class_path": "TokenData", "init_args": write_tokens(folder, calibration=9, evaluation=5, train=9)},
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "callbacks": [{"class_path": "watcher.Dump"}],
        },
        "stages": stages,
    }
    (folder / name).write_text(yaml.safe_dump(recipe, sort_keys=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "watcher.py").write_text(WATCHER)
    write_recipe(folder, "compress.yaml", {"prune": PRUNE, "quantize": QUANTIZE, "polish": POLISH})
    write_recipe(folder, "match.yaml", {"prune": PRUNE, "quantize": QUANTIZE, "match": MATCH})
    write_recipe(folder, "train.yaml", {"prune": PRUNE, "finetune": FINETUNE, "quantize": QUANTIZE})
    return folder


def run(folder: Path, *arguments: str, script: bool = False) -> subprocess.CompletedProcess:
    """The command line: ``python -m pqqp_lightning``, or with ``script`` the installed console script."""
    if not script:
        return run_forked(["-m", "pqqp_lightning", *arguments], folder, timeout=150)
    command = [str(Path(sys.executable).with_name("pqqp-lightning")), *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(pqqp_lightning.__file__).parents[1])}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=150)


def on_two(recipe: str, name: str) -> list[str]:
    return ["fit", "--config", recipe, "--run_dir", name, "--trainer.strategy", "ddp", "--trainer.devices", "2"]


@pytest.fixture
def here(folder, monkeypatch) -> Path:
    """For what needs one process only: the command line in this one."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.delitem(sys.modules, "watcher", raising=False)
    return folder


def finish(folder: Path, *arguments: str, script: bool = False) -> None:
    result = run(folder, *arguments, script=script)
    assert result.returncode == 0, result.stderr


def digests(folder: Path, name: str) -> list[list[dict]]:
    files = [folder / f"digests-{name}-{rank}.jsonl" for rank in (0, 1)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files if file.exists()]


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one(folder) -> Path:
    """The run folder of one process."""
    finish(folder, "fit", "--config", "compress.yaml", "--run_dir", "one", "--trainer.devices", "1")
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder) -> Path:
    """The run folder of two processes that nothing disturbed."""
    finish(folder, *on_two("compress.yaml", "two"), script=True)
    return folder / "two"


def test_two_processes_compress_as_one_does(folder, one, two):
    assert [[line["world"] for line in rank] for rank in digests(folder, "two")] == [[2] * 4] * 2
    a, b = records(one), records(two)
    one, two = load_weights(one), load_weights(two)
    assert list(one) == list(two)
    for name in one:
        if ".layers." in name and name.endswith("proj.weight"):
            assert float(((one[name] == 0) == (two[name] == 0)).float().mean()) > 0.99, name
            assert float((one[name] - two[name]).norm() / one[name].norm()) < 0.05, name
        else:
            assert torch.equal(one[name], two[name])
    assert [r["name"] for r in b] == ["dense", "prune", "quantize", "polish"]
    dense = [run[0]["metrics"]["perplexity"] for run in (a, b)]
    assert dense[0] == pytest.approx(dense[1], rel=1e-6)  # of five windows none counts twice
    for ours, theirs in zip(a, b, strict=True):
        assert ours["metrics"]["perplexity"] == pytest.approx(theirs["metrics"]["perplexity"], rel=1e-3)
        assert ours["size_bytes"] == theirs["size_bytes"]


def test_half_of_the_calibration_set_gives_other_weights(folder, here, one):
    """What the test above compares is no accident."""
    arguments = ["fit", "--config", "compress.yaml", "--run_dir", "half", "--trainer.devices", "1"]
    main([*arguments, "--data.calibration_samples", "4"])
    whole, half = load_weights(one), load_weights(folder / "half")
    name = "model.model.layers.0.mlp.down_proj.weight"
    assert float((whole[name] - half[name]).norm() / whole[name].norm()) > 0.05


@pytest.fixture(scope="module")
def matched(folder) -> Path:
    """The run folder of two processes that trained blocks and that nothing disturbed."""
    finish(folder, *on_two("match.yaml", "matched"))
    return folder / "matched"


def test_processes_train_a_block_together(folder, matched):
    first, second = ([line["digest"] for line in rank] for rank in digests(folder, "matched"))
    assert first == second
    assert first[2] != first[3]
    (note,) = [note for note in records(matched)[3]["notes"] if "blocks' outputs" in note]
    after, before = (float(number) for number in re.findall(r"[0-9.]+(?:e-[0-9]+)?", note)[:2])
    assert after < before


def test_processes_end_with_equal_weights_also_after_finetuning(folder):
    finish(folder, *on_two("train.yaml", "trained"))
    first, second = ([line["digest"] for line in rank] for rank in digests(folder, "trained"))
    assert first == second
    # dense, pruned, the same before finetuning, after each epoch, the same when it is measured, quantized
    assert [first.index(digest) for digest in first] == [0, 1, 1, 3, 4, 4, 6]
    found = records(folder / "trained")
    assert [r["name"] for r in found] == ["dense", "prune", "finetune", "quantize"]
    assert found[2]["metrics"] != found[2]["metrics_before_finetuning"]
    assert found[2]["logged_steps"] == 10  # 9 samples over 2 processes: 5 steps an epoch
    assert found[3]["sparsity"] >= 0.5
    assert json.loads((folder / "trained" / "report.json").read_text())["status"] == "finished"
    assert sorted(p.name for p in (folder / "trained").iterdir()) == [
        "logs",
        "model",
        "recipe.yaml",
        "records.jsonl",
        "report.html",
        "report.json",
        "report.md",
        "run.json",
        "samples.safetensors",
    ]
    assert not (folder / "trained.1").exists()
    assert load_file(folder / "trained" / "model" / "model.safetensors")


def test_batch_norm_statistics_are_those_of_the_samples_of_both_processes(folder, here):
    network = {"model": "resnet18", "pretrained": False, "num_classes": 10, "model_args": {"channels": [8, 8, 8, 8]}}
    recipe = {
        "seed_everything": 3,
        "model": {"class_path": "ImageClassifier", "init_args": network},
        # 5 samples for one process and 4 for the other, in batches of 2
        "data": {
            "class_path": "ImageData",
            "init_args": {"calibration_samples": 9, "evaluation_samples": 4, "batch_size": 2},
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "stages": {"prune": {"class_path": "Magnitude", "init_args": {"sparsity": 0.5}}},
    }
    (folder / "images.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    finish(folder, *on_two("images.yaml", "images-two"))
    main(["fit", "--config", "images.yaml", "--run_dir", "images-one", "--trainer.devices", "1"])
    two, one = load_weights(folder / "images-two"), load_weights(folder / "images-one")
    assert any("BatchNorm statistics of 21 layers" in note for note in records(folder / "images-two")[1]["notes"])
    for name in one:
        assert torch.allclose(two[name], one[name], rtol=1e-4, atol=1e-6), name


def test_processes_that_end_a_stage_with_different_weights_are_stopped(folder):
    write_recipe(folder, "differ.yaml", {"differ": {"class_path": "watcher.Differ"}})
    result = run(folder, *on_two("differ.yaml", "differ"))
    assert result.returncode != 0
    assert "the ranks' weights differ after the stage" in result.stderr
    assert [r["name"] for r in records(folder / "differ")] == ["dense"]


def test_a_killed_distributed_run_ends_as_an_undisturbed_one(folder, matched):
    die = {"class_path": "watcher.Die"}
    mortal = QUANTIZE | {"class_path": "watcher.Mortal"}
    write_recipe(folder, "die.yaml", {"prune": PRUNE, "die": die, "quantize": mortal, "match": MATCH})
    killed = run(folder, *on_two("die.yaml", "killed"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [r["name"] for r in records(folder / "killed")] == ["dense", "prune"]
    killed = run(folder, *on_two("die.yaml", "killed"), "--ckpt_path", "last")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finish(folder, *on_two("die.yaml", "killed"), "--ckpt_path", "last")
    for rank in (0, 1):
        quantized = (folder / f"quantized-{rank}.txt").read_text().split()
        first_block = [name for name in quantized if ".layers.0." in name]
        assert len(first_block) == len(set(first_block)) == 7
    ours, theirs = load_weights(folder / "killed"), load_weights(matched)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [[line["world"] for line in rank] for rank in digests(folder, "killed")] == [[2] * 5] * 2


def test_a_strategy_whose_processes_do_not_last_is_refused(folder, here, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*on_two("compress.yaml", "spawned"), "--trainer.strategy", "ddp_spawn"])
    assert "trainer: strategy would start new processes for every evaluation" in capsys.readouterr().err
    assert not (folder / "spawned").exists()


def test_a_search_on_two_processes_has_intervals_over_the_samples_of_both(folder, here):
    write_recipe(folder, "pair.yaml", {"prune": PRUNE, "quantize": QUANTIZE})
    finish(folder, "order", *on_two("pair.yaml", "search")[1:])
    report = json.loads((folder / "search/order.json").read_text())
    main(["order", "--config", "pair.yaml", "--run_dir", "alone", "--trainer.devices", "1", "--store", "other"])
    alone = json.loads((folder / "alone/order.json").read_text())
    orders = {tuple(entry["order"]): entry for entry in alone["orders"]}
    for entry in report["orders"]:
        low, high = entry["interval"]
        value = entry["metrics"]["perplexity"]
        assert low < value < high
        own = orders[tuple(entry["order"])]
        assert value == pytest.approx(own["metrics"]["perplexity"], rel=1e-3)
        assert high - low == pytest.approx(own["interval"][1] - own["interval"][0], rel=0.3)
    assert report["lead"]["low"] is not None
    states = [load_file(file) for file in (folder / "store").glob("*/samples.safetensors")]
    assert {len(samples["perplexity"]) for samples in states} == {5}  # none counts twice
