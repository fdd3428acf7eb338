"""Language models whose folders hold codes: the weights are decoded once, when the model is loaded.

Folders of compressed-tensors (``--to compressed-tensors``, llm-compressor) are decoded with the library of that name,
those of the GPTQ format (``--to gptq``, GPTQModel) here. transformers' own loading keeps the codes in layers of another
kind, and reads zero points in one setting for all layers alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pqqp_lightning.errors import Problem
from pqqp_lightning.export.stock_files import read_tensors
from pqqp_lightning.export.target import EXTRA
from pqqp_lightning.export.targets.compressed_tensors import decompressed
from pqqp_lightning.export.targets.gptq import WIDTHS, unpacked

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DENSE = "Start from the original weights, and quantize here."
METHOD = "quant_method"


def settings_of(config: PretrainedConfig) -> dict[str, Any]:
    """The ``quantization_config`` of a configuration as plain data; empty for a dense model."""
    settings = getattr(config, "quantization_config", None) or {}
    return settings if isinstance(settings, dict) else settings.to_dict()


def check_packed(settings: dict[str, Any]) -> list[Problem]:
    """Why a folder with these settings cannot be decoded; the caller adds the setting that names it."""
    method = str(settings.get(METHOD, "unknown"))
    if method == "compressed-tensors":
        return _check_compressed_tensors(settings)
    if method == "gptq":
        return _check_gptq(settings)
    known = " and ".join(READERS)
    text = f"is already quantized ({method}), and only {known} are decoded"
    return [Problem(text=text, way_out=DENSE)]


def load_packed(
    folder: Path, config: PretrainedConfig, settings: dict[str, Any], dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Build the dense model that a folder of codes stands for.

    Args:
        folder: with config.json and safetensors.
        config: of the folder; its quantization settings are removed.
        settings: these settings, which :func:`check_packed` accepts.
        dtype: of the weights; they are decoded in float32 first.

    Returns:
        The model, and what transformers says about missing and unexpected weights.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

    del config.quantization_config
    weights = {name: tensor.to(dtype) for name, tensor in READERS[settings[METHOD]](settings, read_tensors(folder))}
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, info


def _check_compressed_tensors(settings: dict[str, Any]) -> list[Problem]:
    if importlib.util.find_spec("compressed_tensors") is None:
        text = "holds codes of compressed-tensors, which is not installed"
        return [Problem(text=text, way_out=f"Install it: {EXTRA}.")]
    problems = []
    groups = (settings.get("config_groups") or {}).values()
    if any(group.get("input_activations") or group.get("output_activations") for group in groups):
        text = "rounds activations while it runs, which is not done here"
        problems.append(Problem(text=text, way_out=f"{DENSE} The stage ActivationQuantization rounds activations."))
    if settings.get("kv_cache_scheme"):
        problems.append(Problem(text="rounds keys and values while it runs, which is not done here", way_out=DENSE))
    if (settings.get("transform_config") or {}).get("config_groups"):
        problems.append(Problem(text="rotates activations while it runs, which is not done here", way_out=DENSE))
    return problems


def _check_gptq(settings: dict[str, Any]) -> list[Problem]:
    problems = []
    version = settings.get("checkpoint_format", "gptq")
    if version != "gptq":
        problems.append(Problem(text=f"has codes in the format {version}, and only gptq is decoded", way_out=DENSE))
    rules = (settings.get("dynamic") or {}).values()
    widths = {settings.get("bits"), *(rule["bits"] for rule in rules if "bits" in rule)}
    if odd := sorted(str(width) for width in widths if width not in WIDTHS):
        problems.append(
            Problem(text=f"has codes of {', '.join(odd)} bits, and only 4 and 8 are decoded", way_out=DENSE)
        )
    return problems


def _decompressed_in_float32(
    settings: dict[str, Any], tensors: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    return decompressed(settings, tensors, torch.float32)


Reader = Callable[[dict[str, Any], Iterator[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]]
READERS: dict[str, Reader] = {"compressed-tensors": _decompressed_in_float32, "gptq": unpacked}
"""What decodes the tensors of a folder, by the method that its configuration names."""
