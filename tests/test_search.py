"""``search``: the best pipeline under a size, which is known before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command_line import prepare, run

SPACE = ["--space.prune.sparsity", "[0.3,0.5,0.7]", "--space.quantize.bits", "[3,4,8]"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return prepare(tmp_path, monkeypatch)


def search(folder: Path, *arguments: str) -> dict:
    assert run("search", "--config", "recipe.yaml", "--run_dir", "search", *arguments) == 0
    return json.loads((folder / "search/search.json").read_text())


def test_no_pipeline_over_the_budget_runs_and_the_sizes_are_as_predicted(folder):
    report = search(folder, *SPACE, "--target_rate", "2.2", "--trials", "8")
    limit = report["dense"]["size_bytes"] / 2.2
    assert report["over"] > 0
    assert len(report["trials"]) == 8
    for entry in report["trials"]:
        assert entry["exact"]
        assert entry["record"]["size_bytes"] == entry["expected_bytes"] <= limit
    best = next(e for e in report["trials"] if e["number"] == report["best"])
    assert best["record"]["metrics"]["perplexity"] == min(
        e["record"]["metrics"]["perplexity"] for e in report["trials"]
    )
    assert report["verdict"].startswith("Under ")


def test_the_best_recipe_gives_the_same_numbers(folder):
    report = search(folder, *SPACE, "--target_rate", "2.2", "--trials", "4")
    best = next(e for e in report["trials"] if e["number"] == report["best"])
    assert run("fit", "--config", "search/best.yaml") == 0
    fitted = json.loads((folder / "runs/best/report.json").read_text())["stages"][-1]
    assert [stage for stage in yaml.safe_load((folder / "search/best.yaml").read_text())["stages"]] == best["order"]
    for name in ("metrics", "size_bytes", "bits_per_weight", "sparsity"):
        assert fitted[name] == best["record"][name]
