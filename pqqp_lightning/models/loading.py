"""Loads language models and tokenizers from a hub id, a local folder or a GGUF file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from pqqp_lightning.errors import Problem, RecipeError, near_miss
from pqqp_lightning.models import packed_folders
from pqqp_lightning.models.transformers_bridge import check_loading, third_party_errors
from pqqp_lightning.network.free_memory import free_memory
from pqqp_lightning.network.quiet import quiet_transformers
from pqqp_lightning.storage.run_folder import check_run_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    # For modules whose classes recipes name: jsonargparse imports what such a module imports for its types alone.
    Tokenizer = Any

BUNDLED = "smollm2-135m"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
MODEL = "model.model"
"""The setting that says where the model comes from."""
OFFLINE_WAYS_OUT = "Give a local folder (./my-model) or a .gguf file, or go online with HF_HUB_OFFLINE unset."


def is_path(value: str) -> bool:
    """Whether ``value`` names a file or folder on this machine, not an id on the hub."""
    looks_local = value.startswith(("./", "../", "/", "~", ".\\")) or value in (".", "..")
    return looks_local or value.endswith(".gguf") or Path(value).exists()


def resolve_source(source: str, key: str = MODEL) -> str:
    """Turn ``source`` into a hub id or a local folder; a GGUF file is converted into a cached folder.

    Raises:
        RecipeError: about the setting ``key``: the file or folder does not exist or is of another kind.
    """
    from pqqp_lightning.models import gguf

    if not source.strip():
        raise RecipeError(_problem(key, source, "is empty", f"Give a hub id, a folder or {BUNDLED}."))
    if source == BUNDLED:
        return str(gguf.convert(gguf.find_bundled()))
    if not is_path(source):
        return source
    path = Path(source).expanduser()
    if not path.exists():
        raise RecipeError(_problem(key, source, f"does not exist (looked at {path.absolute()})"))
    if path.is_file():
        if path.suffix != ".gguf":
            way_out = "Give the folder that holds config.json, or a .gguf file."
            raise RecipeError(_problem(key, source, "is a file", way_out))
        return str(gguf.convert(path))
    return str(path)


def load_model(source: str, dtype: torch.dtype, *, as_stored: bool = False) -> PreTrainedModel:
    """Load a model from a folder or hub id; every weight is read, none is initialised.

    Codes of compressed-tensors or the GPTQ format are decoded: the model is dense.

    Args:
        source: a folder or hub id.
        dtype: of the weights.
        as_stored: leave weights in the dtype of their files, from which they are then mapped instead of read.

    Raises:
        RecipeError: the model cannot be read, is quantized in another way, needs remote code, or its weights do not fit
            its configuration.
    """
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    with quiet_transformers(), third_party_errors(_unreadable(MODEL, source, "model")):
        config = _read_config(source)
        if settings := packed_folders.settings_of(config):
            folder = _local_copy(source)
            rank_zero_info(f"{source}: its codes ({settings['quant_method']}) are decoded; the model is dense here.")
            model, info = packed_folders.load_packed(folder, config, settings, dtype)
        else:
            model, info = loader.from_pretrained(
                source,
                config=config,
                dtype="auto" if as_stored else dtype,
                output_loading_info=True,
                trust_remote_code=False,
            )
        check_loading(source, info)
    return model


def fits_in_memory(source: str, dtype: torch.dtype) -> bool:
    """Whether a model's weights can be converted to ``dtype`` in memory; those stored in it take none."""
    free = free_memory()
    if free is None or not is_path(source):
        return True
    with quiet_transformers(), third_party_errors(_unreadable(MODEL, source, "model")):
        stored = getattr(_read_config(source), "dtype", None) or dtype
    file_bytes = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
    return stored == dtype or file_bytes / stored.itemsize * dtype.itemsize <= free


def load_tokenizer(source: str, key: str = MODEL) -> Tokenizer:
    """Load the tokenizer of a hub id, folder, GGUF file or the bundled model."""
    from transformers import AutoTokenizer

    folder = resolve_source(source, key)
    # transformers' own message for a folder without a tokenizer suggests to look on the hub.
    if is_path(folder) and not any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES):
        raise RecipeError(_problem(key, source, "is a folder without a tokenizer", "Name one in data.tokenizer."))
    with quiet_transformers(), third_party_errors(_unreadable(key, source, "tokenizer")):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def save_tokenizer(source: str | None, folder: Path) -> None:
    """Write the tokenizer of ``source`` into ``folder``, with the vocabulary of a GGUF file as it is there.

    Args:
        source: as in :func:`load_tokenizer`; None for no tokenizer.
        folder: stays empty if ``source`` has no tokenizer.
    """
    from pqqp_lightning.models import gguf

    if source is None:
        return
    try:
        tokenizer = load_tokenizer(source)
    except RecipeError:  # the model is useful without it
        return
    tokenizer.save_pretrained(folder)
    if source == BUNDLED:
        gguf.save_vocabulary(gguf.find_bundled(), folder)
    elif source.endswith(".gguf"):
        gguf.save_vocabulary(Path(source).expanduser(), folder)


def _problem(key: str, source: str, text: str, way_out: str = "") -> Problem:
    section, _, argument = key.partition(".")
    return Problem(argument, source, text, way_out).within(section)


def _unreadable(key: str, source: str, what: str) -> Problem:
    subject = "" if what == "model" else f"has a {what} that "
    if is_path(source):
        return _problem(key, source, f"{subject}cannot be read", "Save or download it again, or name another.")
    known = near_miss(source, [BUNDLED]) if "/" not in source else ""
    parent = Path(source).parent
    if "/" in source and parent.is_dir():  # more likely a folder here than an id of the hub
        known = near_miss(source, [str(path) for path in parent.iterdir()], cutoff=0.8)
    return _problem(key, source, f"{subject}cannot be loaded from the hub", f"{OFFLINE_WAYS_OUT}{known}")


def _read_config(source: str) -> PretrainedConfig:
    from transformers import AutoConfig

    if is_path(source) and (Path(source) / "adapter_config.json").is_file():
        way_out = "Name its model, or export the run with --to hf, which adds the adapter to the weights."
        raise RecipeError(_problem(MODEL, source, "is an adapter without its model", way_out))
    if is_path(source) and not (Path(source) / "config.json").is_file():
        way_out = "Give a folder that save_pretrained wrote, or a .gguf file."
        if not check_run_folder(Path(source)):
            way_out = f"It is a run: pqqp-lightning export {source} --to hf --out FOLDER, and give that folder."
        raise RecipeError(_problem(MODEL, source, "is a folder without config.json", way_out))
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    settings = packed_folders.settings_of(config)
    if settings and (problems := packed_folders.check_packed(settings)):
        raise RecipeError(replace(p, key="model", value=source).within("model") for p in problems)
    return config


def _local_copy(source: str) -> Path:
    """The folder of a model, downloaded if ``source`` is an id on the hub."""
    if is_path(source):
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
