"""The compressed-tensors format: packed integer codes, which vLLM and transformers load."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pqqp_lightning.algorithms.grid import Grid
from pqqp_lightning.errors import Problem, shorten
from pqqp_lightning.export.grids import Codes, codes_of, fused_with, wider_bits
from pqqp_lightning.export.stock_files import read_config, read_tensors, write_stock_folder
from pqqp_lightning.export.target import ExportedModel, Runtime, Target
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
    runtime = Runtime(
        name="transformers",
        package="compressed-tensors",
        modules=("transformers", "compressed_tensors"),
        script=TRANSFORMERS.script,
        largest_divergence=TRANSFORMERS.largest_divergence,
    )

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
        elif not problems and _needs_one_setting(self._codes(model)):
            text = "keeps zero points in several settings, of which transformers loads only one"
            problems.append(Problem("widen", False, text, "Use --widen true."))
        return problems

    def write(self, model: ExportedModel, folder: Path) -> None:
        tensors = {name: model.in_dtype(tensor) for name, tensor in model.stock.stored().items()}
        schemes: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for name, codes in self._codes(model).items():
            del tensors[f"{name}.weight"]
            tensors.update({f"{name}.{part}": tensor for part, tensor in _packed(codes, model.torch_dtype).items()})
            arguments = _arguments(codes.grid)
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
        codes = self._codes(model)
        remarks = []
        if wider := [name for name, grid in grids.items() if codes[name].grid.bits != grid.bits]:
            remarks.append(f"The codes of {shorten(wider)} are stored in more bits; no value changes.")
        if finer := [name for name, grid in grids.items() if codes[name].grid.scale.shape[1] != grid.scale.shape[1]]:
            remarks.append(f"The scales of {shorten(finer)} are repeated for smaller groups; no value changes.")
        linear = _linear_layers(model)
        if dense := [name for name in linear if name not in grids and name != "lm_head"]:
            remarks.append(f"{shorten(dense)} without codes stay dense ({model.dtype}).")
        if half := _half_joined(codes, linear):
            remarks.append(f"vLLM joins {shorten(half)} with quantized layers, so that it does not load this folder.")
        other_bits = [name for name, c in codes.items() if c.grid.bits not in WIDTHS]
        groups = {name: c.grid.group_size for name, c in codes.items() if c.grid.scale.shape[1] > 1}
        other_groups = [name for name, size in groups.items() if size not in FAST_GROUPS]
        if slow := [name for name in codes if name in other_bits or name in other_groups]:
            remarks.append(f"vLLM has no kernel for the bits or groups of {shorten(slow)}; transformers loads them.")
        return remarks

    def _codes(self, model: ExportedModel) -> dict[str, Codes]:
        """What is stored for each quantized layer."""
        grids = model.stock.grids
        codes = {name: codes_of(model.stock.weights[f"{name}.weight"], grid) for name, grid in grids.items()}
        if model.widen:
            bits = wider_bits(grids, WIDTHS)
            codes = {name: c.in_bits(bits[name]) for name, c in codes.items()}
            codes = _alike(codes)
        return {name: c.in_rows() for name, c in codes.items()}

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


def _alike(codes: dict[str, Codes]) -> dict[str, Codes]:
    """The same codes in one setting for all layers, if there are zero points.

    transformers reads zero points with one setting for all layers alone: the most bits, the smallest groups.
    """
    if all(c.grid.zero is None for c in codes.values()):
        return codes
    bits = max(c.grid.bits for c in codes.values())
    sizes = [c.grid.group_size for c in codes.values()]
    size = math.gcd(*sizes)  # equals the columns if all layers have whole rows and one width
    per_row = all(c.grid.scale.shape[1] == 1 for c in codes.values())
    alike = {}
    for name, c in codes.items():
        repeated = c if per_row else c.in_groups(c.grid.columns // size)
        alike[name] = repeated.with_zero_points().in_bits(bits)
    return alike


def _needs_one_setting(codes: dict[str, Codes]) -> bool:
    """Whether there are zero points and several settings."""
    settings = {str(_arguments(c.grid)) for c in codes.values()}
    return len(settings) > 1 and any(c.grid.zero is not None for c in codes.values())


def _half_joined(codes: dict[str, Codes], linear: list[str]) -> list[str]:
    """The dense layers that servers join with quantized ones."""
    return [name for name in linear if name not in codes and any(n in codes for n in fused_with(name, linear))]


def _packed(codes: Codes, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    grid = codes.grid
    middle = 1 << (grid.bits - 1)
    signed = (codes.codes.to(torch.int16) - middle).to(torch.int8)
    parts = {
        "weight_packed": pack_to_int32(signed, grid.bits),
        "weight_scale": grid.scale.to(dtype),
        "weight_shape": torch.tensor(codes.codes.shape),
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
