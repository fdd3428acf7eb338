"""The walk-through of CONTRIBUTING.md works as it stands: its three files, copied into a copy of the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_recipes import LITTLE, SMALL, needs_smollm2

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", re.DOTALL)


def test_the_method_imports_stages_alone():
    method = dict(BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text()))["callbacks/ria.py"]
    assert re.findall(r"^(?:from|import) (\S+)", method, re.MULTILINE) == ["pqqp_lightning.stages"]


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the repository with the three files in it, and nothing else changed."""
    copied = tmp_path_factory.mktemp("repository")
    for name in ("pqqp_lightning", "callbacks", "tests", "recipes", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copied / name, symlinks=True, ignore=ignored)
    blocks = dict(BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text()))
    assert sorted(blocks) == ["callbacks/ria.py", "recipes/pruning/ria.yaml", "tests/test_ria.py"]
    for name, text in blocks.items():
        assert not (copied / name).exists(), f"{name} is a method of the project: walk through another"
        (copied / name).write_text(text)
    return copied


def call(copied, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(copied), "PYTEST_XDIST_WORKER": ""}
    return subprocess.run(
        [sys.executable, *arguments], cwd=copied, capture_output=True, text=True, timeout=500, env=environment
    )


def test_the_method_passes_its_own_test(copied):
    done = call(copied, "-m", "pytest", "-q", "tests/test_ria.py")
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_the_contract_tests_pick_the_method_up(copied):
    chosen = "(RIA and not pair) or RIA-GPTQ-llama or GPTQ-RIA-llama or RIA-SLEB-deit"
    done = call(copied, "-m", "pytest", "-q", "tests/test_stages.py", "-k", chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 11


@needs_smollm2
def test_the_method_s_recipe_runs_and_its_mask_outlives_quantization(copied):
    some = [word for stage in ("prune", "quantize") for word in (f"--stages.{stage}.targets", '["layers.[0-1]"]')]
    done = call(copied, "-m", "pqqp_lightning", "fit", "--config", "recipes/pruning/ria.yaml", *LITTLE, *SMALL, *some)
    assert done.returncode == 0, done.stderr
    stages = json.loads((copied / "runs" / "ria" / "report.json").read_text())["stages"]
    assert [stage["method"] for stage in stages] == ["", "RIA", "GPTQ"]
    assert stages[2]["constraints_verified"]
    assert stages[2]["sparsity"] >= stages[1]["sparsity"] == pytest.approx(0.5, abs=0.001)


def test_the_method_is_listed(copied):
    done = call(copied, "-m", "pqqp_lightning", "methods")
    assert "RIA  pqqp_lightning.callbacks.ria" in done.stdout, done.stdout + done.stderr
    assert "Removes the weights that matter least to both their row and their column" in done.stdout
