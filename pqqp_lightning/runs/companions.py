"""What a run folder keeps for exports besides the model: the tokenizer, and a few evaluation samples."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.seeding import keep_random_state
from pqqp_lightning.storage.files import new_folder
from pqqp_lightning.storage.run_folder import RunFolder

SAMPLES = 4
"""Evaluation samples that are kept."""


def keep_companions(folder: RunFolder, data: RunData) -> None:
    """Write the tokenizer and the first evaluation samples of a language model; nothing for other models."""
    save_tokenizer = getattr(data.module, "save_tokenizer", None)
    if not callable(save_tokenizer):
        return
    with keep_random_state():  # an iterator over a loader draws a seed
        ids = _first_samples(data)
    if ids is not None:
        save_file({"input_ids": ids}, folder.samples)
    if not folder.tokenizer.exists():
        with new_folder(folder.tokenizer) as temporary:
            save_tokenizer(temporary, getattr(data.datamodule, "tokenizer", None))
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
