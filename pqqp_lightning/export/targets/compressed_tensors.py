"""The compressed-tensors format: packed integer codes, which vLLM and transformers load."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pqqp_lightning.algorithms.grid import Grid, encode
from pqqp_lightning.errors import Problem, shorten
from pqqp_lightning.export.grids import fused_with, in_groups, in_rows, wider_bits, with_zero_points
from pqqp_lightning.export.larger import finer_scales, wider_codes
from pqqp_lightning.export.stock_files import read_config, read_tensors, write_stock_folder
from pqqp_lightning.export.target import ExportedModel, Target
from pqqp_lightning.export.targets.hf import TRANSFORMERS

FORMAT = "pack-quantized"
WIDTHS = (4, 8)
"""Bits that vLLM's kernels read. The library packs others, too, in a way that changed between its versions."""
FAST_GROUPS = (32, 64, 128)
"""Groups that vLLM's kernels read, besides whole rows."""
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


class CompressedTensors(Target):
    """Codes, scales and zero points of quantized Linear layers as they are; everything else dense."""

    name = "compressed-tensors"
    summary = "packed codes with their scales, as vLLM and transformers load them"
    loading: ClassVar[dict[str, str]] = {
        "transformers": 'AutoModelForCausalLM.from_pretrained("{out}")  # needs pip install compressed-tensors',
        "vLLM": 'vllm serve "{out}"',
    }
    requires = ("compressed_tensors",)
    runtime = replace(TRANSFORMERS, package="compressed-tensors", modules=("transformers", "compressed_tensors"))

    def problems(self, model: ExportedModel) -> list[Problem]:
        grids = model.stock.grids
        run = str(model.source.folder)
        problems = []
        if codebooks := [name for name, grid in grids.items() if grid.codebook is not None]:
            text = f"has {shorten(codebooks)} with the levels of NF4 or FP4, which this format does not have"
            problems.append(Problem("run", run, text, "Use --to hf, which writes the values."))
        inexact = [name for name, grid in grids.items() if not _is_exact(grid.scale, model.torch_dtype)]
        if inexact:
            text = f"changes the scales of {shorten(inexact)}"
            problems.append(Problem("dtype", model.dtype, text, f"Use --dtype {_exact_dtype(inexact, grids)}."))
        if not grids:
            changed = f" left ({' '.join(model.stock.rewritten)})" if model.stock.rewritten else ""
            problems.append(Problem("run", run, f"has no quantized layer{changed}", "Use --to hf."))
        elif not problems and _needs_one_setting(_stored_grids(model)):
            text = "keeps zero points in several settings, of which transformers loads only one"
            problems.append(Problem("widen", False, text, "Use --widen true."))
        return problems

    def write(self, model: ExportedModel, folder: Path) -> None:
        tensors = {name: model.in_dtype(tensor) for name, tensor in model.stock.stored().items()}
        schemes: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for name, grid in _stored_grids(model).items():
            del tensors[f"{name}.weight"]
            parts = _packed(model.stock.weights[f"{name}.weight"], grid, model.torch_dtype)
            tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
            arguments = _arguments(grid)
            schemes.setdefault(str(arguments), (arguments, []))[1].append(name)
        write_stock_folder(model, tensors, folder, self._config(model, list(schemes.values())))

    def decoded(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig

        settings = dict(read_config(folder)["quantization_config"])
        settings.pop("dequantize", None)  # transformers' own
        config = QuantizationConfig.model_validate(settings)
        packed: dict[str, dict[str, Tensor]] = {}
        for name, tensor in read_tensors(folder):
            layer, _, part = name.rpartition(".")
            if part in PARTS:
                packed.setdefault(layer, {})[part] = tensor
            else:
                yield name, tensor
        compressor = BaseCompressor.get_value_from_registry(FORMAT)
        for layer, parts in packed.items():
            scheme = next(s for s in config.config_groups.values() if s.targets == ["Linear"] or layer in s.targets)
            yield f"{layer}.weight", compressor.decompress(parts, scheme)["weight"]

    def remarks(self, model: ExportedModel) -> list[str]:
        grids = model.stock.grids
        stored = _stored_grids(model)
        remarks = wider_codes(model.stock, {name: grid.bits for name, grid in stored.items()})
        groups = {name: grid.scale.shape[1] for name, grid in stored.items()}
        remarks += finer_scales(model.stock, groups, model.torch_dtype.itemsize)
        linear = _linear_layers(model)
        if dense := [name for name in linear if name not in grids and name != "lm_head"]:
            remarks.append(f"{shorten(dense)} without codes stay dense ({model.dtype}).")
        if half := _half_joined(stored, linear):
            remarks.append(f"vLLM joins {shorten(half)} with quantized layers, so that it does not load this folder.")
        if slow := [name for name, grid in stored.items() if not _has_kernel(grid)]:
            remarks.append(f"vLLM has no kernel for the bits or groups of {shorten(slow)}; transformers loads them.")
        return remarks

    def _config(self, model: ExportedModel, schemes: list[tuple[dict[str, Any], list[str]]]) -> dict[str, Any]:
        """The ``quantization_config`` of config.json."""
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            QuantizationStatus,
        )

        groups: dict[str, QuantizationScheme | list[str]] = {}
        quantized = set()
        for number, (arguments, names) in enumerate(schemes):
            targets = ["Linear"] if len(schemes) == 1 else names
            groups[f"group_{number}"] = QuantizationScheme(
                targets=targets, weights=QuantizationArgs(**arguments), format=FORMAT
            )
            quantized.update(names)
        config = QuantizationConfig(
            config_groups=groups,
            ignore=[name for name in _linear_layers(model) if name not in quantized],
            format=FORMAT,
            quantization_status=QuantizationStatus.COMPRESSED,
        )
        settings = {"quant_method": "compressed-tensors", **config.model_dump(mode="json", exclude_none=True)}
        if any(not arguments["symmetric"] for arguments, _ in schemes):
            settings["dequantize"] = True  # transformers loads zero points in no other way
        return settings


def _stored_grids(model: ExportedModel) -> dict[str, Grid]:
    """The grid that is written for each quantized layer: as it is, or widened."""
    grids = dict(model.stock.grids)
    if model.widen:
        bits = wider_bits(grids, WIDTHS)
        grids = _alike({name: replace(grid, bits=bits[name]) for name, grid in grids.items()})
    return {name: in_rows(grid, len(model.stock.weights[f"{name}.weight"])) for name, grid in grids.items()}


def _alike(grids: dict[str, Grid]) -> dict[str, Grid]:
    """The grids in one setting for all layers, if there are zero points.

    transformers reads zero points with one setting for all layers alone: the most bits, the smallest groups.
    """
    if all(grid.zero is None for grid in grids.values()):
        return grids
    bits = max(grid.bits for grid in grids.values())
    size = math.gcd(*(grid.group_size for grid in grids.values()))
    per_row = all(grid.scale.shape[1] == 1 for grid in grids.values())
    alike = {}
    for name, grid in grids.items():
        repeated = grid if per_row else in_groups(grid, grid.columns // size)
        alike[name] = with_zero_points(replace(repeated, bits=bits))
    return alike


def _needs_one_setting(grids: dict[str, Grid]) -> bool:
    """Whether there are zero points and several settings."""
    settings = {str(_arguments(grid)) for grid in grids.values()}
    return len(settings) > 1 and any(grid.zero is not None for grid in grids.values())


def _half_joined(grids: dict[str, Grid], linear: list[str]) -> list[str]:
    """The dense layers that servers join with quantized ones."""
    return [name for name in linear if name not in grids and any(n in grids for n in fused_with(name, linear))]


def _has_kernel(grid: Grid) -> bool:
    """Whether vLLM's kernels read it."""
    return grid.bits in WIDTHS and (grid.scale.shape[1] == 1 or grid.group_size in FAST_GROUPS)


def _packed(weight: Tensor, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer; ``weight`` lies on ``grid``."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    middle = 1 << (grid.bits - 1)
    signed = (encode(weight, grid).to(torch.int16) - middle).to(torch.int8)
    parts = {
        "weight_packed": pack_to_int32(signed, grid.bits),
        "weight_scale": grid.scale.to(dtype),
        "weight_shape": torch.tensor(weight.shape),
    }
    if grid.zero is not None:
        zero = (grid.zero.to(torch.int16) - middle).to(torch.int8)
        parts["weight_zero_point"] = pack_to_int32(zero, grid.bits, packed_dim=0)
    return parts


def _arguments(grid: Grid) -> dict[str, Any]:
    """The arguments of the library's ``QuantizationArgs``."""
    arguments = {"num_bits": grid.bits, "type": "int", "symmetric": grid.zero is None, "strategy": "channel"}
    if grid.scale.shape[1] > 1:
        arguments |= {"strategy": "group", "group_size": grid.group_size}
    return arguments


def _is_exact(scale: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(scale.to(dtype).float(), scale.float())


def _exact_dtype(names: list[str], grids: dict[str, Grid]) -> str:
    half = all(_is_exact(grids[name].scale, torch.float16) for name in names)
    return "float16" if half else "float32"


def _linear_layers(model: ExportedModel) -> list[str]:
    return [name for name, module in model.stock.build().named_modules() if isinstance(module, nn.Linear)]
