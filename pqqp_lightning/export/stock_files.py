"""Writes a folder that transformers loads: configuration, weights in shards, tokenizer, generation config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pqqp_lightning.export.target import ExportedModel
from pqqp_lightning.network.quiet import quiet_transformers

SHARD = "5GB"
NOT_COPIED = ("tokenizer.gguf",)
"""Files beside the tokenizer that transformers does not read."""


def write_stock_folder(
    model: ExportedModel, tensors: dict[str, Tensor], folder: Path, quantization: dict[str, Any] | None = None
) -> None:
    """Write everything into ``folder``.

    Args:
        model: gives structure, dtype and tokenizer.
        tensors: every tensor to write, by name.
        folder: empty.
        quantization: the ``quantization_config`` of ``config.json``.
    """
    skeleton: Any = model.stock.build()
    skeleton.to(model.torch_dtype)  # save_pretrained writes the dtype of the structure into config.json
    skeleton.config.architectures = [model.stock.model_class.__name__]
    if quantization is not None:
        skeleton.config.quantization_config = quantization
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with quiet_transformers():
        try:
            skeleton.save_pretrained(folder, state_dict=contiguous, max_shard_size=SHARD)
        except SafetensorError as error:  # safetensors reports a full disk this way
            raise OSError(None, str(error)) from error
    tokenizer = model.source.tokenizer
    if tokenizer is not None:
        for file in tokenizer.iterdir():
            if file.name not in NOT_COPIED:
                shutil.copyfile(file, folder / file.name)


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the folder's safetensors files, by name."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dict
                yield name, opened.get_tensor(name)


def read_config(folder: Path) -> dict[str, Any]:
    """The written ``config.json``."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
