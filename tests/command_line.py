"""What the tests of the command line share: a tiny recipe, and runs of a command, in this process or in its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import run_forked
from tiny import ACCELERATOR

from pqqp_lightning.__main__ import main
from pqqp_lightning.errors import Problem, RecipeError

RECIPE = """\
model:
  class_path: CausalLM
  init_args:
    model: {model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
            num_key_value_heads: 2, vocab_size: 300, max_position_embeddings: 128}
data:
  class_path: TokenData
  init_args: {calibration: calibration.npy, evaluation: evaluation.npy}
trainer: {accelerator: cpu, devices: 1, enable_progress_bar: false}
run_dir: run
stages:
  prune: {class_path: Magnitude, init_args: {sparsity: 0.5}}
  quantize: {class_path: RTN, init_args: {bits: 4}}
""".replace("accelerator: cpu", f"accelerator: {ACCELERATOR}")


def prepare(folder: Path, monkeypatch: Any) -> Path:
    """Make ``folder`` the working folder, with the recipe and its data, and forget it after the test."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["pqqp-lightning"])
    for name in list(os.environ):
        if name.startswith("PQQP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PQQP_CACHE", str(folder.with_name(f"{folder.name}-cache")))
    generator = np.random.default_rng(0)
    for name in ("calibration", "evaluation", "train"):
        np.save(folder / f"{name}.npy", generator.integers(0, 300, (4, 16)).astype("int32"))
    write_recipe(folder)
    return folder


def write_recipe(folder: Path, replaced: dict[str, str] | None = None, name: str = "recipe.yaml") -> None:
    """The recipe with some of its text replaced."""
    text = RECIPE
    for old, new in (replaced or {}).items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / name).write_text(text)


def run(*arguments: str) -> int:
    """The exit code of a command that runs in this process; an error that is not worded is raised."""
    try:
        main(arguments)
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


def refused(*arguments: str) -> list[Problem]:
    """What the user must put right of a command that runs in this process and exits with code 2."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = stop.value.__context__
    assert isinstance(error, RecipeError)
    return error.problems


def run_process(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pqqp_lightning", *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def run_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same in a process that does not import the libraries anew."""
    return run_forked(["-m", "pqqp_lightning", *arguments], folder)
