"""Exports: refused beforehand, written as a whole, compared with the run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import tiny
import torch
from command_line import prepare, refused, run
from exports import RUNS, checks_here, run_of  # noqa: F401  # a fixture
from safetensors.torch import load_file, save_file

import pqqp_lightning
from pqqp_lightning import load
from pqqp_lightning.callbacks import LoRA
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.export import runtime_check
from pqqp_lightning.export.discovery import find_target, known_targets
from pqqp_lightning.export.export_run import FAILED, CheckFailed, export_run
from pqqp_lightning.export.runtime_check import RuntimeFailed
from pqqp_lightning.export.targets.hf import HuggingFace
from pqqp_lightning.models import CausalLM
from pqqp_lightning.storage.run_folder import RunFolder

STOCK = ["dense", "rtn4", "rtn3-asymmetric", "pruned-rtn4", "nf4", "sparse", "sleb", "channels", "basis", "quarot"]
ZEROS = ["sublayer", "uneven"]
REFUSED = {
    "online": "rotate their inputs while the model runs",
    "kept-gains": "rotate their inputs while the model runs",
    "activations": "round their inputs while the model runs",
    "sublayer": "without sublayers",
    "uneven": "uneven widths",
}


def test_every_run_is_tried():
    assert set(STOCK) | set(REFUSED) <= set(RUNS)


@pytest.mark.parametrize("name", [*STOCK, "adapters"])
def test_transformers_loads_what_hf_writes(name, tmp_path, checks_here):  # noqa: F811
    done = export_run(run_of(name), to="hf", out=tmp_path / "model", dtype="float32")
    assert done.agreement.largest_difference < 1e-5
    assert done.agreement.perplexity == pytest.approx(done.agreement.own_perplexity, rel=1e-6)


@pytest.mark.parametrize("name", ["dense", "rtn4", "basis", "sleb"])
def test_an_opt_model_is_written_too(name, tmp_path, checks_here):  # noqa: F811
    done = export_run(run_of(name, "opt"), to="hf", out=tmp_path / "model", dtype="float32")
    assert done.agreement.largest_difference < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_rounded_once_to_the_dtype(dtype, tmp_path, checks_here):  # noqa: F811
    done = export_run(run_of("pruned-rtn4"), to="hf", out=tmp_path / "model", dtype=dtype)
    written = load_file(tmp_path / "model" / "model.safetensors")
    own = load(run_of("pruned-rtn4")).model.state_dict()
    for name, tensor in written.items():
        assert torch.equal(tensor, own[name].to(getattr(torch, dtype)))
    assert 0 < done.agreement.divergence < 1e-3
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("name", ZEROS)
def test_zeros_in_place_of_removed_parts_change_nothing(name, tmp_path, checks_here):  # noqa: F811
    done = export_run(run_of(name), to="hf", out=tmp_path / "model", dtype="float32", pad=True)
    assert done.agreement.largest_difference < 1e-6
    assert "Zeros fill what was removed" in done.remarks[0]


@pytest.mark.parametrize("name", REFUSED)
def test_a_structure_that_is_not_stock_is_refused_before_anything_is_written(name, tmp_path):
    with pytest.raises(RecipeError, match=REFUSED[name]) as refusal:
        export_run(run_of(name), to="hf", out=tmp_path / "model")
    assert all(problem.way_out for problem in refusal.value.problems)
    assert not list(tmp_path.iterdir())


def test_all_problems_are_named_at_once():
    with pytest.raises(RecipeError) as refusal:
        export_run(run_of("activations"), to="hf", out=Path(__file__).parent / "no-such-export")
    assert len(refusal.value.problems) == 2  # inputs, and keys and values


def test_a_rotated_model_with_a_tied_head_gets_a_head_of_its_own(tmp_path, checks_here):  # noqa: F811
    done = export_run(run_of("quarot", tied=True), to="hf", out=tmp_path / "model", dtype="float32")
    assert done.agreement.largest_difference < 1e-4
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(tmp_path / "model" / "model.safetensors")


def test_a_tied_head_is_stored_once(tmp_path, checks_here):  # noqa: F811
    export_run(run_of("rtn4", tied=True), to="hf", out=tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


def test_a_model_with_layernorm_is_not_rotated_silently(tmp_path):
    with pytest.raises(RecipeError, match="rotated norm"):
        export_run(run_of("quarot", "opt"), to="hf", out=tmp_path / "model")


def test_adapters_on_transposed_weights_are_refused(tmp_path):
    settings = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    data = tiny.make_data("llama", tmp_path)
    tiny.trainer(tmp_path / "run", LoRA(merge=False)).fit(CausalLM(settings), datamodule=data)
    with pytest.raises(RecipeError, match=r"keeps adapters apart on .* not Linear.*Set merge: true"):
        export_run(tmp_path / "run", to="hf", out=tmp_path / "model")


def test_an_image_model_is_refused_by_name(tmp_path):
    with pytest.raises(RecipeError, match="ImageClassifier"):
        export_run(run_of("dense", "resnet"), to="hf", out=tmp_path / "model")


def test_values_beyond_the_range_of_float16_are_refused(tmp_path):
    module = tiny.make_model("llama")
    with torch.no_grad():
        module.model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    tiny.trainer(tmp_path / "run", max_epochs=0).fit(module, datamodule=tiny.make_data("llama", tmp_path))
    with pytest.raises(RecipeError, match=r"up_proj.*Use --dtype bfloat16 or float32"):
        export_run(tmp_path / "run", to="hf", out=tmp_path / "model")
    export_run(tmp_path / "run", to="hf", out=tmp_path / "model", dtype="float32", check=False)


def test_the_run_keeps_its_samples_and_says_where_a_tokenizer_is_missing(tmp_path, checks_here):  # noqa: F811
    samples = load_file(RunFolder(run_of("rtn4")).samples)["input_ids"]
    assert torch.equal(samples, tiny.token_rows(4, seed=1))  # the evaluation data of tiny.make_data
    done = export_run(run_of("rtn4"), to="hf", out=tmp_path / "model")
    assert done.agreement.shape == (4, tiny.TOKENS)
    assert any("no tokenizer" in remark for remark in done.remarks)


def test_the_tokenizer_goes_along(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_of("rtn4"), folder)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    done = export_run(folder, to="hf", out=tmp_path / "model", check=False)
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"
    assert not any("no tokenizer" in remark for remark in done.remarks)


# --- the check ---


class Requantizing(HuggingFace):
    """A broken target: it rounds the weights again."""

    name = "requantizing"

    def write(self, model, folder):
        super().write(model, folder)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        weight = tensors["model.layers.0.mlp.up_proj.weight"].float()
        step = weight.abs().max() / 7.7
        tensors["model.layers.0.mlp.up_proj.weight"] = ((weight / step).round() * step).half()
        save_file(tensors, file, metadata={"format": "pt"})


def test_a_target_that_quantizes_again_fails_its_check_and_marks_the_folder(tmp_path):
    with pytest.raises(CheckFailed, match=r"up_proj\.weight: .* entries differ"):
        export_run(run_of("rtn4"), to="requantizing", out=tmp_path / "model")
    assert "up_proj" in (tmp_path / "model" / FAILED).read_text()


class Blind(HuggingFace):
    """A broken target whose decoder does not see what its writer did."""

    name = "blind"

    def write(self, model, folder):
        super().write(model, folder)
        self.wanted = dict(self.expected(model))
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] *= 8
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def decoded(self, folder):
        return iter(self.wanted.items())


def test_a_target_whose_outputs_differ_fails_its_check(tmp_path, checks_here):  # noqa: F811
    with pytest.raises(CheckFailed, match="Outputs differ too much"):
        export_run(run_of("rtn4"), to="blind", out=tmp_path / "model")


def test_a_third_partys_target_is_found_by_its_name():
    assert known_targets()["requantizing"] is Requantizing


def test_an_export_that_is_interrupted_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    def write(self, model, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(HuggingFace, "write", write)
    with pytest.raises(KeyboardInterrupt):
        export_run(run_of("rtn4"), to="hf", out=tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- options of one target ---


class Chatty(HuggingFace):
    """A target with options of its own.

    Args:
        voice: how it speaks.
        loud: whether it shouts.
        times: how often.
    """

    name = "chatty"

    def __init__(self, voice: Literal["low", "high"] = "low", loud: bool = False, times: int | None = None) -> None:
        self.given = (voice, loud, times)


def test_a_target_gets_its_own_options(tmp_path):
    assert find_target("chatty", voice="high", loud="true", times="3").given == ("high", True, 3)
    assert find_target("chatty", loud=True).given == ("low", True, None)


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("chatty", {"voice": "hig"}, "voice='hig' is not one of low, high. Did you mean 'high'?"),
        ("chatty", {"times": "many"}, "times='many' is not a whole number. The default is None."),
        ("chatty", {"loud": 1}, "loud=1 is not one of true, false. The default is false."),
        ("chatty", {"void": "low"}, "void is not an option of --to chatty. Did you mean 'voice'?"),
        ("hf", {"voice": "low"}, "voice is an option of --to chatty; hf does not have it. Leave --voice out."),
    ],
)
def test_an_option_that_a_target_does_not_have_is_refused_with_words(to, options, message):
    with pytest.raises(RecipeError) as refusal:
        find_target(to, **options)
    assert [str(problem) for problem in refusal.value.problems] == [message]


# --- the command ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a moved copy of a run, blanks in its name."""
    prepare(tmp_path, monkeypatch)
    shutil.copytree(run_of("pruned-rtn4"), tmp_path / "my moved run")
    return tmp_path


def test_the_command_writes_checks_and_says_how_to_load(folder, capsys, checks_here):  # noqa: F811
    assert run("export", "my moved run", "--to", "hf", "--out", "my model") == 0
    words = capsys.readouterr().out
    assert "zeros are kept as values" in words
    assert "tensors, decoded from the files, equal the run's in" in words
    assert 'from_pretrained("my model")' in words
    card = (folder / "my model" / "README.md").read_text()
    assert "| quantize" not in card  # a run from Python has no names of stages
    assert "| rtn" in card
    assert "library_name: transformers" in card


def test_an_empty_folder_is_filled_and_a_full_one_refused(folder):
    (folder / "out").mkdir()
    assert run("export", "my moved run", "--to", "hf", "--out", "out", "--check", "false") == 0
    problems = refused("export", "my moved run", "--to", "hf", "--out", "out")
    assert [(problem.key, problem.value) for problem in problems] == [("out", "out")]


def test_a_failed_check_exits_with_1(folder, capsys):
    assert run("export", "my moved run", "--to", "requantizing", "--out", "out") == 1
    assert "entries differ" in capsys.readouterr().err
    assert (folder / "out" / FAILED).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --to hff --out x", "command line: to='hff' is not a target. Did you mean 'hf'?"),
        ("run --to hf --out x --dtpe float16", "command line: Unknown option '--dtpe'. Did you mean '--dtype'?"),
        ("run --to hf --out x --dtype f16", "command line: dtype='f16' is not one of"),
        ("run --to hf --out x --widen yes", "command line: widen='yes' is neither true nor false"),
        ("run --to hf --out", "command line: out has no value. Write --out VALUE."),
        ("run --to gguf --to hf --out x", "command line: to='hf' is given twice. Write it once."),
        ("run --to hf --out x --voice low", "command line: voice is an option of --to chatty; hf does not have it."),
        ("run more --to hf --out x", "command line: Unexpected argument 'more'"),
        ("--to hf --out x", "command line: export needs a run folder"),
        ("run --out x", "command line: export needs --to. Choose one of"),
        ("nowhere --to hf --out x", "command line: run='nowhere' is not a folder"),
        ("my-data --to hf --out x", "command line: run='my-data' is not a run folder"),
    ],
)
def test_wrong_input_is_refused_with_the_way_out(folder, arguments, message):
    (folder / "my moved run").rename(folder / "run")
    (folder / "my-data").mkdir()
    words = [str(problem) for problem in refused("export", *arguments.split())]
    assert any(word.startswith(message) for word in words), words


def test_an_unfinished_run_is_refused(folder):
    shutil.rmtree(folder / "my moved run" / "model")
    problems = refused("export", "my moved run", "--to", "hf", "--out", "x")
    assert "has no finished model" in str(problems[0])


def test_help_lists_targets_and_options(folder, capsys):
    assert run("export", "--help") == 0
    words = capsys.readouterr().out
    for expected in (
        "hf",
        "--dtype",
        "--widen",
        "--pad",
        "--check",
        "By default float16",
        "--voice",
        "how it speaks. [low]",
    ):
        assert expected in words


def test_python_calls_the_room_and_the_check_runs_in_another_process(tmp_path):
    done = pqqp_lightning.export(run_of("rtn4"), to="hf", out=tmp_path / "a model")
    assert done.agreement.divergence < 1e-3
    assert "in a process of its own" in done.checks[-1]


def test_a_model_that_the_other_program_does_not_load_fails_the_check(tmp_path, checks_here, monkeypatch):  # noqa: F811
    def refuse(*arguments):
        raise RuntimeFailed("ValueError: unknown model type")

    monkeypatch.setattr(runtime_check, "run_script", refuse)
    with pytest.raises(CheckFailed, match="transformers does not load it: ValueError: unknown model type"):
        export_run(run_of("rtn4"), to="hf", out=tmp_path / "model")


def test_a_program_that_is_not_installed_is_named(tmp_path, monkeypatch):
    absent = replace(HuggingFace.runtime, modules=("no_such_module",), package="no-such-package")
    monkeypatch.setattr(HuggingFace, "runtime", absent)
    done = export_run(run_of("rtn4"), to="hf", out=tmp_path / "model")
    assert done.checks[-1] == "Not checked in transformers: pip install no-such-package."
