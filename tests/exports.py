"""What the tests of exports share: tiny runs, made once a process, and checks that stay in this process."""

from __future__ import annotations

import functools
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import pqqp_lightning.callbacks as c
from pqqp_lightning import Stage
from pqqp_lightning.export import runtime_check
from pqqp_lightning.models import CausalLM


def _without(*sublayers: str) -> list[Stage]:
    """Stages that remove these sublayers, and quantize what is left."""
    return [c.SLEB(len(sublayers), granularity="sublayer", targets=list(sublayers)), c.RTN(4)]


RUNS: dict[str, Any] = {
    "dense": lambda: [],
    "rtn4": lambda: [c.RTN(4, group_size=32)],
    "rtn3-asymmetric": lambda: [c.RTN(3, symmetric=False)],
    "rtn4-asymmetric": lambda: [c.RTN(4, symmetric=False)],
    "rtn5": lambda: [c.RTN(5)],
    "rtn8": lambda: [c.RTN(8)],
    "rtn8-asymmetric": lambda: [c.RTN(8, symmetric=False)],
    "pruned-rtn4": lambda: [c.Magnitude(0.5), c.RTN(4, group_size=32)],
    "mixed": lambda: [c.RTN(3, targets=["*q_proj", "*up_proj"]), c.RTN(5, targets=["*v_proj"])],
    "mixed-asymmetric": lambda: [
        c.RTN(4, symmetric=False, group_size=16, targets=["*mlp*"]),
        c.RTN(5, targets=["*self_attn*"]),
    ],
    "nf4": lambda: [c.NF4()],
    "sparse": lambda: [c.Magnitude(0.5)],
    "sleb": lambda: [c.SLEB(1)],
    "sublayer": lambda: [c.SLEB(1, granularity="sublayer")],
    "channels": lambda: [c.ChannelPruning(0.5, head_ratio=0.5)],
    "uneven": lambda: [c.ChannelPruning(0.5, targets=["*.0.mlp.*"]), c.RTN(4)],
    "narrow": lambda: [c.ChannelPruning(0.3, head_ratio=0.5, targets=["*.1.*"]), c.RTN(4, targets=["*.0.*"])],
    "no-first-attention": lambda: _without("*.0.self_attn"),
    "no-attention": lambda: _without("*.1.self_attn"),
    "no-mlp": lambda: _without("*.1.mlp"),
    "no-last-block": lambda: _without("*.1.self_attn", "*.1.mlp"),
    "basis": lambda: [c.BasisSharing(0.2), c.RTN(4)],
    "quarot": lambda: [c.QuaRot(), c.RTN(4)],
    "online": lambda: [c.QuaRot(online=True)],
    "kept-gains": lambda: [c.QuaRot(gains="keep")],
    "activations": lambda: [c.ActivationQuantization(kv_bits=4)],
    "narrow-channels": lambda: [c.ChannelPruning(0.5)],
    "grouped": lambda: [c.RTN(4, group_size=4, targets=["*attn*"])],
    "grouped-convolution": lambda: [c.RTN(4, group_size=4, targets=["*grouped"])],
    "rtn4-rows": lambda: [c.RTN(4)],
    "rounded": lambda: [c.RTN(8), c.ActivationQuantization()],
    "rounded-rtn4": lambda: [c.RTN(4), c.ActivationQuantization()],
    "rounded-mlp": lambda: [c.RTN(8), c.ActivationQuantization(targets=["*mlp*"])],
    "rounded-to-4": lambda: [c.RTN(8), c.ActivationQuantization(4)],
    "rounded-dense": lambda: [c.RTN(8, targets=["*mlp*"]), c.ActivationQuantization()],
    "rounded-groups": lambda: [c.RTN(8, group_size=16), c.ActivationQuantization()],
    "rounded-asymmetric": lambda: [c.RTN(8, symmetric=False), c.ActivationQuantization()],
    "rounded-values": lambda: [c.RTN(8), c.ActivationQuantization(kv_bits=8)],
    "adapters": lambda: [c.RTN(4), c.LoRA(merge=False, learning_rate=0.05)],
}
"""The stages of each run by name."""


@functools.cache
def run_of(name: str, kind: str = "llama", tied: bool = False) -> Path:
    """The folder of a finished run of a tiny model."""
    folder = Path(tempfile.mkdtemp(prefix="exports-")) / f"a run {name}"
    torch.manual_seed(0)
    settings = (tiny.LLAMA if kind == "llama" else tiny.OPT) | {"tie_word_embeddings": tied}
    module = _model(kind, settings)
    with torch.no_grad():
        for layer, parameter in module.named_parameters():
            if "norm" in layer:
                parameter.add_(0.1 * torch.randn_like(parameter))  # gains and biases as in trained models
            elif tied:
                parameter.mul_(5)
    data = tiny.make_data("resnet" if kind == "convolutions" else kind, Path(tempfile.mkdtemp(prefix="exports-data-")))
    stages = RUNS[name]()
    trainer = tiny.trainer(folder, *stages, **({} if stages else {"max_epochs": 0}))
    trainer.fit(module, datamodule=data)
    return folder


class Convolutions(LightningModule):
    """A user's module: a depthwise and a grouped convolution with BatchNorm, and a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Conv2d(3, 16, 4, stride=4, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 32, 1, groups=2)
        self.fc = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.depthwise(self.inlet(images))).relu()
        return self.fc(self.grouped(x).relu().mean((2, 3)))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


def _model(kind: str, settings: dict[str, Any]) -> LightningModule:
    """A tiny model whose norms are not those of initialization."""
    if kind in ("llama", "opt"):
        return CausalLM(settings)
    module = Convolutions() if kind == "convolutions" else tiny.make_model(kind)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight, 0.5, 0.5)  # some are negative
            nn.init.normal_(norm.running_mean, 0, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return module


def run_here(runtime: Any, arguments: list[str]) -> str:
    """A script of ``runtimes/`` in this process, where importing its libraries costs nothing."""
    script = runpy.run_path(str(runtime_check.SCRIPTS / runtime.script))
    return script["main"](*arguments)


@pytest.fixture
def checks_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the scripts of checks in this process."""
    monkeypatch.setattr(runtime_check, "run_script", run_here)
    monkeypatch.setattr(sys, "path", [*sys.path])
