"""Tokenizers that did not come from a GGUF file: llama.cpp gives the same tokens, or the export refuses."""

import importlib.util
import json
import shutil

import pytest
import tiny
from exports import checks_here, run_here, run_of  # noqa: F401  # a fixture
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pqqp_lightning.errors import RecipeError
from pqqp_lightning.export import gguf_vocabulary
from pqqp_lightning.export.export_run import export_run
from pqqp_lightning.export.gguf_vocabulary import NoVocabulary, convert_tokenizer
from pqqp_lightning.export.hard_text import HARD_TEXTS
from pqqp_lightning.export.targets.gguf import GGUF
from pqqp_lightning.models import CausalLM

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="the package xllamacpp is not installed"),
    pytest.mark.usefixtures("checks_here"),
]
ROWS = 1500
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = [*HARD_TEXTS * 3, "12345 6789 2024 1000000 345 " * 40, "I'LL IT'S don't it's we've " * 40, "\n\n\n \n  " * 40]


def split(pattern):
    """A pre-tokenizer of a regular expression, then bytes as characters."""
    splitter = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([splitter, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": lambda: split(CONTRACTIONS + r"\p{N}{1,3}" + REST),
    "qwen2": lambda: split(CONTRACTIONS + r"\p{N}" + REST),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


def wrap(tokenizer, **options):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options)


def byte_level(pre_tokenizer, folder):
    """A byte-level BPE tokenizer in ``folder``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - 100,
        special_tokens=["<s>", "</s>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    wrap(tokenizer, chat_template="{{ messages }}").save_pretrained(folder)
    return folder


def sentencepiece_like(folder, *, first_space):
    """A tokenizer like LLaMA 2's: words begin with a mark, and unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if first_space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *sorted(gguf_vocabulary.BYTES)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator([text.replace("日本語", "") for text in CORPUS], trainer)
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [added for added in description["added_tokens"] if added["id"] < 3]
    wrap(Tokenizer.from_str(json.dumps(description)), unk_token="<unk>").save_pretrained(folder)
    return folder


def entry(vocabulary, key):
    return vocabulary.entries[f"tokenizer.ggml.{key}"][0]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_the_way_of_splitting_text_is_found_by_its_tokens(name, tmp_path):
    vocabulary = convert_tokenizer(byte_level(PRE_TOKENIZERS[name](), tmp_path), ROWS, GGUF.runtime)
    assert entry(vocabulary, "pre") == name
    assert entry(vocabulary, "tokens")[ROWS - 1] == f"[PAD{ROWS - 1}]"
    assert [entry(vocabulary, "token_type")[row] for row in (0, 3, ROWS - 1)] == [3, 1, 5]
    assert entry(vocabulary, "bos_token_id") == 0
    assert entry(vocabulary, "add_bos_token") is False
    assert vocabulary.entries["tokenizer.chat_template"][0] == "{{ messages }}"
    assert f"tokenizer '{name}' gives the same tokens" in vocabulary.compared


@pytest.mark.parametrize("first_space", [True, False])
def test_a_tokenizer_like_sentencepieces_is_written_with_scores(first_space, tmp_path):
    folder = sentencepiece_like(tmp_path, first_space=first_space)
    vocabulary = convert_tokenizer(folder, ROWS, GGUF.runtime)
    assert entry(vocabulary, "model") == "llama"
    assert entry(vocabulary, "add_space_prefix") is first_space


def test_a_tokenizer_that_splits_in_its_own_way_is_refused(tmp_path):
    folder = byte_level(split(r"[aeiou]|\s+|[^\saeiou]+"), tmp_path)
    with pytest.raises(NoVocabulary, match="differ from those of every kind"):
        convert_tokenizer(folder, ROWS, GGUF.runtime)


def test_other_kinds_and_more_tokens_than_embeddings_are_refused(tmp_path):
    words = Tokenizer(models.WordPiece({"a": 0, "<s>": 1, "</s>": 2, "[UNK]": 3}))
    wrap(words).save_pretrained(tmp_path / "words")
    with pytest.raises(NoVocabulary, match="WordPiece"):
        convert_tokenizer(tmp_path / "words", ROWS, GGUF.runtime)
    folder = byte_level(PRE_TOKENIZERS["gpt-2"](), tmp_path / "bytes")
    with pytest.raises(NoVocabulary, match=r"tokens for 64 embeddings"):
        convert_tokenizer(folder, 64, GGUF.runtime)


def test_llama_cpp_reads_the_exported_tokenizer(tmp_path):
    """The whole way: a run with such a tokenizer, and the tokens of text in the exported file."""
    settings = tiny.LLAMA | {"vocab_size": ROWS}
    tiny.trainer(tmp_path / "run", max_epochs=0).fit(CausalLM(settings), datamodule=tiny.make_data("llama", tmp_path))
    folder = byte_level(PRE_TOKENIZERS["qwen2"](), tmp_path / "run" / "tokenizer")
    done = export_run(tmp_path / "run", to="gguf", out=tmp_path / "model.gguf")
    assert any("tokenizer 'qwen2' gives" in remark for remark in done.remarks)
    text = "Sold 12345 of them\n\n for $9.99, <|im_end|> WE'LL see"
    (tmp_path / "texts.json").write_text(json.dumps([text]))
    arguments = [tmp_path / "model.gguf", tmp_path / "texts.json", tmp_path / "ids.json"]
    run_here(type("Script", (), {"script": "llama_cpp_tokens.py"}), list(map(str, arguments)))
    wanted = PreTrainedTokenizerFast.from_pretrained(folder)(text).input_ids
    assert json.loads((tmp_path / "ids.json").read_text()) == [wanted]


def test_a_tokenizer_that_cannot_be_read_names_llama_cpps_converter(tmp_path):
    shutil.copytree(run_of("rtn4"), tmp_path / "run")
    (tmp_path / "run" / "tokenizer").mkdir()
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"cannot be read.*convert_hf_to_gguf\.py"):
        export_run(tmp_path / "run", to="gguf", out=tmp_path / "model.gguf")
