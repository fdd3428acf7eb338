"""What a process imports before it needs it: seconds of every command's start."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "lightning", "torchmetrics", "transformers", "torchvision", "scipy"}
LATER = {"transformers", "torchvision", "torchmetrics.functional", "torchmetrics.classification", "datasets", "sklearn"}
LATER |= {"scipy.optimize", "timm", "peft", "pandas"}
LOADED = "import atexit, sys; atexit.register(lambda: print('LOADED', *sys.modules))\n"
WRONG = "['fit', '--config', 'recipes/quickstart.yaml', '--stages.prune.sparsty', '0.5']"


def modules_after(code):
    """(names in sys.modules at the end of a fresh process that ran ``code``, its stderr)."""
    command = [sys.executable, "-c", LOADED + code]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return set(process.stdout.rpartition("LOADED")[2].split()), process.stderr


@pytest.mark.parametrize(
    "code",
    ["import pqqp_lightning", "from pqqp_lightning.__main__ import main; main(['--help'])"],
    ids=["import", "help"],
)
def test_the_package_and_its_help_import_nothing_heavy(code):
    modules, _ = modules_after(code)
    assert "pqqp_lightning" in modules
    assert not modules & HEAVY


def test_a_wrong_recipe_is_refused_before_its_libraries_load():
    modules, words = modules_after(f"from pqqp_lightning.__main__ import main; main({WRONG})")
    assert "sparsity" in words
    assert "torch" in modules
    assert not modules & LATER


def test_torchmetrics_is_whole_for_whoever_asks():
    code = """
from pqqp_lightning.cli.light_torchmetrics import import_torchmetrics_lightly
import_torchmetrics_lightly()
import lightning.pytorch, torchmetrics
assert 'torchmetrics.functional' not in sys.modules
metric = torchmetrics.Metric
assert issubclass(torchmetrics.Accuracy, object) and torchmetrics.functional.accuracy
assert torchmetrics.Metric is metric and issubclass(torchmetrics.MeanMetric, metric)
from torchmetrics.text import BERTScore
from torchmetrics.detection import MeanAveragePrecision
assert issubclass(MeanAveragePrecision, metric)
import importlib.metadata; assert torchmetrics.__version__ == importlib.metadata.version('torchmetrics')
try:
    torchmetrics.no_such_metric
except AttributeError:
    print('whole')
"""
    modules, words = modules_after(code)
    assert "torchmetrics.functional" in modules, words
    assert not words
