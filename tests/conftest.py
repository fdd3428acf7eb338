"""What holds for every test: offline, one thread, no seed left over from another test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_seed(monkeypatch):
    """``seed_everything`` of one test must not decide the next one's run."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
