"""The GPTQ format (``checkpoint_format: gptq``, its first version), which GPTQModel, vLLM and transformers load.

A quantized Linear [O, I] with G groups is stored in four tensors; b is 4 or 8, and 32 / b codes share a word, the first
one in the lowest bits (GPTQModel's wiki, Packing-Formats-and-Compatibility):

- ``qweight``: int32 [I * b / 32, O], the codes, packed along the columns of the weight;
- ``qzeros``: int32 [G, O * b / 32], the zero points minus 1, packed along the rows of the weight;
- ``scales``: float16 [G, O];
- ``g_idx``: int32 [I], the group of each column.

The weight is ``scale * (code - zero)``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pqqp_lightning.algorithms.grid import Grid, encode
from pqqp_lightning.errors import Problem, shorten
from pqqp_lightning.export.grid_problems import codebook_problems, is_exact, no_code_problems, scale_problems
from pqqp_lightning.export.grids import FUSED, half_joined, in_groups, in_rows, wider_bits
from pqqp_lightning.export.larger import finer_scales, wider_codes
from pqqp_lightning.export.stock_files import read_config, read_tensors, write_stock_folder
from pqqp_lightning.export.target import ExportedModel, Runtime, Target

WIDTHS = (4, 8)
"""Bits of codes that every program reads."""
GROUPS = (1024, 512, 256, 128, 64, 32, 16)
"""Group sizes that GPTQModel reads, besides whole rows."""
PARTS = ("qweight", "qzeros", "scales", "g_idx")
WORD = 32
"""Bits of a packed word."""


class GPTQFolder(Target):
    """Codes, scales and zero points of quantized Linear layers as they are; everything else dense."""

    name = "gptq"
    summary = "codes in the GPTQ format, as GPTQModel, vLLM and transformers load them"
    loading: ClassVar[dict[str, str]] = {
        "GPTQModel": 'GPTQModel.load("{out}")  # pip install gptqmodel, in an environment of its own',
        "vLLM": 'vllm serve "{out}"',
        "transformers": 'AutoModelForCausalLM.from_pretrained("{out}")  # needs pip install gptqmodel optimum',
    }
    runtime = Runtime(
        name="GPTQModel",
        package="gptqmodel",
        modules=("gptqmodel",),
        script="gptqmodel_logits.py",
        # its kernels for processors compute in float16 or bfloat16, whatever the dtype
        largest_divergence={"float32": 2e-2, "float16": 2e-2, "bfloat16": 2e-2},
        needs_tokenizer=True,
    )

    def problems(self, model: ExportedModel) -> list[Problem]:
        problems = [*codebook_problems(model), *scale_problems(model), *no_code_problems(model)]
        grids = {name: grid for name, grid in model.stock.grids.items() if grid.codebook is None}
        run = str(model.source.folder)
        if coarse := [name for name, grid in grids.items() if not is_exact(grid.scale, torch.float16)]:
            text = f"has {shorten(coarse)} with scales that float16 changes, and this format stores them in float16"
            problems.append(Problem("run", run, text, "Use --to compressed-tensors --dtype float32."))
        if wide := [name for name, grid in grids.items() if _symmetric(grid).bits > WIDTHS[-1]]:
            text = f"has {shorten(wide)} with zero points and 8 bits, which programs do not read in this format"
            problems.append(Problem("run", run, text, "Use --to compressed-tensors, or quantize with symmetric: true."))
            return problems
        if not model.widen and (odd := [name for name, grid in grids.items() if _symmetric(grid).bits not in WIDTHS]):
            text = f"keeps codes of other widths than 4 and 8 bits in {shorten(odd)}, which not every program reads"
            problems.append(Problem("widen", False, text, "Use --widen true."))
            return problems
        bits = _bits(model, grids)
        reasons: dict[tuple[str, str], list[str]] = {}
        for name, grid in grids.items():
            for reason in _reasons(model.stock.weights[f"{name}.weight"], grid, bits[name]):
                reasons.setdefault(reason, []).append(name)
        for (text, way_out), names in reasons.items():
            problems.append(Problem("run", run, f"has {shorten(names)} {text}", way_out))
        return problems

    def write(self, model: ExportedModel, folder: Path) -> None:
        tensors = {name: model.in_dtype(tensor) for name, tensor in model.stock.stored().items()}
        for name, grid in _stored_grids(model).items():
            del tensors[f"{name}.weight"]
            parts = _packed(model.stock.weights[f"{name}.weight"], grid)
            tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
        write_stock_folder(model, tensors, folder, _config(model))

    def decoded(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """Decode by the format's description, byte by byte, without the writer's code.

        The format's own library, GPTQModel, sets environment variables and needs an environment of its own: it cannot
        be imported here. ``benchmarks/export.md`` has the check by it.
        """
        config = read_config(folder)
        dtype = getattr(torch, config["dtype"])
        for name, tensor in unpacked(config["quantization_config"], read_tensors(folder)):
            yield name, tensor.to(dtype)

    def remarks(self, model: ExportedModel) -> list[str]:
        grids = model.stock.grids
        stored = _stored_grids(model)
        linear = model.stock.linear_layers()
        remarks = wider_codes(model.stock, {name: grid.bits for name, grid in stored.items()})
        groups = {name: grid.scale.shape[1] for name, grid in stored.items()}
        remarks += finer_scales(model.stock, groups, model.torch_dtype.itemsize)
        if dense := [name for name in linear if name not in grids and name != "lm_head"]:
            remarks.append(f"{shorten(dense)} without codes stay dense ({model.dtype}).")
        if half := half_joined(stored, linear):
            remarks.append(f"vLLM joins {shorten(half)} with quantized layers, so that it does not load this folder.")
        if len({str(setting) for setting in _settings(stored).values()}) > 1:
            remarks.append("Layers differ in bits or groups, which transformers does not read here; GPTQModel does.")
        return remarks


def _symmetric(grid: Grid) -> Grid:
    """The grid without zero points: one bit more holds code minus zero point, and no value changes.

    Programs refuse zero points in this format, or have read them differently (GPTQModel's check of ``sym``).
    """
    return grid if grid.zero is None else replace(grid, bits=grid.bits + 1, zero=None)


def _bits(model: ExportedModel, grids: dict[str, Grid]) -> dict[str, int]:
    """The bits of each layer's stored codes."""
    symmetric = {name: _symmetric(grid) for name, grid in grids.items()}
    return wider_bits(symmetric, WIDTHS) if model.widen else {name: grid.bits for name, grid in symmetric.items()}


def _stored_grids(model: ExportedModel) -> dict[str, Grid]:
    """The grid that is written for each quantized layer: as it is, or widened."""
    bits = _bits(model, model.stock.grids)
    stored = {}
    for name, grid in model.stock.grids.items():
        stored[name] = in_rows(_stored_grid(grid, bits[name]), len(model.stock.weights[f"{name}.weight"]))
    return stored


def _stored_grid(grid: Grid, bits: int) -> Grid:
    """The grid with ``bits``, groups that programs read, and no zero points."""
    wider = replace(_symmetric(grid), bits=bits)
    size = _group_size(grid)
    return wider if size is None or size == grid.group_size else in_groups(wider, grid.columns // size)


def _group_size(grid: Grid) -> int | None:
    """The largest group size that programs read and that divides the grid's; None for whole rows, or for none."""
    if grid.scale.shape[1] == 1:
        return None
    return next((size for size in GROUPS if grid.group_size % size == 0), None)


def _reasons(weight: Tensor, grid: Grid, bits: int) -> list[tuple[str, str]]:
    """Why a layer [O, I] cannot be written, each with the way out."""
    reasons = []
    rows, columns = weight.shape
    if rows % (WORD // bits) or columns % (WORD // bits):
        text = f"whose rows or columns are not a multiple of {WORD // bits}"
        reasons.append((text, "Use --to compressed-tensors, or add them to ignore of the stage."))
    if grid.scale.shape[1] > 1 and _group_size(grid) is None:
        text = "whose groups GPTQModel does not read"
        reasons.append((text, "Use groups of 16, 32, 64 or 128, or --to compressed-tensors."))
    return reasons


def _packed(weight: Tensor, grid: Grid) -> dict[str, Tensor]:
    """The tensors of one layer; ``weight`` [O, I] lies on ``grid``, whose scales are [O, G]."""
    rows, groups = grid.scale.shape
    zero = torch.full((rows, groups), int(grid.middle))
    return {
        "qweight": _words(encode(weight, grid).T, grid.bits),
        "qzeros": _words(zero - 1, grid.bits).T,
        "scales": grid.scale.half().T,
        "g_idx": torch.arange(grid.columns, dtype=torch.int32) // grid.group_size,
    }


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, M] in words along N, the first in the lowest bits: int32 [N * bits / 32, M]."""
    together = codes.to(torch.int64).unflatten(0, (-1, WORD // bits))  # [N * bits / 32, 32 / bits, M]
    shifts = torch.arange(0, WORD, bits)[:, None]
    words = (together << shifts).sum(1).numpy()
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def unpacked(settings: dict[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder of this format, in place of each layer's four its weight in float32.

    Args:
        settings: the ``quantization_config`` of config.json.
        tensors: by name, as the files hold them.
    """
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        layer, _, part = name.rpartition(".")
        if part in PARTS:
            packed.setdefault(layer, {})[part] = tensor
        else:
            yield name, tensor
    for layer, parts in packed.items():
        yield f"{layer}.weight", _unpacked(parts, _bits_of(layer, settings))


def _unpacked(parts: dict[str, Tensor], bits: int) -> Tensor:
    """The weight of one layer: float32 [O, I]."""
    codes = _bytes_of(parts["qweight"].T, bits)  # [O, I]
    zeros = _bytes_of(parts["qzeros"], bits).T + 1  # [O, G]
    group = parts["g_idx"].long()
    scales = parts["scales"].float().T
    return scales[:, group] * (codes - zeros[:, group])


def _bytes_of(words: Tensor, bits: int) -> Tensor:
    """The codes that the words of each row hold, as their bytes lie in the file: int16 [N, codes]."""
    raw = torch.from_numpy(np.ascontiguousarray(words.numpy(), dtype="<i4").view(np.uint8))
    if bits == 8:
        return raw.to(torch.int16)
    return torch.stack([raw % 16, raw // 16], dim=-1).flatten(1).to(torch.int16)


def _settings(stored: dict[str, Grid]) -> dict[str, dict[str, Any]]:
    """The settings of each layer."""
    grouped = {grid.group_size for grid in stored.values() if grid.scale.shape[1] > 1}
    settings = {}
    for name, grid in stored.items():
        # a row of one group is a whole row, and may be called either
        size = grid.group_size if grid.group_size in grouped else -1
        settings[name] = {"bits": grid.bits, "group_size": size, "sym": True}
    return settings


def _config(model: ExportedModel) -> dict[str, Any]:
    """The ``quantization_config`` of config.json: the most frequent settings, and in ``dynamic`` those that differ."""
    stored = _stored_grids(model)
    settings = _settings(stored)
    most = Counter(str(arguments) for arguments in settings.values()).most_common(1)[0][0]
    common = next(arguments for arguments in settings.values() if str(arguments) == most)
    dense = [name for name in model.stock.linear_layers() if name not in stored and name != "lm_head"]
    rules: dict[str, dict[str, Any]] = {f"-:{_pattern(name)}": {} for name in dense}
    rules |= {f"+:{_pattern(name)}": own for name, own in settings.items() if own != common}
    config = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        **common,
        "desc_act": False,
        "lm_head": "lm_head" in stored,
        "pack_dtype": "int32",
    }
    if rules:
        config["dynamic"] = rules
    if dense:  # vLLM and transformers read this, not the negative rules
        config["modules_in_block_to_quantize"] = [list(stored)]
    return config


def _pattern(layer: str) -> str:
    """A regular expression for a layer, and for what vLLM joins it with."""
    parent, _, child = layer.rpartition(".")
    names = [child] + [joined for joined, parts in FUSED.items() if child in parts]
    last = names[0] if len(names) == 1 else f"(?:{'|'.join(names)})"
    return re.escape(f"{parent}." if parent else "") + f"{last}$"


def _bits_of(layer: str, settings: dict[str, Any]) -> int:
    """The bits of one layer, as programs find them: those of the first rule that matches, else the common ones."""
    for rule, own in (settings.get("dynamic") or {}).items():
        if re.match(rule.removeprefix("+:").removeprefix("-:"), layer):
            return own.get("bits", settings["bits"])
    return settings["bits"]
