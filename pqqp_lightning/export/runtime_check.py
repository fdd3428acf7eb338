"""Loads an exported model in another process, without this package, and compares its outputs with the run's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from pqqp_lightning.export.target import ExportedModel, Runtime

SCRIPTS = Path(__file__).parent / "runtimes"
ROWS_AT_ONCE = 64
"""Positions whose distributions are compared at a time: a vocabulary has up to 256,000 entries."""


class RuntimeFailed(Exception):
    """The other program does not load the model, or does not compute outputs."""


@dataclass(frozen=True)
class Agreement(ABC):
    """How far the outputs of two models are apart.

    Attributes:
        largest_difference: of a logit.
        version: of the program.
    """

    largest_difference: float
    version: str

    @abstractmethod
    def words(self) -> str:
        """What was found, for people."""

    @abstractmethod
    def limit(self) -> str:
        """The limit that the outputs exceed; empty if they agree."""


@dataclass(frozen=True)
class TokenAgreement(Agreement):
    """How far the outputs of two language models are apart.

    Attributes:
        divergence: mean KL divergence of the loaded model from the run's, in nats per token.
        same_top: the fraction of positions with the same most likely token.
        perplexity: of the loaded model on the samples.
        own_perplexity: of the run's model on the same samples.
        shape: samples, tokens of each.
        kind: of the samples: "evaluation" or "random".
        largest_divergence: that counts as agreement.
    """

    divergence: float
    same_top: float
    perplexity: float
    own_perplexity: float
    shape: tuple[int, int]
    kind: str
    largest_divergence: float

    def words(self) -> str:
        samples, tokens = self.shape
        return (
            f"perplexity {self.perplexity:.4f} (this run: {self.own_perplexity:.4f}), largest logit difference "
            f"{self.largest_difference:.3g}, KL {self.divergence:.1e}, same top {self.same_top:.1%} "
            f"({samples} x {tokens} {self.kind} tokens)"
        )

    def limit(self) -> str:
        agrees = self.divergence <= self.largest_divergence  # False for NaN
        return "" if agrees else f"KL above {self.largest_divergence:g}"


@dataclass(frozen=True)
class OutputAgreement(Agreement):
    """How far the outputs of two other models are apart.

    Attributes:
        relative_difference: the Euclidean norm of the difference of all outputs, relative to that of the run's.
        largest_relative: that counts as agreement.
        same_top: the fraction of samples with the same largest output; None for outputs that are not [B, classes].
        top1: the loaded model's fraction of correct samples; None where no labels are kept.
        own_top1: the run's.
        samples: how many.
        kind: of the samples: "evaluation" or "random".
    """

    relative_difference: float
    largest_relative: float
    same_top: float | None
    top1: float | None
    own_top1: float | None
    samples: int
    kind: str

    def words(self) -> str:
        parts = [
            f"largest output difference {self.largest_difference:.3g} ({self.relative_difference:.1e} of the norm)"
        ]
        if self.same_top is not None:
            parts.append(f"same top {self.same_top:.1%}")
        if self.top1 is not None:
            parts.append(f"top-1 {self.top1:.1%} (this run: {self.own_top1:.1%})")
        return f"{', '.join(parts)} ({self.samples} {self.kind} samples)"

    def limit(self) -> str:
        agrees = self.relative_difference <= self.largest_relative  # False for NaN
        return "" if agrees else f"above {self.largest_relative:g} of the norm"


def compare_outputs(model: ExportedModel, runtime: Runtime, folder: Path) -> TokenAgreement:
    """Run the script of ``runtime`` on ``folder``, and compare its logits with those of the run's own model.

    Raises:
        RuntimeFailed: with the last line that the program wrote.
    """
    ids = model.source.samples()  # [B, T]
    with tempfile.TemporaryDirectory(prefix="pqqp-export-") as temporary:
        given = Path(temporary) / "ids.npy"
        logits_file = Path(temporary) / "logits.npy"
        np.save(given, ids.numpy())
        version = run_script(runtime, [str(folder), str(given), str(logits_file)])
        logits = np.load(logits_file, mmap_mode="r")  # [B, T, V]
        return _compare(model, runtime, ids, logits, version)


def tokens_of(runtime: Runtime, file: Path, texts: Sequence[str]) -> list[list[int]] | None:
    """The token ids of each text by llama.cpp, with the vocabulary in ``file``; None if it does not load the file.

    Raises:
        RuntimeFailed: with the last line that the program wrote.
    """
    given = file.with_name("texts.json")
    given.write_text(json.dumps(list(texts)), encoding="utf-8")
    ids = file.with_name("ids.json")
    run_script(replace(runtime, script="llama_cpp_tokens.py"), [str(file), str(given), str(ids)])
    return json.loads(ids.read_text(encoding="utf-8"))


def run_script(runtime: Runtime, arguments: list[str]) -> str:
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
def _compare(model: ExportedModel, runtime: Runtime, ids: Tensor, logits: np.ndarray, version: str) -> TokenAgreement:
    network = model.source.network
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
    accepted = runtime.largest_divergence[model.dtype]
    if model.stock.rounding:
        accepted = max(accepted, runtime.rounding_divergence)
    predicted = ids.shape[0] * (ids.shape[1] - 1)
    perplexities = [float(np.exp(loss / predicted)) for loss in losses]
    return TokenAgreement(
        largest_difference=largest,
        divergence=divergence / ids.numel(),
        same_top=same_top / ids.numel(),
        perplexity=perplexities[1],
        own_perplexity=perplexities[0],
        shape=(ids.shape[0], ids.shape[1]),
        kind="evaluation" if model.source.has_samples() else "random",
        largest_divergence=accepted,
        version=version,
    )


@torch.no_grad()
def compare_arrays(
    runtime: Runtime, written: Path, network: nn.Module, inputs: Sequence[Tensor], at_once: int
) -> tuple[Tensor, Tensor, str]:
    """Run the script of ``runtime`` on the model ``written``, and ``network`` itself.

    Args:
        runtime: reads the model, the inputs and how many samples to run at once.
        written: the file or folder.
        network: takes the inputs by position, and returns one tensor.
        inputs: [B, ...] each.
        at_once: samples of a batch.

    Returns:
        The outputs of the program and of the network, and the program's version.

    Raises:
        RuntimeFailed: with the last line that the program wrote.
    """
    with tempfile.TemporaryDirectory(prefix="pqqp-export-") as temporary:
        given = Path(temporary) / "inputs.npz"
        outputs = Path(temporary) / "outputs.npy"
        np.savez(given, *[tensor.numpy() for tensor in inputs])  # arr_0, arr_1, ...
        version = run_script(runtime, [str(written), str(given), str(outputs), str(at_once)])
        found = torch.from_numpy(np.load(outputs)).float()
    parts = zip(*[tensor.split(at_once) for tensor in inputs], strict=True)
    own = [network(*part).float() for part in parts]
    return found, torch.cat(own), version
