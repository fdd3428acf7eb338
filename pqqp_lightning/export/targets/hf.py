"""A plain Hugging Face folder: dense weights, which every program that reads safetensors loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from pqqp_lightning.errors import Problem
from pqqp_lightning.export.stock_files import read_tensors, write_stock_folder
from pqqp_lightning.export.target import ExportedModel, Runtime, Target

# Mean KL divergence on SmolLM2-135M after the quickstart: 3.5e-5 in float16, 1.9e-3 in bfloat16.
TRANSFORMERS = Runtime(
    name="transformers",
    package="transformers",
    modules=("transformers",),
    script="transformers_logits.py",
    largest_divergence={"float32": 1e-6, "float16": 1e-3, "bfloat16": 2e-2},
)


class HuggingFace(Target):
    """Dense tensors, config, tokenizer and generation config."""

    name = "hf"
    summary = "a plain Hugging Face folder with dense weights"
    loading: ClassVar[dict[str, str]] = {
        "transformers": 'AutoModelForCausalLM.from_pretrained("{out}")',
        "vLLM": 'vllm serve "{out}"',
    }
    runtime = TRANSFORMERS

    def problems(self, model: ExportedModel) -> list[Problem]:
        return []

    def write(self, model: ExportedModel, folder: Path) -> None:
        tensors = {name: model.in_dtype(tensor) for name, tensor in model.stock.stored().items()}
        write_stock_folder(model, tensors, folder)

    def decoded(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        return read_tensors(folder)

    def remarks(self, model: ExportedModel) -> list[str]:
        if not model.stock.grids:
            return []
        return [f"Quantized weights are written as {model.dtype} values: this format holds no codes."]
