"""What holds for every test: offline, one thread, no seed left over from another test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Files whose tests take longest, since they start processes. They come first, so that no worker ends alone with one.
LONGEST = ("wheel", "ray", "contributing", "ddp", "order", "resume", "recipes", "models_loading", "multiple_choice")


def pytest_collection_modifyitems(items):
    """Start with the longest files; ``--no-loadscope-reorder`` lets the workers take files in this order."""
    first = [f"test_{name}" for name in LONGEST]
    items.sort(key=lambda item: first.index(item.path.stem) if item.path.stem in first else len(first))


def pytest_make_parametrize_id(config, val, argname):
    """Name a stage by its class: its address would give the workers different names of one test."""
    return type(val).__name__ if type(val).__module__.startswith("pqqp_lightning.callbacks") else None


@pytest.fixture(autouse=True)
def _fresh_seed():
    """``seed_everything`` of one test must not decide the next one's run."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)  # not by monkeypatch: a test that calls undo() would get the old seed back
    torch.manual_seed(0)
