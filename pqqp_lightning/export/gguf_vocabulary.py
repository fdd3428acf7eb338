"""The tokenizer of a GGUF file: copied from another one, or made from transformers' and compared in llama.cpp.

llama.cpp knows ways of splitting text by name (``tokenizer.ggml.pre``), where a Hugging Face tokenizer holds a regular
expression. The name is found by trying: the one whose token ids agree on every hard text.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pqqp_lightning.export.hard_text import hard_texts
from pqqp_lightning.export.runtime_check import RuntimeFailed, tokens_of
from pqqp_lightning.export.target import Runtime
from pqqp_lightning.network.quiet import quiet_transformers

if TYPE_CHECKING:
    from gguf import GGUFValueType, GGUFWriter

PRE_TOKENIZERS = (
    "qwen2",
    "llama-bpe",
    "smollm",
    "gpt-2",
    "tekken",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "gpt-4o",
    "falcon",
    "starcoder",
    "command-r",
    "dbrx",
    "smaug-bpe",
    "viking",
    "poro-chat",
    "superbpe",
    "seed-coder",
    "default",
)
"""llama.cpp's names to try. One that splits more comes first: a vocabulary without tokens of several digits agrees with
ways that keep digits together, too."""
PRE = "tokenizer.ggml.pre"
SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
"""The tokens of single bytes in tokenizers like SentencePiece's."""
MARKED = 8
"""Added tokens to try inside of text."""


class NoVocabulary(Exception):
    """Why a tokenizer cannot be written, as the rest of a sentence that the run begins."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF files hold it.

    Attributes:
        entries: key to value, its type, and the type of an array's elements.
        size: how many tokens it has.
        compared: what was compared to choose it, as a sentence; empty if it was copied.
    """

    entries: Mapping[str, tuple[Any, GGUFValueType, GGUFValueType | None]]
    size: int
    compared: str = ""

    def with_entry(self, key: str, value: Any) -> Vocabulary:
        """The same with another text or truth value under ``key``."""
        from gguf import GGUFValueType

        return replace(self, entries={**self.entries, key: (value, GGUFValueType.get_type(value), None)})

    def write(self, writer: GGUFWriter) -> None:
        """Add every entry to a file."""
        for key, (value, kind, inner) in self.entries.items():
            writer.add_key_value(key, value, kind, sub_type=inner)


def read_vocabulary(file: Path) -> Vocabulary:
    """The tokenizer in a GGUF file, as it is."""
    from gguf import GGUFReader, GGUFValueType

    entries = {}
    for field in GGUFReader(file).fields.values():
        if field.name.startswith("tokenizer."):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            entries[field.name] = (field.contents(), field.types[0], inner)
    return Vocabulary(entries, len(entries["tokenizer.ggml.tokens"][0]))


def convert_tokenizer(folder: Path, rows: int, llama_cpp: Runtime) -> Vocabulary:
    """A transformers tokenizer as GGUF holds it, if llama.cpp gives the same tokens on every hard text.

    Args:
        folder: of the tokenizer.
        rows: of the embedding; unused ones get tokens without a meaning.
        llama_cpp: compares the tokens.

    Raises:
        NoVocabulary: llama.cpp has no such tokenizer, or none that agrees.
    """
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            description = json.loads(tokenizer.backend_tokenizer.to_str())
        except Exception as error:  # third-party code meets a damaged or exotic tokenizer
            raise NoVocabulary("has a tokenizer that cannot be read as a fast one of transformers") from error
    kind = description["model"]["type"]
    if kind != "BPE":
        raise NoVocabulary(f"has a {kind} tokenizer, and --to gguf writes BPE alone")
    if llama_cpp.missing():
        text = f"has a tokenizer that only llama.cpp can compare: pip install {llama_cpp.package}"
        raise NoVocabulary(text)
    plain = _plain_vocabulary(tokenizer, description, rows)
    marked = [added["content"] for added in description["added_tokens"]]
    texts = hard_texts(list(dict.fromkeys([*marked[: MARKED // 2], *marked[-MARKED // 2 :]])))
    wanted = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    for name, vocabulary in _candidates(plain, description):
        if _tokens_in_llama_cpp(vocabulary, texts, llama_cpp) == wanted:
            compared = f"llama.cpp's tokenizer '{name}' gives the same tokens as the run's on {len(texts)} hard texts."
            if description.get("normalizer") and not description["model"].get("byte_fallback"):
                compared += " llama.cpp does not normalize text first, as the run's does."
            return replace(vocabulary, compared=compared)
    raise NoVocabulary("has a tokenizer whose tokens differ from those of every kind that was tried in llama.cpp")


def _candidates(plain: Vocabulary, description: Mapping[str, Any]) -> Iterator[tuple[str, Vocabulary]]:
    """The ways of llama.cpp to split text that may be the tokenizer's, by name."""
    if description["model"].get("byte_fallback"):
        yield "llama", plain.with_entry(SPACE_PREFIX, True)
        yield "llama without a first space", plain.with_entry(SPACE_PREFIX, False)
        return
    for name in PRE_TOKENIZERS:
        yield name, plain.with_entry(PRE, name)


def _plain_vocabulary(tokenizer: Any, description: Mapping[str, Any], rows: int) -> Vocabulary:
    """Tokens, their types, merges or scores, and special tokens.

    Raises:
        NoVocabulary: there are more tokens than rows.
    """
    from gguf import GGUFValueType as Kind
    from gguf import TokenType

    tokens: list[str] = [f"[PAD{row}]" for row in range(rows)]
    types = [TokenType.UNUSED] * rows
    ids = tokenizer.get_vocab()
    if max(ids.values()) >= rows:
        raise NoVocabulary(f"has {max(ids.values()) + 1} tokens for {rows} embeddings")
    sentencepiece = bool(description["model"].get("byte_fallback"))
    for token, row in ids.items():
        tokens[row] = token
        types[row] = TokenType.BYTE if sentencepiece and token in BYTES else TokenType.NORMAL
    for added in description["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    merges = description["model"]["merges"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    entries: dict[str, tuple[Any, Kind, Kind | None]] = {
        "tokenizer.ggml.model": ("llama" if sentencepiece else "gpt2", Kind.STRING, None),
        "tokenizer.ggml.tokens": (tokens, Kind.ARRAY, Kind.STRING),
        "tokenizer.ggml.token_type": ([int(kind) for kind in types], Kind.ARRAY, Kind.INT32),
    }
    if sentencepiece:
        if tokenizer.unk_token_id is not None:
            entries["tokenizer.ggml.token_type"][0][tokenizer.unk_token_id] = int(TokenType.UNKNOWN)
        entries["tokenizer.ggml.scores"] = (_scores(tokens, pairs), Kind.ARRAY, Kind.FLOAT32)
    else:
        entries["tokenizer.ggml.merges"] = ([" ".join(pair) for pair in pairs], Kind.ARRAY, Kind.STRING)
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        row = getattr(tokenizer, f"{name}_token_id")
        if row is not None:
            entries[f"tokenizer.ggml.{key}_token_id"] = (row, Kind.UINT32, None)
    whole = tokenizer("a").input_ids
    bare = tokenizer("a", add_special_tokens=False).input_ids
    first_added = len(whole) > len(bare) and whole[0] == tokenizer.bos_token_id
    last_added = len(whole) > len(bare) and whole[-1] == tokenizer.eos_token_id
    entries["tokenizer.ggml.add_bos_token"] = (first_added, Kind.BOOL, None)
    entries["tokenizer.ggml.add_eos_token"] = (last_added, Kind.BOOL, None)
    if isinstance(tokenizer.chat_template, str):
        entries["tokenizer.chat_template"] = (tokenizer.chat_template, Kind.STRING, None)
    return Vocabulary(entries, rows)


def _scores(tokens: Sequence[str], pairs: Sequence[Sequence[str]]) -> list[float]:
    """What llama.cpp merges by, highest first: the place of a token's first merge, negative."""
    places: dict[str, int] = {}
    for place, pair in enumerate(pairs):
        places.setdefault("".join(pair), place)
    return [-float(places.get(token, 0)) for token in tokens]


def _tokens_in_llama_cpp(vocabulary: Vocabulary, texts: Sequence[str], llama_cpp: Runtime) -> list[list[int]] | None:
    """The tokens of every text; None if llama.cpp does not load such a vocabulary.

    The vocabulary travels in a model of one block of zeros, since llama.cpp's switch for a file without weights lies at
    another place in every version.
    """
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory(prefix="pqqp-export-") as folder:
        file = Path(folder) / "vocabulary.gguf"
        writer = GGUFWriter(file, "llama")
        width = 32
        writer.add_context_length(width)
        writer.add_embedding_length(width)
        writer.add_block_count(1)
        writer.add_feed_forward_length(width)
        writer.add_head_count(1)
        writer.add_layer_norm_rms_eps(1e-5)
        vocabulary.write(writer)
        writer.add_tensor("token_embd.weight", np.zeros((vocabulary.size, width), np.float16))
        for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
            writer.add_tensor(f"{norm}.weight", np.zeros(width, np.float32))
        for layer in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"blk.0.{layer}.weight", np.zeros((width, width), np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        try:
            return tokens_of(llama_cpp, file, texts)
        except RuntimeFailed:  # llama.cpp ends its process on some vocabularies
            return None
