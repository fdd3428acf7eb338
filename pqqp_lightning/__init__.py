"""Prune, quantize and recover trained networks in any order, as PyTorch Lightning callbacks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pqqp_lightning import export
    from pqqp_lightning.checkpoint.load import load
    from pqqp_lightning.runs.trainer import Trainer
    from pqqp_lightning.stages.stage import Stage

__version__ = "0.1.0"
__all__ = ["Stage", "Trainer", "export", "load"]

_HOMES = {"load": "checkpoint.load", "Stage": "stages.stage", "Trainer": "runs.trainer"}


def __getattr__(name: str) -> Any:
    """Import on first use: torch and Lightning take seconds."""
    if name == "export":
        return import_module("pqqp_lightning.export")  # a room that is called as a function
    if name in _HOMES:
        return getattr(import_module(f"pqqp_lightning.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pqqp_lightning' has no attribute '{name}'")
