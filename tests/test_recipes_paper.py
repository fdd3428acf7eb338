"""The paper's experiments: every recipe of recipes/paper and recipes/order on small models with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_recipes import RECIPES, ROOT, SMALL_LLAMA, commands_of, needs_smollm2

from pqqp_lightning.__main__ import main

SMALL = ["--model.model", json.dumps(SMALL_LLAMA | {"num_hidden_layers": 4}), "--data.tokenizer", "smollm2-135m"]
SMALL += ["--trainer.limit_train_batches", "2"]
TEXT = ["--data.source", "python-docs", "--data.config_name", "null", "--data.calibration_samples", "2"]
TEXT += ["--data.evaluation_samples", "4", "--data.sequence_length", "64"]
IMAGES = ["--data.source", "digits", "--data.calibration_samples", "16", "--data.evaluation_samples", "32"]
IMAGES += ["--data.train_samples", "128", "--data.batch_size", "32", "--data.train_transforms", "[]"]
LONG = {
    "digits-deit": "all 24 orders of four stages: order/digits-resnet has the six of three, and smollm2 removes blocks",
    "digits-resnet-polish": "order/digits-deit-polish is the same sweep of a smaller network",
    "polish-both-orders": "order/digits-deit-polish is the same sweep of a smaller network",
    "multi-stage": "order/smollm2 tries the orders of as many stages",
}
"""Experiments that a quicker one stands for, and which."""
EXPERIMENTS = [p for p in RECIPES if p.parent.name in ("paper", "order")]
LANGUAGE = [p for p in EXPERIMENTS if "smollm2" in p.read_text()]
VISION = [p for p in EXPERIMENTS if p not in LANGUAGE and not p.stem.endswith("-train")]
OUTPUT = {"order": "order.json", "sweep": "sweep.json", "analyze": "analysis.json"}


def experiment(path: Path) -> tuple[str, list[str]]:
    """The command that the recipe is for."""
    command = next(c for c in commands_of(path) if c[0] in OUTPUT and c[2] == str(path.relative_to(ROOT)))
    return command[0], ["--config", str(path), *command[3:]]


def result(path: Path, options: list[str]) -> dict:
    name, arguments = experiment(path)
    main([name, *arguments, "--run_dir", "run", "--trainer.enable_progress_bar", "false", *options])
    assert Path("run/report.html").is_file()
    return json.loads(Path("run", OUTPUT[name]).read_text())


def few(path: Path) -> list[str]:
    """One value less for each argument: the smallest grid that is still one."""
    grids = {"prune-quantize": {"prune": {"sparsity": [0.5, 0.7]}, "quantize": {"bits": [8, 3]}}}
    for alike in ("resnet", "deit", "polish-both-orders", "digits-deit-polish", "digits-resnet-polish"):
        grids[alike] = grids["prune-quantize"]
    grids["block-pruning"] = {"prune": {"amount": [1]}, "quantize": {"bits": [8, 4]}}
    return ["--grid", json.dumps(grids[path.stem])] if path.stem in grids else []


def cases(paths: list[Path]) -> list:
    """The recipes as a test's parameters."""
    found = []
    for path in paths:
        marks = [pytest.mark.long] if path.stem in LONG else []
        found.append(pytest.param(path, id=f"{path.parent.name}/{path.stem}", marks=marks))
    return found


@needs_smollm2
@pytest.mark.parametrize("path", cases(LANGUAGE))
def test_language_model_experiments_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PQQP_DATA", "nowhere")
    report = result(path, [*TEXT, *SMALL, *few(path)])
    assert report["status"] == "finished"
    if path.stem == "block-pruning":
        same = [p for p in report["points"] if len({o["record"]["metrics"]["perplexity"] for o in p["orders"]}) == 1]
        assert same  # wherever both orders remove the same blocks
    if path.stem in ("rotation", "finetuned-int8"):
        assert report["refused"]
    if path.stem == "basis-sharing":
        assert any("lost a constraint" in order["marks"] for order in report["orders"])


@pytest.mark.parametrize("path", cases(VISION))
def test_vision_experiments_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PQQP_DATA", "nowhere")
    network = "resnet" if "resnet" in path.stem else "deit"
    train = {"paper": f"recipes/paper/{network}-train.yaml", "order": f"recipes/digits-{network}-train.yaml"}
    short = ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]
    main(["fit", "--config", str(ROOT / train[path.parent.name]), *IMAGES, *short])
    report = result(path, [*IMAGES, *few(path)])
    assert report["status"] == "finished"
    if path.stem == "digits-resnet":
        assert len(report["orders"]) == 6
        assert report["applications"] == 15
    if path.stem == "digits-deit":
        assert len(report["orders"]) == 24
        assert report["applications"] == 64
