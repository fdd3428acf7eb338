"""Adapters that a run kept apart, as a folder of PEFT, with the model that they belong to in its subfolder ``base``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from pqqp_lightning.errors import Problem, shorten
from pqqp_lightning.export.stock_files import read_tensors
from pqqp_lightning.export.target import ExportedModel, Target
from pqqp_lightning.export.targets.bitsandbytes import BitsAndBytes
from pqqp_lightning.export.targets.compressed_tensors import CompressedTensors
from pqqp_lightning.export.targets.gptq import GPTQFolder
from pqqp_lightning.export.targets.hf import TRANSFORMERS, HuggingFace

BASES: dict[str, type[Target]] = {cls.name: cls for cls in (HuggingFace, CompressedTensors, BitsAndBytes, GPTQFolder)}
"""The formats on whose models PEFT puts adapters."""
BASE = "base"
"""The subfolder with the model."""
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT writes before the name of a layer."""


class PEFT(Target):
    """An adapter of PEFT, and its model.

    Args:
        base: the format of the model that the adapters belong to; it goes to the subfolder base.
    """

    name = "peft"
    summary = "adapters that were kept apart, for PEFT, and their model in the subfolder base"
    loading: ClassVar[dict[str, str]] = {
        "PEFT": 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{out}/base"), "{out}")',
        "vLLM": 'vllm serve "{out}/base" --enable-lora --lora-modules adapter="{out}"',
    }
    card: ClassVar[dict[str, str]] = Target.card | {"library_name": "peft"}
    keeps_adapters = True

    def __init__(self, base: Literal["hf", "compressed-tensors", "bitsandbytes", "gptq"] = "hf") -> None:
        self.base = BASES[base]()
        if isinstance(self.base, CompressedTensors):
            self.base.dequantize = True  # PEFT needs weights, which compressed layers get in their first forward pass
        own = self.base.runtime
        assert own is not None
        modules = tuple(dict.fromkeys((*own.modules, "optimum" if base == "gptq" else "peft")))
        limits = own.largest_divergence
        self.runtime = replace(TRANSFORMERS, package=own.package, modules=modules, largest_divergence=limits)

    def check_installed(self) -> list[Problem]:
        return self.base.check_installed()

    def problems(self, model: ExportedModel) -> list[Problem]:
        problems = self.base.problems(model)
        if not model.stock.adapters:
            text = "keeps no adapters apart: they are merged, or there are none"
            way_out = "Set merge: false in LoRA, and run it again, or use --to hf."
            problems.insert(0, Problem("run", str(model.source.folder), text, way_out))
        return problems

    def write(self, model: ExportedModel, folder: Path) -> None:
        (folder / BASE).mkdir()
        self.base.write(model, folder / BASE)
        save_file(dict(_tensors(model)), folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(_config(model), indent=2) + "\n", encoding="utf-8")

    def decoded(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        yield from self.base.decoded(folder / BASE)
        yield from read_tensors(folder)

    def expected(self, model: ExportedModel) -> Iterator[tuple[str, Tensor]]:
        yield from self.base.expected(model)
        yield from _tensors(model)

    def remarks(self, model: ExportedModel) -> list[str]:
        adapted = shorten(model.stock.adapters)
        own = f"The adapter changes {adapted}. It belongs to the model in {BASE} ({self.base.name}), and to no other."
        return [own, *self.base.remarks(model)]


def _tensors(model: ExportedModel) -> Iterator[tuple[str, Tensor]]:
    """A and B of every adapted layer, as PEFT names them, in the exported dtype."""
    for name, low_rank in model.stock.adapters.items():
        yield f"{PREFIX}{name}.lora_A.weight", model.in_dtype(low_rank.a).contiguous()
        yield f"{PREFIX}{name}.lora_B.weight", model.in_dtype(low_rank.b).contiguous()


def _config(model: ExportedModel) -> dict[str, Any]:
    """``adapter_config.json``: the first layer's rank and alpha, and those that differ."""
    adapters = model.stock.adapters
    ranks = {name: len(low_rank.a) for name, low_rank in adapters.items()}
    alphas = {name: low_rank.alpha for name, low_rank in adapters.items()}
    rank = next(iter(ranks.values()))
    alpha = next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": _transposed(model),
        "target_modules": _targets(model),
    }


def _targets(model: ExportedModel) -> list[str]:
    """The adapted layers: by their last names if these mean no other layer, as people write it; else by whole names."""
    adapters = model.stock.adapters
    last = {name.rpartition(".")[2] for name in adapters}
    meant = [name for name, _ in model.stock.build().named_modules() if name.rpartition(".")[2] in last]
    return sorted(last) if set(meant) == set(adapters) else list(adapters)


def _transposed(model: ExportedModel) -> bool:
    """Whether the layers hold their weights [I, O], as GPT-2's do."""
    name, low_rank = next(iter(model.stock.adapters.items()))
    shape = model.stock.weights[f"{name}.weight"].shape
    module = model.stock.build().get_submodule(name)
    return not isinstance(module, torch.nn.Linear) and shape == (low_rank.a.shape[1], low_rank.b.shape[0])
