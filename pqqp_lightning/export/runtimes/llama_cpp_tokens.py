"""Token ids of texts by llama.cpp: python llama_cpp_tokens.py FILE texts.json ids.json."""

import ctypes as c
import json
import runpy
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def ids_of(library: Any, vocabulary: int, text: str) -> list[int]:
    """The token ids of ``text``, special tokens in it included, none added."""
    raw = text.encode()
    room = len(raw) + 8  # no text has more tokens than bytes
    ids = (c.c_int32 * room)()
    count = library.llama_tokenize(vocabulary, raw, len(raw), ids, room, False, True)
    return list(ids[: max(count, 0)])


def main(file: str, given: str, out: str) -> str:
    """Write the ids of each text as JSON, or null if llama.cpp does not load the file; returns xllamacpp's version."""
    texts = json.loads(Path(given).read_text(encoding="utf-8"))
    library = runpy.run_path(str(Path(__file__).with_name("llama_cpp_logits.py")))["load_library"]()
    library.llama_tokenize.restype = c.c_int32
    library.llama_tokenize.argtypes = [
        c.c_void_p,
        c.c_char_p,
        c.c_int32,
        c.POINTER(c.c_int32),
        c.c_int32,
        c.c_bool,
        c.c_bool,
    ]
    model = library.llama_model_load_from_file(file.encode(), library.llama_model_default_params())
    ids = None
    if model:
        vocabulary = library.llama_model_get_vocab(model)
        ids = [ids_of(library, vocabulary, text) for text in texts]
        library.llama_model_free(model)
    Path(out).write_text(json.dumps(ids), encoding="utf-8")
    return version("xllamacpp")


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
    assert "pqqp_lightning" not in sys.modules, "this check must run without pqqp_lightning"
