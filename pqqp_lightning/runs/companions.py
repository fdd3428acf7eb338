"""What a run folder keeps besides the model, to use it: the tokenizer and samples, or how images are prepared."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.seeding import keep_random_state
from pqqp_lightning.storage.files import new_folder, write_json
from pqqp_lightning.storage.run_folder import RunFolder

SAMPLES = 4
"""Evaluation samples that are kept."""


def keep_companions(folder: RunFolder, data: RunData) -> None:
    """Write what the model's use needs: tokenizer and evaluation samples, or the preprocessing of images."""
    with keep_random_state():  # an iterator over a loader draws a seed, and a transform may draw numbers
        if callable(getattr(data.module, "save_tokenizer", None)):
            _keep_text_companions(folder, data)
        describe = getattr(data.datamodule, "image_preprocessing", None)
        if callable(describe) and not folder.preprocessing.exists():
            write_json(folder.preprocessing, asdict(describe()))


def _keep_text_companions(folder: RunFolder, data: RunData) -> None:
    module: Any = data.module
    ids = _first_samples(data)
    if ids is not None:
        save_file({"input_ids": ids}, folder.samples)
    if not folder.tokenizer.exists():
        with new_folder(folder.tokenizer) as temporary:
            module.save_tokenizer(temporary, getattr(data.datamodule, "tokenizer", None))
        if not any(folder.tokenizer.iterdir()):
            folder.tokenizer.rmdir()


def _first_samples(data: RunData) -> Tensor | None:
    """Token ids [samples, T] of the first evaluation samples without padding; None if these are not rows of tokens."""
    loaders: Any = data.evaluation_loaders()
    loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
    rows: list[Tensor] = []
    for batch in loader:
        ids = batch.get("input_ids") if isinstance(batch, dict) else None
        if not isinstance(ids, Tensor) or ids.dim() != 2 or (rows and len(rows[0]) != ids.shape[1]):
            break
        mask = batch.get("attention_mask")
        if mask is not None:
            ids = ids[mask.bool().all(1)]
        rows += ids.cpu().unbind(0)
        if len(rows) >= SAMPLES:
            break
    return torch.stack(rows[:SAMPLES]) if rows else None
