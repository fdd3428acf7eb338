"""The commands that use a run's model: ``generate`` and ``classify``."""

import csv
import io
import json
import shutil
import sys

import pytest
import tiny
import torch
import yaml
from command_line import refused, run
from exports import run_of
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

import pqqp_lightning.callbacks as c
from pqqp_lightning import load
from pqqp_lightning.data import ImageData
from pqqp_lightning.inference.classification import classify_images
from pqqp_lightning.inference.generation import generate_text

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
END = 62


def save_tokenizer(folder):
    """One token for each letter; 62 ends a text."""
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)} | {"<end>": END, "<unk>": 63}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    GenerationConfig(eos_token_id=END).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def text_run(folder, name="rtn4"):
    """A run folder with a tokenizer."""
    shutil.copytree(run_of(name), folder / "run")
    save_tokenizer(folder / "run" / "tokenizer")
    return folder / "run"


def continued(run_folder, ids, count):
    """The most likely tokens, from the whole sequence anew for each."""
    model = load(run_folder)
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == END:
                break
    return ids[0]


@pytest.mark.parametrize(
    "name", ["rtn4", "sleb", "sublayer", "channels", "uneven", "basis", "quarot", "online", "activations", "adapters"]
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_cache_of_generation_changes_nothing(folder, name, packed, capsys):
    run_folder = text_run(folder, name)
    done = generate_text(run_folder, prompt="Hello", max_new_tokens=12, packed=packed)
    prompt = torch.tensor([[LETTERS.index(letter) for letter in "Hello"]])
    expected = continued(run_folder, prompt, 12)[5:]
    assert done.tokens == len(expected)
    assert done.text == "".join(LETTERS[i] for i in expected if i < END)
    assert capsys.readouterr().out.strip() == done.text


def test_generate_streams_to_stdout_and_reports_to_stderr(folder, capsys):
    text_run(folder)
    assert run("generate", "--packed", "run", "--prompt", "Hello", "--max_new_tokens", "5") == 0
    shown = capsys.readouterr()
    assert shown.out.strip().isalnum()
    assert "MB in memory (packed)" in shown.err
    assert "5 tokens, " in shown.err


def test_generate_takes_the_checkpoint_folder_of_a_run(folder, capsys):
    text_run(folder)
    assert run("generate", "run/model", "--prompt", "Hello", "--max_new_tokens", "5", "--packed") == 0


def test_generate_reads_the_prompt_from_stdin(folder, capsys, monkeypatch):
    run_folder = text_run(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    assert run("generate", "run", "--prompt", "-", "--max_new_tokens", "5") == 0
    shown = capsys.readouterr().out.strip()
    assert shown == generate_text(run_folder, prompt="Hello", max_new_tokens=5).text


def test_sampling_depends_on_the_seed_alone(folder):
    run_folder = text_run(folder)

    def sample(seed, temperature=1.5):
        return generate_text(run_folder, prompt="a", max_new_tokens=20, temperature=temperature, seed=seed).text

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1, temperature=0.0) == sample(2, temperature=0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "command line: generate needs --prompt. Write --prompt"),
        (["run", "--prompt", ""], "command line: prompt='' is empty."),
        (["run", "--prompt", "  "], "command line: prompt='  ' is empty."),
        (["run", "--prompt"], "command line: prompt has no value. Write --prompt VALUE."),
        (["--prompt", "a"], "command line: generate needs a run folder. Run pqqp-lightning generate"),
        (["nowhere", "--prompt", "a"], "command line: run='nowhere' is not a folder"),
        (["run/run.json", "--prompt", "a"], "command line: run='run/run.json' is a file"),
        (["run", "a", "prompt"], "command line: Unexpected argument 'a'"),
        (["run", "--promt", "a"], "command line: Unknown option '--promt'. Did you mean '--prompt'?"),
        (["run", "--prompt", "a", "--max_new_tokens", "many"], "command line: max_new_tokens='many' is not a whole"),
        (["run", "--prompt", "a", "--max_new_tokens", "0"], "command line: max_new_tokens=0 is not above 0"),
        (["run", "--prompt", "a", "--max_new_tokens", "64"], "command line: max_new_tokens=64 is too many"),
        (["run", "--prompt", "a", "--temperature", "-1"], "command line: temperature=-1.0 is not a number from 0"),
        (["run", "--prompt", "a", "--temperature", "nan"], "command line: temperature=nan is not a number from 0"),
        (["run", "--prompt", "a", "--seed", "1.5"], "command line: seed='1.5' is not a whole number. Write --seed 0."),
        (["run", "--prompt", "a", "--packed", "yes"], "command line: packed='yes' is neither true nor false"),
        (["my-data", "--prompt", "a"], "command line: run='my-data' is not a run folder"),
    ],
)
def test_generate_refuses_wrong_input_with_the_way_out(folder, arguments, message):
    text_run(folder)
    (folder / "my-data").mkdir()
    words = [str(problem) for problem in refused("generate", *arguments)]
    assert any(word.startswith(message) for word in words), words


def test_all_problems_of_generate_come_at_once(folder):
    text_run(folder)
    keys = {
        problem.key for problem in refused("generate", "run", "--prompt", "", "--seed", "-3", "--temperature", "-1")
    }
    assert keys == {"prompt", "seed", "temperature"}


def test_wrong_words_and_wrong_values_come_at_once(folder):
    words = "generate run --prompt a --temperature hot --max_new_tokens 0 --seed -3 --pak"
    problems = refused(*words.split())
    assert [problem.key for problem in problems] == ["temperature", "", "run", "max_new_tokens", "seed"]
    assert str(problems[1]) == "command line: Unknown option '--pak'. Did you mean '--packed'?"
    *_, last = refused("generate", "nowhere", "--promt", "a")
    assert str(last).startswith("command line: run='nowhere' is not a folder")


def test_an_empty_path_is_not_the_current_folder(folder, vision_run):
    run_folder, _ = vision_run
    assert [p.key for p in refused("generate", "", "--prompt", "a")] == ["run"]
    problems = refused("classify", str(run_folder), "", "--out", "")
    assert [(p.key, p.value) for p in problems] == [("images", ""), ("out", "")]


def test_generate_refuses_a_run_without_a_tokenizer_and_a_vision_run(folder):
    assert "has no tokenizer" in str(refused("generate", str(run_of("rtn4")), "--prompt", "a")[0])
    assert "Use pqqp-lightning classify" in str(refused("generate", str(run_of("rtn8", "resnet")), "--prompt", "a")[0])


def test_help_lists_the_options(folder, capsys):
    assert run("generate", "--help") == 0
    words = capsys.readouterr().out
    for expected in ("--prompt", "--max_new_tokens", "[100]", "--packed", "[false]", "example:"):
        assert expected in words
    assert run("classify", "-h") == 0
    assert "--top " in capsys.readouterr().out


NAMES = ("cat", "dog")
SHADES = {"cat": 60, "dog": 190}


def save_images(folder, count=4, size=40):
    """Noisy grey images, the cats darker than the dogs: split/class/image."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for name in NAMES:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(0, 40, (size, size + 8, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray((noise + SHADES[name]).numpy()).save(folder / split / name / f"{i}.png")


@pytest.fixture(scope="module")
def vision_run(tmp_path_factory):
    """A run on a folder of images, with the images: (folder of the run, folder of the images)."""
    made = tmp_path_factory.mktemp("vision")
    save_images(made / "animals")
    options = {"calibration_samples": 4, "calibration_batch_size": 4, "batch_size": 4}
    data = ImageData(str(made / "animals"), image_size=32, mean=[0.4], std=[0.2], **options)
    tiny.trainer(made / "run", c.RTN(8)).fit(tiny.make_model("resnet"), datamodule=data)
    return made / "run", made / "animals"


def rows_of(file):
    with file.open(encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


@pytest.mark.parametrize("packed", [False, True])
def test_classify_computes_what_the_run_evaluated(folder, vision_run, packed):
    run_folder, images = vision_run
    done = classify_images(run_folder, [str(images / "test")], batch_size=3, packed=packed)
    data = ImageData(str(images), image_size=32, mean=[0.4], std=[0.2])
    data.setup("validate")
    model = load(run_folder)
    with torch.no_grad():
        for answer, (image, _) in zip(done.answers, data._evaluation_subset(), strict=True):
            values, classes = model(image[None]).softmax(-1)[0].topk(3)
            assert answer.classes == [NAMES[i] if i < 2 else str(i) for i in classes.tolist()]
            assert torch.allclose(torch.tensor(answer.probabilities), values, atol=1e-5)


def test_classify_prints_a_table_and_writes_a_csv(folder, vision_run, capsys):
    run_folder, images = vision_run
    (images / "test" / "cat" / "broken.png").write_bytes(b"no image")
    try:
        assert run("classify", str(run_folder), str(images / "test"), "--out", "answers.csv", "--top", "2") == 0
    finally:
        (images / "test" / "cat" / "broken.png").unlink()
    shown = capsys.readouterr()
    assert "probability" in shown.out
    assert "answers.csv: 8 images, 1 skipped." in shown.out
    assert "broken.png: skipped: cannot identify image file" in shown.err
    rows = rows_of(folder / "answers.csv")
    assert list(rows[0]) == ["file", "class", "probability", "class_2", "probability_2"]
    assert len(rows) == 8
    assert all(0 <= float(row["probability_2"]) <= float(row["probability"]) <= 1 for row in rows)
    assert run("classify", str(run_folder), str(images / "test" / "cat" / "0.png"), "--out", "answers.csv") == 0
    assert len(rows_of(folder / "answers.csv")) == 1  # an earlier result is replaced


def test_an_old_run_is_classified_as_its_recipe_says(folder, vision_run):
    run_folder, images = vision_run
    shutil.copytree(run_folder, folder / "old")
    kept = json.loads((folder / "old" / "preprocessing.json").read_text())
    assert kept["classes"] == list(NAMES)
    assert kept["input_size"] == [32, 32]
    (folder / "old" / "preprocessing.json").unlink()
    arguments = {"source": "animals", "image_size": 32, "mean": [0.4], "std": [0.2]}
    recipe = {"data": {"class_path": "pqqp_lightning.data.images.ImageData", "init_args": arguments}}
    (folder / "old" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    new = classify_images(run_folder, [str(images / "test")])
    old = classify_images("old", [str(images / "test")])
    assert [a.probabilities for a in old.answers] == [a.probabilities for a in new.answers]
    assert old.answers[0].classes[0] in "0123456789"  # the names were not kept


def test_images_of_other_sizes_are_scaled_to_the_size_that_the_run_evaluated(folder):
    for i, size in enumerate([(8, 8), (100, 50), (33, 70)]):
        Image.new("L", size, 100 * i).save(folder / f"{i}.png")
    run_folder = run_of("rtn8", "deit")  # digits of 32x32 pixels: a DeiT takes no other size
    done = classify_images(run_folder, ["0.png", "1.png", "2.png"])
    assert [answer.file.name for answer in done.answers] == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("RUN", "command line: classify needs images. Name image files"),
        ("RUN nowhere", "command line: images='nowhere' does not exist"),
        ("RUN empty", "command line: images='empty' is a folder without images"),
        ("RUN a.png --out empty", "command line: out='empty' is a folder. Name a file"),
        ("RUN a.png --out notes.csv", "command line: out='notes.csv' exists, and is not such a table"),
        ("RUN a.png --out a.png/x.csv", "command line: out='a.png' cannot be written"),
        ("RUN a.png --top 0", "command line: top=0 is not above 0"),
        ("RUN a.png --batch_size -2", "command line: batch_size=-2 is not above 0"),
        ("RUN broken.png", "command line: images cannot be read (broken.png: cannot identify image file"),
        ("TEXT a.png", "command line: run='TEXT' holds a language model. Use pqqp-lightning generate."),
        ("PLAIN a.png", "command line: run='PLAIN' does not say how its images were prepared"),
        ("nowhere a.png", "command line: run='nowhere' is not a folder"),
        ("empty a.png", "command line: run='empty' is not a run folder"),
        ("a.png RUN", "command line: run='a.png' is a file"),
    ],
)
def test_classify_refuses_wrong_input_with_the_way_out(folder, vision_run, arguments, message):
    (folder / "RUN").symlink_to(vision_run[0])
    (folder / "PLAIN").symlink_to(run_of("rtn4"))
    text_run(folder).rename(folder / "TEXT")
    (folder / "empty").mkdir()
    (folder / "notes.csv").write_text("my,notes\n")
    (folder / "broken.png").write_text("no image")
    Image.new("L", (8, 8)).save(folder / "a.png")
    words = [str(problem) for problem in refused("classify", *arguments.split())]
    assert any(word.startswith(message) for word in words), words
