"""Logits of a GGUF file by llama.cpp: python llama_cpp_logits.py FILE-OR-FOLDER ids.npy logits.npy.

The wheel xllamacpp exports llama.cpp's C interface. Parameter structs are only handed on, as blobs that are larger than
they are, except for the first three numbers of the context's: n_ctx, n_batch, n_ubatch.
"""

import ctypes as c
import importlib.util
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


class Blob(c.Structure):
    """A parameter struct of unknown layout, at most 1 KiB."""

    _fields_ = [("numbers", c.c_uint32 * 256)]


class Batch(c.Structure):
    """llama_batch of llama.h."""

    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_model_default_params": (Blob, []),
    "llama_context_default_params": (Blob, []),
    "llama_model_load_from_file": (c.c_void_p, [c.c_char_p, Blob]),
    "llama_init_from_model": (c.c_void_p, [c.c_void_p, Blob]),
    "llama_set_n_threads": (None, [c.c_void_p, c.c_int32, c.c_int32]),
    "llama_batch_init": (Batch, [c.c_int32, c.c_int32, c.c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c.c_int32, [c.c_void_p, Batch]),
    "llama_get_logits": (c.POINTER(c.c_float), [c.c_void_p]),
    "llama_model_get_vocab": (c.c_void_p, [c.c_void_p]),
    "llama_vocab_n_tokens": (c.c_int32, [c.c_void_p]),
    "llama_free": (None, [c.c_void_p]),
    "llama_model_free": (None, [c.c_void_p]),
}
ERROR = 4
"""The level of llama.cpp's error messages."""


def load_library() -> Any:
    """llama.cpp, which writes errors alone."""
    import xllamacpp  # noqa: F401  # loads the libraries that the next one needs

    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None
    folder = next(iter(spec.submodule_search_locations or []))
    library: Any = c.CDLL(str(next(Path(folder).glob("xllamacpp*.so"))))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments

    def log(level: int, text: bytes, _: Any) -> None:
        if level == ERROR:
            sys.stderr.write(text.decode(errors="replace"))

    library.kept = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(log)  # ctypes does not keep it alive
    library.llama_log_set(library.kept, None)
    library.llama_backend_init()
    return library


def logits_of(library: Any, model: int, row: np.ndarray) -> np.ndarray:
    """Logits [T, V] of the tokens ``row`` [T]."""
    length = len(row)
    parameters = library.llama_context_default_params()
    for position in range(3):
        parameters.numbers[position] = max(512, length)
    context = library.llama_init_from_model(model, parameters)
    threads = os.cpu_count() or 1
    library.llama_set_n_threads(context, threads, threads)
    batch = library.llama_batch_init(length, 0, 1)
    batch.n_tokens = length
    for position, token in enumerate(row):
        batch.token[position] = int(token)
        batch.pos[position] = position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = 1
    if library.llama_decode(context, batch):
        sys.exit("llama.cpp cannot run the model")
    vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    logits = np.ctypeslib.as_array(library.llama_get_logits(context), shape=(length, vocabulary)).copy()
    library.llama_batch_free(batch)
    library.llama_free(context)
    return logits


def main(path: str, given: str, out: str) -> str:
    """Write the logits [B, T, V] in float32; returns the version of xllamacpp."""
    file = path if os.path.isfile(path) else str(next(Path(path).glob("*.gguf")))
    ids = np.load(given)
    library = load_library()
    model = library.llama_model_load_from_file(file.encode(), library.llama_model_default_params())
    if not model:
        sys.exit("llama.cpp does not load the file")
    written = None
    for index, row in enumerate(ids):
        logits = logits_of(library, model, row)
        if written is None:
            written = np.lib.format.open_memmap(out, "w+", np.float32, (len(ids), *logits.shape))
        written[index] = logits
    library.llama_model_free(model)
    return version("xllamacpp")


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
    assert "pqqp_lightning" not in sys.modules, "this check must load the model without pqqp_lightning"
