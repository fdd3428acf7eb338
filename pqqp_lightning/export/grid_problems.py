"""What formats of integer codes cannot hold, in the words that they share."""

from __future__ import annotations

import torch
from torch import Tensor

from pqqp_lightning.algorithms.grid import Grid
from pqqp_lightning.errors import Problem, shorten
from pqqp_lightning.export.target import ExportedModel


def codebook_problems(model: ExportedModel) -> list[Problem]:
    """The problem if layers have the levels of NF4 or FP4."""
    names = [name for name, grid in model.stock.grids.items() if grid.codebook is not None]
    if not names:
        return []
    text = f"has {shorten(names)} with the levels of NF4 or FP4, which this format does not have"
    return [Problem("run", str(model.source.folder), text, "Use --to hf, which writes the values.")]


def scale_problems(model: ExportedModel) -> list[Problem]:
    """The problem if scales are stored in the exported dtype, and it changes them."""
    grids = model.stock.grids
    names = [name for name, grid in grids.items() if not is_exact(grid.scale, model.torch_dtype)]
    if not names:
        return []
    return [
        Problem(
            "dtype",
            model.dtype,
            f"changes the scales of {shorten(names)}",
            f"Use --dtype {_exact_dtype(names, grids)}.",
        )
    ]


def no_code_problems(model: ExportedModel) -> list[Problem]:
    """The problem if no layer is quantized."""
    if model.stock.grids:
        return []
    changed = f" left ({' '.join(model.stock.rewritten)})" if model.stock.rewritten else ""
    return [Problem("run", str(model.source.folder), f"has no quantized layer{changed}", "Use --to hf.")]


def is_exact(scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether scales stay as they are in ``dtype``."""
    return torch.equal(scale.to(dtype).float(), scale.float())


def _exact_dtype(names: list[str], grids: dict[str, Grid]) -> str:
    half = all(is_exact(grids[name].scale, torch.float16) for name in names)
    return "float16" if half else "float32"
