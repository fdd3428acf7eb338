"""Loads language models and tokenizers from a hub id, a local folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pqqp_lightning.errors import RecipeError, suggest
from pqqp_lightning.models.transformers_bridge import check_loading, quiet_transformers, third_party_errors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BUNDLED = "smollm2-135m"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
OFFLINE_WAYS_OUT = "Give a local folder (./my-model) or a .gguf file, or go online with HF_HUB_OFFLINE unset."


def is_path(value: str) -> bool:
    """Whether ``value`` names a file or folder on this machine, not an id on the hub."""
    looks_local = value.startswith(("./", "../", "/", "~", ".\\")) or value in (".", "..")
    return looks_local or value.endswith(".gguf") or Path(value).exists()


def resolve_source(source: str, argument: str = "model") -> str:
    """Turn ``source`` into a hub id or a local folder; a GGUF file is converted into a cached folder.

    Raises:
        RecipeError: the file or folder does not exist or is of another kind; ``argument`` is named.
    """
    from pqqp_lightning.models import gguf

    if source == BUNDLED:
        return str(gguf.convert(gguf.find_bundled()))
    if not is_path(source):
        return source
    path = Path(source).expanduser()
    if not path.exists():
        raise RecipeError(f"{argument}={source!r}: there is no such file or folder (looked at {path.absolute()}).")
    if path.is_file():
        if path.suffix != ".gguf":
            raise RecipeError(
                f"{argument}={source!r} is a file. Give the folder that holds config.json, or a .gguf file."
            )
        return str(gguf.convert(path))
    return str(path)


def load_model(source: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model from a folder or hub id; every weight is read, none is initialised.

    Raises:
        RecipeError: the model cannot be read, is already quantized, needs remote code, or its weights do not fit its
            configuration.
    """
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    with quiet_transformers(), third_party_errors(*_loading_problem(source, "model")):
        config = _read_config(source)
        model, info = loader.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
        check_loading(source, info)
    return model


def load_tokenizer(source: str, argument: str = "model") -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub id, folder, GGUF file or the bundled model."""
    from transformers import AutoTokenizer

    folder = resolve_source(source, argument)
    # transformers' own message for a folder without a tokenizer suggests to look on the hub.
    if is_path(folder) and not any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES):
        raise RecipeError(f"{argument}={source!r}: the folder holds no tokenizer. Name one in data.tokenizer.")
    with quiet_transformers(), third_party_errors(*_loading_problem(source, argument, "tokenizer")):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _loading_problem(source: str, argument: str, what: str = "model") -> tuple[str, str]:
    """What to say, and the way out, if ``source`` does not load."""
    if is_path(source):
        return f"{argument}={source!r}: the {what} cannot be read", "Save or download it again, or name another."
    known = suggest(source, [BUNDLED]) if "/" not in source else ""
    return f"{argument}={source!r}: the {what} cannot be loaded from the hub", f"{OFFLINE_WAYS_OUT}{known}".strip()


def _read_config(source: str) -> PretrainedConfig:
    from transformers import AutoConfig

    if is_path(source) and not (Path(source) / "config.json").is_file():
        raise RecipeError(
            f"model={source!r}: the folder has no config.json. Give one that save_pretrained wrote, or a .gguf file."
        )
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = getattr(quantization, "quant_method", None) or dict(quantization).get("quant_method", "unknown")
        raise RecipeError(
            f"model={source!r} is already quantized ({method}). Start from the original weights, and quantize here."
        )
    return config
