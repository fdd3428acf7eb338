"""A bitsandbytes 4-bit checkpoint of transformers: NF4 and FP4 codes as they are, as QLoRA trains on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pqqp_lightning.algorithms.codebook import levels_of
from pqqp_lightning.algorithms.grid import Grid, encode
from pqqp_lightning.errors import Problem, shorten
from pqqp_lightning.export.stock_files import read_tensors, write_stock_folder
from pqqp_lightning.export.target import ExportedModel, Target
from pqqp_lightning.export.targets.hf import TRANSFORMERS

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that share a scale, as the library's kernels read them."""
ROWS = 32
"""Rows that its kernel for processors takes at a time."""
STATE = ".quant_state.bitsandbytes__"
"""In the name of the tensor that describes a quantized weight."""


class BitsAndBytes(Target):
    """The codes and scales of NF4 or FP4; everything else dense."""

    name = "bitsandbytes"
    summary = "NF4 or FP4 codes, as transformers with bitsandbytes loads them"
    loading: ClassVar[dict[str, str]] = {
        "transformers": 'AutoModelForCausalLM.from_pretrained("{out}")  # needs pip install bitsandbytes',
    }
    requires = ("bitsandbytes",)
    runtime = replace(
        TRANSFORMERS,
        package="bitsandbytes",
        modules=("transformers", "bitsandbytes"),
        # its kernel for processors computes in bfloat16, whatever the dtype
        largest_divergence=dict.fromkeys(TRANSFORMERS.largest_divergence, TRANSFORMERS.largest_divergence["bfloat16"]),
    )

    def problems(self, model: ExportedModel) -> list[Problem]:
        run = str(model.source.folder)
        grids = model.stock.grids
        problems = []
        if not grids:
            problems.append(Problem("run", run, "has no quantized layer", "Use --to hf."))
        if integers := [name for name, grid in grids.items() if grid.codebook is None]:
            text = f"has {shorten(integers)} with integer codes, which this format does not have"
            problems.append(Problem("run", run, text, "Use --to compressed-tensors, or the stage NF4."))
        if odd := [name for name, grid in grids.items() if grid.codebook and grid.group_size not in BLOCKS]:
            sizes = ", ".join(map(str, BLOCKS[:3]))
            text = f"has {shorten(odd)} whose groups bitsandbytes does not read"
            problems.append(Problem("run", run, text, f"Use groups of {sizes} or another power of 2 up to 4096."))
        if narrow := [name for name in grids if len(model.stock.weights[f"{name}.weight"]) % ROWS]:
            text = f"has {shorten(narrow)} whose rows are not a multiple of {ROWS}, as bitsandbytes needs on processors"
            problems.append(Problem("run", run, text, "Use --to hf, or add them to ignore of the stage."))
        if len({grid.codebook for grid in grids.values()} - {None}) > 1:
            problems.append(Problem("run", run, "mixes NF4 and FP4", "Use --to hf."))
        return problems

    def write(self, model: ExportedModel, folder: Path) -> None:
        stored = model.stock.stored()
        tensors = {}
        for name, tensor in stored.items():
            grid = model.stock.grids.get(name.removesuffix(".weight"))
            if grid is None or not name.endswith(".weight"):
                tensors[name] = model.in_dtype(tensor)
                continue
            tensors[name] = _packed(tensor, grid)
            tensors.update({f"{name}.{key}": value for key, value in _state(tensor, grid, model).items()})
        write_stock_folder(model, tensors, folder, _config(model))

    def decoded(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        read = dict(read_tensors(folder))
        packed = [name.partition(STATE)[0] for name in read if STATE in name]
        for name in packed:
            state = {key: read.pop(key) for key in list(read) if key.startswith(f"{name}.")}
            yield name, dequantize_4bit(read.pop(name), QuantState.from_dict(state, torch.device("cpu")))
        yield from read.items()

    def remarks(self, model: ExportedModel) -> list[str]:
        dense = [name for name in _dense_layers(model) if name != "lm_head"]
        return [f"{shorten(dense)} without codes stay dense ({model.dtype})."] if dense else []


def _packed(weight: Tensor, grid: Grid) -> Tensor:
    """Two codes a byte, the first in the high half: uint8 [O * I / 2, 1]."""
    assert grid.codebook is not None
    # the library's table has another order than ours, and FP4 two zeros
    table = _table(grid)
    order = torch.stack([(table - level).abs().argmin() for level in levels_of(grid.codebook, weight)])
    codes = order.to(torch.uint8)[encode(weight, grid).long()].flatten()
    return ((codes[::2] << 4) | codes[1::2]).view(-1, 1)


def _state(weight: Tensor, grid: Grid, model: ExportedModel) -> dict[str, Tensor]:
    """What the library keeps beside the codes, by name."""
    from bitsandbytes.functional import QuantState

    state = QuantState(
        absmax=grid.scale.float().expand(len(weight), -1).flatten().contiguous(),
        shape=weight.shape,
        dtype=model.torch_dtype,
        blocksize=grid.group_size,
        code=_table(grid),
        quant_type=grid.codebook,
    )
    return state.as_dict(packed=True)


def _table(grid: Grid) -> Tensor:
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type(grid.codebook, device="cpu")


def _config(model: ExportedModel) -> dict[str, Any]:
    """The ``quantization_config`` of config.json."""
    kind = next(iter(model.stock.grids.values())).codebook
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": model.dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": _dense_layers(model) or ["lm_head"],
    }


def _dense_layers(model: ExportedModel) -> list[str]:
    return [name for name in model.stock.linear_layers() if name not in model.stock.grids]
