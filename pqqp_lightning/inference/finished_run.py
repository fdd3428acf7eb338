"""Loads the model of a finished run for a command, on the fastest device."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule

from pqqp_lightning.checkpoint.format import model_folder
from pqqp_lightning.checkpoint.load import load_quietly
from pqqp_lightning.checkpoint.memory import memory_text


def load_for_use(run: Path, packed: bool) -> LightningModule:
    """The run's model, on the GPU if there is one; says on stderr how much memory it takes.

    Raises:
        RecipeError: the checkpoint is damaged, or cannot build its module.
    """
    module = load_quietly(model_folder(run), packed=packed)
    kind = " (packed)" if packed else ""
    print(f"{run}: {memory_text(module)}{kind}.", file=sys.stderr)
    return module.to("cuda" if torch.cuda.is_available() else "cpu")
