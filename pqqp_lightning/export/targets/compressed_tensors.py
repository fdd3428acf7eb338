"""The compressed-tensors format: packed integer codes, which vLLM and transformers load."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pqqp_lightning.algorithms.grid import Grid, encode
from pqqp_lightning.errors import Problem, shorten
from pqqp_lightning.export.grid_problems import codebook_problems, no_code_problems, scale_problems
from pqqp_lightning.export.grids import half_joined, in_groups, in_rows, wider_bits, with_zero_points
from pqqp_lightning.export.larger import finer_scales, wider_codes
from pqqp_lightning.export.stock_files import read_config, read_tensors, write_stock_folder
from pqqp_lightning.export.target import ExportedModel, Target
from pqqp_lightning.export.targets.hf import TRANSFORMERS
from pqqp_lightning.network.activation_hooks import QuantizeInput

FORMAT = "pack-quantized"
ROUNDED = "int-quantized"
"""Layers whose inputs are rounded while the model runs: codes of 8 bits, not packed, one scale for each row."""
SEVERAL = "mixed-precision"
INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
"""The library's arguments for inputs that are rounded to 8 bits with a scale for each token."""
WIDTHS = (4, 8)
"""Bits that vLLM's kernels read. The library packs others, too, in a way that changed between its versions."""
FAST_GROUPS = (32, 64, 128)
"""Groups that vLLM's kernels read, besides whole rows."""
ROUNDING_DIVERGENCE = 0.1
"""Mean KL divergence that counts as agreement where inputs are rounded: 127 / 127.5 of the scale rounds most of them to
another neighbour. SmolLM2-135M in 8 bits differs by 0.039, and without rounding by 0.034: this finds gross faults only.
The weights are compared bit for bit before.
"""
PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")
"""What a layer may hold; ``weight`` are codes that are not packed."""


class CompressedTensors(Target):
    """Codes, scales and zero points of quantized Linear layers as they are; everything else dense."""

    name = "compressed-tensors"
    summary = "packed codes with their scales, as vLLM and transformers load them"
    loading: ClassVar[dict[str, str]] = {
        "transformers": 'AutoModelForCausalLM.from_pretrained("{out}")  # needs pip install compressed-tensors',
        "vLLM": 'vllm serve "{out}"',
    }
    requires = ("compressed_tensors",)
    runtime = replace(
        TRANSFORMERS,
        package="compressed-tensors",
        modules=("transformers", "compressed_tensors"),
        rounding_divergence=ROUNDING_DIVERGENCE,
    )
    keeps_rounding = True

    def __init__(self) -> None:
        self.dequantize = False
        """Whether transformers shall always load dense weights; it then reads one setting for all layers alone."""

    def problems(self, model: ExportedModel) -> list[Problem]:
        problems = [*codebook_problems(model), *scale_problems(model), *no_code_problems(model)]
        problems += self._rounding_problems(model)
        if problems or not _has_several_settings(grids := _stored_grids(model)):
            return problems
        if any(grid.zero is not None for grid in grids.values()):
            text = "keeps zero points in several settings, of which transformers loads only one"
            problems.append(Problem("widen", False, text, "Use --widen true."))
        elif self.dequantize:
            text = "has layers in several settings, and transformers reads only one under adapters"
            problems.append(Problem("run", str(model.source.folder), text, "Use --base hf or gptq."))
        return problems

    def write(self, model: ExportedModel, folder: Path) -> None:
        tensors = {name: model.in_dtype(tensor) for name, tensor in model.stock.stored().items()}
        schemes: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for name, grid in _stored_grids(model).items():
            del tensors[f"{name}.weight"]
            weight = model.stock.weights[f"{name}.weight"]
            rounded = name in model.stock.rounding
            parts = (_unpacked if rounded else _packed)(weight, grid, model.torch_dtype)
            tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
            scheme = {"weights": _arguments(grid), "format": FORMAT}
            if rounded:
                scheme |= {"input_activations": INPUTS, "format": ROUNDED}
            schemes.setdefault(str(scheme), (scheme, []))[1].append(name)
        write_stock_folder(model, tensors, folder, self._config(model, list(schemes.values())))

    def decoded(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        return decompressed(read_config(folder)["quantization_config"], read_tensors(folder))

    def remarks(self, model: ExportedModel) -> list[str]:
        grids = model.stock.grids
        stored = _stored_grids(model)
        remarks = wider_codes(model.stock, {name: grid.bits for name, grid in stored.items()})
        groups = {name: grid.scale.shape[1] for name, grid in stored.items()}
        remarks += finer_scales(model.stock, groups, model.torch_dtype.itemsize)
        linear = model.stock.linear_layers()
        if dense := [name for name in linear if name not in grids and name != "lm_head"]:
            remarks.append(f"{shorten(dense)} without codes stay dense ({model.dtype}).")
        if half := half_joined(stored, linear):
            remarks.append(f"vLLM joins {shorten(half)} with quantized layers, so that it does not load this folder.")
        if slow := [name for name, grid in stored.items() if not _has_kernel(grid)]:
            remarks.append(f"vLLM has no kernel for the bits or groups of {shorten(slow)}; transformers loads them.")
        if model.stock.rounding:
            what = f"The inputs of {shorten(model.stock.rounding)} are rounded to 8 bits"
            remarks.append(f"{what}: transformers divides a token's largest value by 127.5, the run and vLLM by 127.")
        return remarks

    def _rounding_problems(self, model: ExportedModel) -> list[Problem]:
        """What keeps the rounding of inputs from being written."""
        run = str(model.source.folder)
        rounding = model.stock.rounding
        grids = {name: grid for name, grid in model.stock.grids.items() if name in rounding}
        problems = []
        if other := [name for name, transform in rounding.items() if not _is_plain(transform)]:
            text = f"rounds the inputs of {shorten(other)} not to 8 bits, or with zero points, clip or outliers"
            way_out = "Use ActivationQuantization with its defaults, and run it again."
            problems.append(Problem("run", run, text, way_out))
        if dense := [name for name in rounding if name not in grids]:
            text = f"rounds the inputs of {shorten(dense)} without codes, which this format leaves alone"
            way_out = "Quantize these layers too, or add them to ignore of ActivationQuantization, and run it again."
            problems.append(Problem("run", run, text, way_out))
        if grouped := [name for name, grid in grids.items() if grid.scale.shape[1] > 1]:
            text = f"rounds the inputs of {shorten(grouped)} with scales for groups of columns, which no kernel reads"
            problems.append(Problem("run", run, text, "Quantize without group_size, and run it again."))
        if asymmetric := [name for name, grid in grids.items() if grid.zero is not None]:
            text = f"rounds the inputs of {shorten(asymmetric)} with zero points, which no kernel reads"
            problems.append(Problem("run", run, text, "Quantize with symmetric: true, and run it again."))
        if not model.widen and (narrow := [name for name, grid in grids.items() if grid.bits != 8]):
            text = f"leaves {shorten(narrow)} in bits that no kernel reads with rounded inputs"
            problems.append(Problem("widen", False, text, "Use --widen true."))
        if rounding and self.dequantize:
            text = f"rounds the inputs of {shorten(rounding)}, which transformers leaves out under adapters"
            problems.append(Problem("run", run, text, "Leave ActivationQuantization out, and run it again."))
        return problems

    def _config(self, model: ExportedModel, schemes: list[tuple[dict[str, Any], list[str]]]) -> dict[str, Any]:
        """The ``quantization_config`` of config.json."""
        from compressed_tensors.quantization import (
            QuantizationConfig,
            QuantizationScheme,
            QuantizationStatus,
        )

        groups: dict[str, QuantizationScheme | list[str]] = {}
        quantized = set()
        for number, (scheme, names) in enumerate(schemes):
            targets = ["Linear"] if len(schemes) == 1 else names
            groups[f"group_{number}"] = QuantizationScheme(targets=targets, **scheme)
            quantized.update(names)
        formats = {scheme["format"] for scheme, _ in schemes}
        config = QuantizationConfig(
            config_groups=groups,
            ignore=[name for name in model.stock.linear_layers() if name not in quantized],
            format=formats.pop() if len(formats) == 1 else SEVERAL,
            quantization_status=QuantizationStatus.COMPRESSED,
        )
        settings = {"quant_method": "compressed-tensors", **config.model_dump(mode="json", exclude_none=True)}
        if self.dequantize or any(not scheme["weights"]["symmetric"] for scheme, _ in schemes):
            settings["dequantize"] = True  # transformers loads zero points in no other way
        return settings


def decompressed(
    settings: dict[str, Any], tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder of this format, decoded by its library.

    Args:
        settings: the ``quantization_config`` of config.json.
        tensors: by name, as the files hold them.
        dtype: to decode in; None for that of the scales, as the library does.

    Raises:
        ValueError: the settings say nothing about a layer that has codes.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import is_match

    own = {key: value for key, value in settings.items() if key != "dequantize"}  # that one is transformers'
    config = QuantizationConfig.model_validate(own)
    held = dict(tensors)
    layers = [name.removesuffix(".weight_scale") for name in held if name.endswith(".weight_scale")]
    linear = nn.Linear(1, 1, device="meta")  # targets may name the kind of a layer
    for layer in layers:
        parts = {part: held.pop(f"{layer}.{part}") for part in PARTS if f"{layer}.{part}" in held}
        if dtype is not None:
            parts["weight_scale"] = parts["weight_scale"].to(dtype)
        scheme = next((s for s in config.config_groups.values() if is_match(layer, linear, s.targets)), None)
        if scheme is None:
            raise ValueError(f"no group of settings names {layer}")
        compressor = BaseCompressor.get_value_from_registry(scheme.format or config.format)
        yield f"{layer}.weight", compressor.decompress(parts, scheme)["weight"]
    yield from held.items()


def _stored_grids(model: ExportedModel) -> dict[str, Grid]:
    """The grid that is written for each quantized layer: as it is, or widened."""
    grids = dict(model.stock.grids)
    if model.widen:
        bits = wider_bits(grids, WIDTHS) | {name: 8 for name in grids if name in model.stock.rounding}
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


def _is_plain(transform: QuantizeInput) -> bool:
    """Whether inputs are rounded as :data:`INPUTS` says."""
    return transform.bits == 8 and transform.options == {"symmetric": True, "clip": 1.0, "outliers": None}


def _has_several_settings(grids: dict[str, Grid]) -> bool:
    return len({str(_arguments(grid)) for grid in grids.values()}) > 1


def _has_kernel(grid: Grid) -> bool:
    """Whether vLLM's kernels read it."""
    return grid.bits in WIDTHS and (grid.scale.shape[1] == 1 or grid.group_size in FAST_GROUPS)


def _packed(weight: Tensor, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer; ``weight`` lies on ``grid``."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    parts = {
        "weight_packed": pack_to_int32(_signed(weight, grid), grid.bits),
        "weight_scale": grid.scale.to(dtype),
        "weight_shape": torch.tensor(weight.shape),
    }
    if grid.zero is not None:
        zero = (grid.zero.to(torch.int16) - grid.middle).to(torch.int8)
        parts["weight_zero_point"] = pack_to_int32(zero, grid.bits, packed_dim=0)
    return parts


def _unpacked(weight: Tensor, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer whose inputs are rounded; ``weight`` lies on ``grid``, which has 8 bits."""
    return {"weight": _signed(weight, grid), "weight_scale": grid.scale.to(dtype)}


def _signed(weight: Tensor, grid: Grid) -> Tensor:
    """The codes of a weight around 0: int8 [O, I]."""
    return (encode(weight, grid).to(torch.int16) - grid.middle).to(torch.int8)


def _arguments(grid: Grid) -> dict[str, Any]:
    """The arguments of the library's ``QuantizationArgs``."""
    arguments = {"num_bits": grid.bits, "type": "int", "symmetric": grid.zero is None, "strategy": "channel"}
    if grid.scale.shape[1] > 1:
        arguments |= {"strategy": "group", "group_size": grid.group_size}
    return arguments
