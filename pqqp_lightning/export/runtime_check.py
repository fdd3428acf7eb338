"""Loads an exported model in another process, without this package, and compares its outputs with the run's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pqqp_lightning.export.target import ExportedModel, Runtime

SCRIPTS = Path(__file__).parent / "runtimes"
ROWS_AT_ONCE = 64
"""Positions whose distributions are compared at a time: a vocabulary has up to 256,000 entries."""


class RuntimeFailed(Exception):
    """The other program does not load the model, or does not compute outputs."""


@dataclass(frozen=True)
class Agreement:
    """How far the outputs of two models are apart.

    Attributes:
        largest_difference: of a logit.
        divergence: mean KL divergence of the loaded model from the run's, in nats per token.
        same_top: the fraction of positions with the same most likely token.
        perplexity: of the loaded model on the samples.
        own_perplexity: of the run's model on the same samples.
        shape: samples, tokens of each.
        version: of the program.
    """

    largest_difference: float
    divergence: float
    same_top: float
    perplexity: float
    own_perplexity: float
    shape: tuple[int, int]
    version: str

    def agrees(self, runtime: Runtime, dtype: str) -> bool:
        """Whether the divergence is within the limit."""
        return self.divergence <= runtime.largest_divergence[dtype]  # False for NaN


def compare_outputs(model: ExportedModel, runtime: Runtime, folder: Path) -> Agreement:
    """Run the script of ``runtime`` on ``folder``, and compare its logits with those of the run's own model.

    Raises:
        RuntimeFailed: with the last line that the program wrote.
    """
    ids = model.source.samples()  # [B, T]
    with tempfile.TemporaryDirectory(prefix="pqqp-export-") as temporary:
        given = Path(temporary) / "ids.npy"
        logits_file = Path(temporary) / "logits.npy"
        np.save(given, ids.numpy())
        version = _run_script(runtime, [str(folder), str(given), str(logits_file)])
        logits = np.load(logits_file, mmap_mode="r")  # [B, T, V]
        return _compare(model.source.network, ids, logits, version)


def tokens_of(runtime: Runtime, file: Path, texts: Sequence[str]) -> list[list[int]] | None:
    """The token ids of each text by llama.cpp, with the vocabulary in ``file``; None if it does not load the file.

    Raises:
        RuntimeFailed: with the last line that the program wrote.
    """
    given = file.with_name("texts.json")
    given.write_text(json.dumps(list(texts)), encoding="utf-8")
    ids = file.with_name("ids.json")
    _run_script(replace(runtime, script="llama_cpp_tokens.py"), [str(file), str(given), str(ids)])
    return json.loads(ids.read_text(encoding="utf-8"))


def _run_script(runtime: Runtime, arguments: list[str]) -> str:
    """Run a script of ``runtimes/``; returns its last line, the program's version."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_HUB_OFFLINE"] = "1"
    # -P: the script's folder is not importable, so that nothing of this package is found beside it
    command = [sys.executable, "-P", str(SCRIPTS / runtime.script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        words = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise RuntimeFailed(words[-1] if words else f"exit code {done.returncode}")
    return done.stdout.strip().splitlines()[-1]


@torch.no_grad()
def _compare(network: nn.Module, ids: Tensor, logits: np.ndarray, version: str) -> Agreement:
    largest = 0.0
    divergence = 0.0
    same_top = 0
    losses = [0.0, 0.0]  # the run's own, the loaded model's
    for sample, row in enumerate(ids):
        own: Tensor = network(input_ids=row[None], use_cache=False).logits[0].float()  # [T, V]
        for start in range(0, len(row), ROWS_AT_ONCE):
            a = own[start : start + ROWS_AT_ONCE]
            b = torch.from_numpy(np.array(logits[sample, start : start + ROWS_AT_ONCE]))
            largest = max(largest, float((a - b).abs().max()))
            log_a = a.double().log_softmax(-1)
            log_b = b.double().log_softmax(-1)
            divergence += float((log_a.exp() * (log_a - log_b)).sum())
            same_top += int((a.argmax(-1) == b.argmax(-1)).sum())
            targets = row[start + 1 : start + 1 + len(a)]
            for side, log_p in enumerate((log_a, log_b)):
                losses[side] += float(F.nll_loss(log_p[: len(targets)], targets, reduction="sum"))
    predicted = ids.shape[0] * (ids.shape[1] - 1)
    perplexities = [float(np.exp(loss / predicted)) for loss in losses]
    return Agreement(
        largest_difference=largest,
        divergence=divergence / ids.numel(),
        same_top=same_top / ids.numel(),
        perplexity=perplexities[1],
        own_perplexity=perplexities[0],
        shape=(ids.shape[0], ids.shape[1]),
        version=version,
    )
