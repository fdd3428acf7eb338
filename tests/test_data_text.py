"""Text from Python's documentation, files, parquet folders and the hub, cut into windows."""

import os
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pqqp_lightning.data import TextData, tokenizing
from pqqp_lightning.data import text_sources as corpora
from pqqp_lightning.data.tokenizing import begins_with_bos, token_ids
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.models import CausalLM
from pqqp_lightning.models.loading import load_tokenizer

PQQP_DATA = Path(os.environ.get("PQQP_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class Bytes:
    """A tokenizer of UTF-8 bytes, which has no special tokens."""

    bos_token_id = None

    def __call__(self, text, add_special_tokens=True):
        if isinstance(text, list):
            return {"input_ids": [self(one, add_special_tokens)["input_ids"] for one in text]}
        first = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": first + list(text.encode())}


class BytesWithBos(Bytes):
    """Puts 256 in front of a text."""

    bos_token_id = 256


class Model:
    """What the data sees of a CausalLM."""

    tokenizer = Bytes()
    vocabulary_size = 257
    longest_sequence = 2048


def attach(module, model=None):
    module.trainer = SimpleNamespace(lightning_module=model or Model())
    return module


def gather(loader):
    return torch.cat([batch["input_ids"] for batch in loader])


def text_of(loader):
    return bytes(gather(loader).flatten().tolist())


@pytest.fixture
def parquet(tmp_path):
    folder = tmp_path / "set" / "plain"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": ["one two three", "", "four five"]}), folder / "train-00000-of-00002.parquet")
    pq.write_table(pa.table({"text": ["six seven"]}), folder / "train-00001-of-00002.parquet")
    pq.write_table(pa.table({"text": ["eight", "nine"], "number": [1, 2]}), folder / "test-00000-of-00001.parquet")
    return tmp_path / "set"


def test_rows_are_joined_by_blank_lines_and_cut_without_special_tokens(parquet):
    module = attach(TextData(str(parquet), sequence_length=4, calibration_samples=2))
    assert module.check() == []
    module.prepare_data()
    module.setup("validate")
    assert text_of(module.val_dataloader()) == b"eight\n\nnine"[:8]
    windows = gather(module.train_dataloader())
    joined = b"one two three\n\n\n\nfour five\n\nsix seven"
    assert sorted(bytes(row.tolist()) for row in windows) == sorted(joined[n : n + 4] for n in range(0, 36, 4))


@pytest.mark.parametrize("place", [".", "plain"])
def test_a_folder_is_found_by_its_configuration_or_alone(parquet, place):
    for name in (None, "plain") if place == "." else (None,):
        module = attach(TextData(str(parquet / place), name, sequence_length=2))
        module.setup("validate")
        assert len(module.val_dataloader()) == 5


def test_part_of_a_split_can_be_named(parquet):
    module = attach(TextData(str(parquet), sequence_length=2, evaluation_split="test[:50%]"))
    module.setup("validate")
    assert text_of(module.val_dataloader()) == b"eigh"


def test_the_held_out_topics_share_no_paragraph_with_the_others():
    evaluation, training = corpora.read_python_docs(True), corpora.read_python_docs(False)
    shared = {p.strip() for p in evaluation.split("\n\n")} & {p.strip() for p in training.split("\n\n")}
    assert shared <= {""}
    assert len(evaluation) > 20_000
    assert len(training) > 5 * len(evaluation)
    assert corpora.read_python_docs(True) == evaluation


def test_python_docs_need_nothing_else():
    module = attach(TextData(sequence_length=64, calibration_samples=5, evaluation_samples=7, seed=3))
    module.prepare_data()
    module.setup("validate")
    assert gather(module.val_dataloader()).shape == (7, 64)
    calibration = gather(module.calibration_dataloader())
    assert calibration.shape == (5, 64)
    again = attach(TextData(sequence_length=64, calibration_samples=5, seed=3))
    assert torch.equal(gather(again.calibration_dataloader()), calibration)
    other = attach(TextData(sequence_length=64, calibration_samples=5, seed=4))
    assert not torch.equal(gather(other.calibration_dataloader()), calibration)
    assert len({tuple(row) for row in calibration.tolist()}) == 5


def test_setup_reads_once(monkeypatch):
    module = attach(TextData(sequence_length=64))
    module.setup("fit")
    monkeypatch.setattr(corpora, "read_python_docs", lambda _: pytest.fail("read again"))
    module.setup("fit")
    module.setup("validate")
    module.train_dataloader()


def test_the_last_tenth_of_text_files_is_for_evaluation(tmp_path):
    lines = [f"line {n:04d}\n" for n in range(200)]
    (tmp_path / "a.txt").write_text("".join(lines[:100]))
    (tmp_path / "b.txt").write_text("".join(lines[100:]))
    module = attach(TextData([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], sequence_length=10))
    module.setup("fit")
    evaluated = text_of(module.val_dataloader()).decode()
    assert evaluated.splitlines(keepends=True) == lines[-len(evaluated) // 10 :]
    assert 18 <= len(module.val_dataloader()) <= 20
    rows = {bytes(row.tolist()).decode() for row in gather(module.train_dataloader())}
    assert not rows & set(evaluated.splitlines(keepends=True))
    alone = attach(TextData(str(tmp_path / "a.txt"), sequence_length=10))
    alone.setup("validate")
    assert len(alone.val_dataloader()) == 9


def test_wikitext_from_its_folder():
    folder = PQQP_DATA / "wikitext"
    if not folder.is_dir():
        pytest.skip(f"WikiText-2 is not at {folder}: set PQQP_DATA")
    module = attach(TextData(str(folder), "wikitext-2-raw-v1", evaluation_samples=1))
    module.setup("validate")
    assert text_of(module.val_dataloader()).startswith(b"\n\n = Robert Boulter = \n")
    assert len(module.calibration_dataloader()) == 8


def test_the_tokenizer_of_the_data_comes_before_the_models(tmp_path):
    with pytest.raises(RecipeError, match=r"data: tokenizer='\./nowhere' does not exist"):
        attach(TextData(tokenizer="./nowhere")).setup("validate")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"is a folder without a tokenizer"):
        attach(TextData(tokenizer=str(tmp_path / "empty"))).setup("validate")
    with pytest.raises(
        RecipeError, match=r"data: tokenizer='org/none' has a tokenizer that cannot be loaded from the hub"
    ):
        attach(TextData(tokenizer="org/none")).setup("validate")


def test_without_any_tokenizer_the_argument_is_named():
    with pytest.raises(RecipeError, match=r"tokenizer is not set, and the model has none\. Set data\.tokenizer"):
        TextData().setup("validate")
    tiny = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = CausalLM({**tiny, "num_attention_heads": 2})
    with pytest.raises(RecipeError, match=r"built from its configuration has no tokenizer\. Set data\.tokenizer"):
        attach(TextData(), model).setup("validate")


def test_ids_and_windows_that_the_model_cannot_take_are_refused():
    small = SimpleNamespace(vocabulary_size=100, longest_sequence=32)
    module = attach(TextData(sequence_length=16))
    module.setup("validate")
    with pytest.raises(RecipeError, match=r"data: tokenizer gives a token id \d+, but the model knows 100 tokens"):
        attach(module, small).setup("validate")
    with pytest.raises(RecipeError, match=r"sequence_length=64 is more than the model takes \(32\)"):
        attach(TextData(sequence_length=64), small).setup("validate")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"sequence_length": 2000},
            r"sequence_length=2000 is more than the evaluation text of .* has \(11 tokens\)\. Lower it",
        ),
        (
            {"calibration_samples": 99},
            r"calibration_samples=99 is more than the 9 training windows of sequence_length=4",
        ),
        ({"evaluation_samples": 99}, r"evaluation_samples=99 is more than the 2 evaluation windows of"),
        ({"evaluation_split": "tests"}, r"no split 'tests' \(no tests-\*\.parquet in .*Did you mean 'test'"),
        ({"train_split": "validation"}, r"no split 'validation'"),
        ({"text_column": "texts"}, r"text_column='texts' is not a column of .*Did you mean 'text'"),
        ({"text_column": "number"}, r"text_column='number' of .* does not contain text"),
        ({"config_name": "plane"}, r"config_name='plane' is not a folder in .*Did you mean 'plain'"),
    ],
)
def test_data_that_does_not_suffice_is_refused(parquet, arguments, message):
    with pytest.raises(RecipeError, match=message):
        attach(TextData(str(parquet), **{"sequence_length": 4, "calibration_samples": 2, **arguments})).setup("fit")


def test_folders_that_are_not_data_are_refused(parquet, tmp_path):
    (parquet / "other").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), parquet / "other" / "test.parquet")
    with pytest.raises(RecipeError, match=r"holds several data sets\. Set config_name: other, plain"):
        attach(TextData(str(parquet))).setup("validate")
    (tmp_path / "bare").mkdir()
    with pytest.raises(RecipeError, match=r"has no parquet files, and none one folder below"):
        attach(TextData(str(tmp_path / "bare"))).setup("validate")
    with pytest.raises(RecipeError, match=r"is a file\. Give the folder that holds the split's parquet files"):
        attach(TextData(str(parquet / "other" / "test.parquet"))).setup("validate")


@pytest.mark.parametrize("keep", [0, 100])
def test_corrupt_parquet_is_refused(parquet, keep):
    file = parquet / "plain" / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        RecipeError, match=r"has a file that cannot be read: .*test-00000-of-00001\.parquet \(.+\)\. Download it again"
    ):
        attach(TextData(str(parquet))).setup("validate")


def test_files_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(RecipeError, match=r"is not UTF-8 text \(byte 2\)"):
        attach(TextData(str(tmp_path / "a.txt"))).setup("validate")


def test_without_the_hub_the_ways_out_are_named():
    module = attach(TextData("org/nothing", "raw"))
    for read in (module.prepare_data, module.setup):
        with pytest.raises(
            RecipeError,
            match=r"'org/nothing' cannot be loaded from the hub \(config_name='raw'\).*HF_HUB_OFFLINE unset",
        ):
            read()


def test_all_problems_are_told_at_once(tmp_path):
    module = TextData(["./nowhere.txt", str(tmp_path)], sequence_length=1, calibration_samples=0, batch_size=0)
    problems = "\n".join(map(str, module.check()))
    for part in (
        "sequence_length=1 is too small. Use 2 or more",
        "calibration_samples=0",
        "batch_size=0",
        "nowhere.txt",
    ):
        assert part in problems
    assert "is a folder; a list is for text files" in problems
    assert TextData("python-doc").check()[0].way_out == "Did you mean 'python-docs'?"
    with pytest.raises(RecipeError, match=r"source is an empty list"):
        TextData([]).setup("validate")


def small_tokenizer(adds_bos: bool):
    """A BPE tokenizer trained here, whose post-processor adds the token in front as those of LLaMA and Gemma do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<bos>"], show_progress=False)
    backend.train_from_iterator([corpora.read_python_docs(True)], trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")


@pytest.mark.parametrize(
    ("bos", "tokenizer", "expected"),
    [
        ("auto", "adds", True),
        ("auto", "has", False),  # as Qwen's and SmolLM2's: the token exists, and the tokenizer does not add it
        ("auto", "none", False),
        (True, "adds", True),
        (True, "has", True),
        (False, "adds", False),
    ],
)
def test_windows_begin_as_the_tokenizer_begins_a_text(bos, tokenizer, expected):
    tokenizers = {"adds": lambda: small_tokenizer(True), "has": lambda: small_tokenizer(False), "none": Bytes}
    model = SimpleNamespace(tokenizer=tokenizers[tokenizer](), vocabulary_size=600, longest_sequence=64)
    # the class is asked for a tokenizer
    model = type("Model", (), vars(model))()
    module = attach(TextData(sequence_length=16, calibration_samples=4, evaluation_samples=4, bos=bos), model)
    plain = attach(TextData(sequence_length=15, calibration_samples=4, evaluation_samples=4, bos=False), model)
    for windows, body in (
        (module.calibration_dataloader(), None),
        (module.val_dataloader(), gather(plain.val_dataloader())),
        (module.train_dataloader(), None),
    ):
        rows = gather(windows)
        assert rows.shape[1] == 16
        begins = model.tokenizer.bos_token_id is not None and bool((rows[:, 0] == model.tokenizer.bos_token_id).all())
        assert begins == expected
        if expected:
            assert not (rows[:, 1:] == model.tokenizer.bos_token_id).any()
            if body is not None:
                assert torch.equal(rows[:, 1:], body)


def test_a_token_that_the_tokenizer_lacks_is_refused():
    module = attach(TextData(sequence_length=16, bos=True))
    with pytest.raises(RecipeError, match="data: bos=True asks for a beginning-of-sequence token"):
        module.setup("validate")
    with pytest.raises(RecipeError, match="data: bos='yes' should be 'auto' or true or false"):
        TextData(bos="yes")


def test_smollm2_gets_no_token():
    assert not begins_with_bos(load_tokenizer("smollm2-135m"))
    assert begins_with_bos(small_tokenizer(True))
    assert begins_with_bos(BytesWithBos())


@pytest.mark.parametrize("kind", ["bytes", "trained", "smollm2"])
def test_pieces_give_the_tokens_of_the_whole_text(monkeypatch, kind):
    monkeypatch.setattr(tokenizing, "PIECE", 500)
    monkeypatch.setattr(tokenizing, "PIECES", 4)
    tokenizer = {
        "bytes": Bytes,
        "trained": lambda: small_tokenizer(True),
        "smollm2": lambda: load_tokenizer("smollm2-135m"),
    }[kind]()
    text = corpora.read_python_docs(True)[:40_000]
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert token_ids(tokenizer, text).tolist() == whole
    some = token_ids(tokenizer, text, most=1000).tolist()
    assert 1000 <= len(some) < len(whole)
    assert some == whole[: len(some)]


class Cumulative(Bytes):
    """A tokenizer whose tokens depend on everything before them, so that no text can be cut."""

    def __call__(self, text, add_special_tokens=True):
        if isinstance(text, list):
            return super().__call__(text, add_special_tokens)
        return {"input_ids": [(i + byte) % 251 for i, byte in enumerate(text.encode())]}


def test_a_text_that_cannot_be_cut_is_tokenised_whole(monkeypatch):
    monkeypatch.setattr(tokenizing, "PIECE", 100)
    text = "a line of words\n" * 300
    assert token_ids(Cumulative(), text).tolist() == Cumulative()(text)["input_ids"]
