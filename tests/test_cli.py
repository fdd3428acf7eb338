"""The command line: help at once, stages by name from anywhere, and recipes that can be run again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import docstring_parser
import pytest
import torch
import yaml
from command_line import RECIPE, prepare, run, run_command, run_process, write_recipe

import pqqp_lightning
import pqqp_lightning.__main__ as entry
from pqqp_lightning.cli.command_table import COMMANDS
from pqqp_lightning.experiments import AnalysisOptions, OrderOptions, SweepOptions
from pqqp_lightning.runs.stage_runner import StageRunner
from pqqp_lightning.storage.run_folder import WEIGHTS

TOKENS = re.compile(r"perplexity +│ +([0-9.]+)")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    return prepare(tmp_path, monkeypatch)


def stages_of(run_folder: Path) -> list[dict]:
    return json.loads((run_folder / "report.json").read_text())["stages"]


def results(run_folder: Path) -> list[tuple]:
    """What two runs of the same must agree in."""
    names = ("name", "method", "metrics", "size_bytes", "sparsity", "bits_per_weight")
    return [tuple(stage[name] for name in names) for stage in stages_of(run_folder)]


def weights(run_folder: Path) -> bytes:
    return (run_folder / "model" / WEIGHTS).read_bytes()


# Help


@pytest.mark.parametrize("arguments", ["--help", "fti"])
def test_it_ends_quietly_when_nobody_reads(arguments, folder):
    """As in ``pqqp-lightning ... | head``, of both streams."""
    command = [sys.executable, "-m", "pqqp_lightning", arguments]
    reading, writing = os.pipe()
    os.close(reading)
    errors = writing if arguments == "fti" else subprocess.PIPE
    done = subprocess.run(command, stdout=writing, stderr=errors, text=True, check=False, timeout=120)
    os.close(writing)
    assert done.returncode == 128 + signal.SIGPIPE
    assert not done.stderr


def test_a_broken_pipe_of_another_process_is_not_hidden(folder, monkeypatch):
    def fail(arguments):
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(entry, "_run", fail)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        entry.main(["fit"])


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"]])
def test_it_answers_at_once_without_torch(arguments, folder):
    start = time.perf_counter()
    done = run_process(folder, *arguments, PYTHONPROFILEIMPORTTIME="1")
    assert time.perf_counter() - start < 2
    assert done.returncode == 0
    expected = f"pqqp-lightning {pqqp_lightning.__version__}\n" if "--version" in arguments else "usage: pqqp-lightning"
    assert done.stdout.startswith(expected)
    assert not re.search(r"\| +(torch|lightning|jsonargparse)$", done.stderr, re.MULTILINE)


def test_stages_of_a_second_recipe_replace_those_of_the_first_and_say_so(folder, capfd):
    (folder / "more.yaml").write_text("stages:\n  quantize: {class_path: RTN, init_args: {bits: 3}}\n")
    assert run("fit", "--config", "recipe.yaml", "--config", "more.yaml") == 0
    assert "more.yaml: its stages (quantize) replace those of recipe.yaml (prune, quantize)." in capfd.readouterr().out
    assert [stage["method"] for stage in stages_of(folder / "run")] == ["", "RTN"]
    assert run("fit", "--config", "recipe.yaml", "--stages.prune.sparsity", "0.3") == 0
    assert "replace" not in capfd.readouterr().out


def test_help_names_every_command(folder, capsys):
    run("--help")
    printed = capsys.readouterr().out
    assert all(f"\n  {command} " in printed for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_help(command, folder, capsys):
    assert run(command, "--help") == 0
    assert capsys.readouterr().out.startswith("usage: pqqp-lightning")


@pytest.mark.parametrize(
    ("command", "options"), [("order", OrderOptions), ("sweep", SweepOptions), ("analyze", AnalysisOptions)]
)
def test_the_help_of_an_experiment_has_the_options_of_its_dataclass(command, options, folder, capsys):
    run(command, "--help")
    printed = " ".join(capsys.readouterr().out.split())
    parsed = [docstring_parser.parse(base.__doc__ or "") for base in options.__mro__]
    meanings = {parameter.arg_name: parameter.description for text in parsed for parameter in text.params}
    for option in fields(options):
        assert f"--{option.name} " in printed
        assert " ".join(meanings[option.name].split()) in printed


def test_help_of_fit_names_the_methods_and_their_arguments(folder, capsys):
    run("fit", "--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert "SparseGPT (sparsity, pattern, block_size, damping, allocation)" in printed
    assert (
        "Shared arguments: targets, ignore, epochs, learning_rate, blocks, allow_undo, distill, batch_norm." in printed
    )
    for option in ("--model", "--data", "--trainer.precision", "--stage_order", "--run_dir", "--ckpt_path"):
        assert option in printed


# Recipes


def test_the_printed_recipe_runs(folder, capsys):
    assert run("fit", "--config", "recipe.yaml", "--stages.prune.sparsity", "0.4", "--print_config") == 0
    (folder / "printed.yaml").write_text(capsys.readouterr().out)
    assert run("fit", "--config", "recipe.yaml", "--stages.prune.sparsity", "0.4") == 0
    assert run("fit", "--config", "printed.yaml", "--run_dir", "again") == 0
    assert results(folder / "run") == results(folder / "again")
    assert weights(folder / "run") == weights(folder / "again")


def test_the_resolved_recipe_of_a_run_runs_again(folder):
    arguments = ["--seed_everything", "5", "--stage_order", "[quantize,prune]", "--stages.quantize", "GPTQ"]
    assert run("fit", "--config", "recipe.yaml", *arguments) == 0
    resolved = yaml.safe_load((folder / "run/recipe.yaml").read_text())
    assert list(resolved["stages"]) == ["quantize", "prune"]
    assert resolved["seed_everything"] == 5
    assert run("fit", "--config", "run/recipe.yaml", "--run_dir", "again") == 0
    assert [stage["name"] for stage in stages_of(folder / "run")] == ["dense", "quantize", "prune"]
    assert results(folder / "run") == results(folder / "again")
    assert weights(folder / "run") == weights(folder / "again")


def test_stages_come_from_the_command_line_alone(folder):
    write_recipe(folder, {RECIPE[RECIPE.index("stages:") :]: ""})
    arguments = ["--stages.a", "Magnitude", "--stages.a.sparsity", "0.5", "--stages.b", "RTN", "--stages.b.bits", "4"]
    assert run("fit", "--config", "recipe.yaml", *arguments, "--run_dir", "alone") == 0
    write_recipe(folder)
    assert run("fit", "--config", "recipe.yaml") == 0
    assert [stage["name"] for stage in stages_of(folder / "alone")] == ["dense", "a", "b"]
    assert weights(folder / "alone") == weights(folder / "run")


@pytest.mark.parametrize("where", ["command line", "recipe"])
def test_stage_order(where, folder):
    if where == "recipe":
        write_recipe(folder, {"run_dir: run": "run_dir: run\nstage_order: [quantize, prune]"})
    arguments = ["--stage_order", "[quantize,prune]"] if where == "command line" else []
    assert run("fit", "--config", "recipe.yaml", *arguments) == 0
    assert [stage["name"] for stage in stages_of(folder / "run")] == ["dense", "quantize", "prune"]


def test_a_recipe_without_stages_is_measured(folder):
    write_recipe(folder, {RECIPE[RECIPE.index("stages:") :]: ""})
    assert run("fit", "--config", "recipe.yaml") == 0
    assert [stage["name"] for stage in stages_of(folder / "run")] == ["dense"]
    assert weights(folder / "run")


def test_run_folders_are_named_after_the_recipe(folder):
    write_recipe(folder, {"run_dir: run\n": ""}, "small.yaml")
    assert run("fit", "--config", "small.yaml") == 0
    assert run("order", "--config", "small.yaml") == 0
    assert (folder / "runs/small/report.json").is_file()
    assert (folder / "runs/small-order/order.json").is_file()


def test_environment_variables_set_options(folder, monkeypatch):
    write_recipe(folder, {"run_dir: run\n": ""})
    monkeypatch.setenv("PQQP_FIT__RUN_DIR", "elsewhere")
    monkeypatch.setenv("PQQP_FIT__SEED_EVERYTHING", "7")
    assert run("fit", "--config", "recipe.yaml") == 0
    assert json.loads((folder / "elsewhere/report.json").read_text())["seed"] == 7
    assert run("fit", "--config", "recipe.yaml", "--run_dir", "said") == 0  # the command line has the last word
    assert (folder / "said/report.json").is_file()


def test_fragments_are_found_beside_the_recipe(folder):
    (folder / "configs").mkdir()
    (folder / "recipes").mkdir()
    model = RECIPE[RECIPE.index("  class_path: CausalLM") : RECIPE.index("data:")]
    (folder / "configs/model.yaml").write_text(re.sub("^  ", "", model, flags=re.MULTILINE))
    write_recipe(folder, {f"model:\n{model}": "model: ../configs/model.yaml\n"}, "recipes/recipe.yaml")
    assert run("fit", "--config", "recipes/recipe.yaml") == 0
    assert run("fit", "--config", "recipe.yaml", "--run_dir", "plain") == 0
    assert results(folder / "run") == results(folder / "plain")
    assert run("fit", "--config", "run/recipe.yaml", "--run_dir", "again") == 0  # without the fragment's file
    assert results(folder / "again") == results(folder / "run")


def test_sigterm_is_heeded_outside_of_lightnings_loops_too(folder, monkeypatch, capsys):
    monkeypatch.setattr(StageRunner, "compress", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert run("order", "--config", "recipe.yaml") == 128 + signal.SIGTERM
    assert "stopped. " in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_its_own_status(number, folder, monkeypatch, capsys):
    """Lightning ends with 1 after SIGINT and with 0, success, after SIGTERM."""
    whole = StageRunner.apply

    def applying(runner, stage, place):
        if stage.name == "quantize":
            step = runner.data.module.validation_step

            def stopped(*arguments):
                signal.raise_signal(number)
                return step(*arguments)

            monkeypatch.setattr(runner.data.module, "validation_step", stopped)
        return whole(runner, stage, place)

    monkeypatch.setattr(StageRunner, "apply", applying)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run("fit", "--config", "recipe.yaml") == 128 + number
    finally:
        signal.signal(signal.SIGINT, before)
    assert "--ckpt_path last" in capsys.readouterr().err
    monkeypatch.setattr(StageRunner, "apply", whole)
    measured = [json.loads(line)["name"] for line in (folder / "run/records.jsonl").read_text().splitlines()]
    assert measured == ["dense", "prune"]
    assert run("fit", "--config", "recipe.yaml", "--ckpt_path", "last") == 0


def test_a_second_run_moves_the_first_aside(folder, capsys):
    assert run("fit", "--config", "recipe.yaml") == 0
    first = {path.name: path.read_bytes() for path in (folder / "run").iterdir() if path.is_file()}
    capsys.readouterr()
    for number in (1, 2):
        assert run("fit", "--config", "recipe.yaml", "--stages.quantize.bits", str(4 + number)) == 0
        assert capsys.readouterr().out.startswith(f"run held an earlier run; it is now run.{number}.\n")
    assert {path.name: path.read_bytes() for path in (folder / "run.1").iterdir() if path.is_file()} == first
    assert run("validate", "--run_dir", "run.1") == 0


OWN_MODULE = """
from tiny import Regressor, regression_loader


class WithData(Regressor):
    def train_dataloader(self):
        return regression_loader(24)

    def val_dataloader(self):
        return regression_loader(16, seed=1)
"""


def test_a_module_with_data_of_its_own_needs_no_data_section(folder):
    (folder / "own_module.py").write_text(OWN_MODULE)
    stages = "{prune: {class_path: Wanda, init_args: {sparsity: 0.5}}}"
    arguments = ["--model", "own_module.WithData", "--trainer.accelerator", "cpu", "--stages", stages]
    assert run("fit", *arguments, "--run_dir", "run") == 0
    assert [list(stage["metrics"]) for stage in stages_of(folder / "run")] == [["mse"], ["mse"]]


# What a run leaves


def test_report_draws_the_table_of_the_end_of_the_run(folder, capsys):
    for command in ("fit", "order"):
        assert run(command, "--config", "recipe.yaml", "--run_dir", command) == 0
        at_the_end = capsys.readouterr().out
        assert run("report", command) == 0
        again = capsys.readouterr().out
        assert at_the_end.endswith(again)
        assert again.endswith(f"{command}/report.html: this report with plots. {command}/report.md: as text.\n")
        assert "Load it with pqqp_lightning.load" in at_the_end


def test_last_of_a_finished_run_changes_nothing(folder, capsys):
    assert run("fit", "--config", "recipe.yaml") == 0
    records, table = (folder / "run/records.jsonl").read_bytes(), capsys.readouterr().out
    assert run("fit", "--config", "recipe.yaml", "--ckpt_path", "last") == 0
    assert capsys.readouterr().out == table
    assert (folder / "run/records.jsonl").read_bytes() == records


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_runs_checkpoint_measures_as_its_last_record(command, folder, capsys):
    assert run("fit", "--config", "recipe.yaml") == 0
    before = sorted((folder / "run").rglob("*"))
    capsys.readouterr()
    assert run(command, "--run_dir", "run") == 0
    measured = float(TOKENS.search(capsys.readouterr().out).group(1))
    dense, *_, last = [stage["metrics"]["perplexity"] for stage in stages_of(folder / "run")]
    assert measured == last != dense
    assert sorted((folder / "run").rglob("*")) == before
    assert run(command, "--config", "recipe.yaml", "--ckpt_path", "run") == 0
    assert float(TOKENS.search(capsys.readouterr().out).group(1)) == last
    assert run(command, "--config", "recipe.yaml") == 0  # the dense model
    assert float(TOKENS.search(capsys.readouterr().out).group(1)) == dense


def test_the_model_of_a_run_loads(folder):
    assert run("fit", "--config", "recipe.yaml") == 0
    module = pqqp_lightning.load("run")
    weight = module.model.model.layers[0].mlp.up_proj.weight
    assert (weight == 0).float().mean() == 0.5
    assert all(len(torch.unique(row)) <= 15 for row in weight)


# Stages from elsewhere

STAGE = '''
"""A user's method."""

from pqqp_lightning import Stage
from pqqp_lightning.network.layers import set_weight_matrix, weight_matrix


class {name}(Stage):
    """Scales weights.

    Args:
        factor: what to multiply with.
        kwargs: of every stage.
    """

    source = "the user"
    compresses = True

    def __init__(self, factor: float = 0.5, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def compress(self, model, context):
        for name, layer in self.find_layers(model).items():
            set_weight_matrix(layer, weight_matrix(layer) * self.factor)
        return {{}}
'''


def install_third_party(site: Path) -> None:
    """A package with an entry point, as pip leaves it."""
    (site / "their_package").mkdir(parents=True)
    (site / "their_package/__init__.py").write_text(STAGE.format(name="Theirs"))
    information = site / "their_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[pqqp_lightning.callbacks]\ntheirs = their_package\n")


@pytest.fixture
def with_stages(folder, monkeypatch):
    """A working folder with a stage of one's own, one in ``callbacks/``, and one that a package brings."""
    (folder / "my_stage.py").write_text(STAGE.format(name="Mine"))
    (folder / "callbacks").mkdir()
    (folder / "callbacks/other_stage.py").write_text(STAGE.format(name="Other"))
    install_third_party(folder / "site")
    monkeypatch.setenv("PYTHONPATH", str(folder / "site"))
    return folder


BARE = "--stages.a Mine --stages.a.factor 0.9 --stages.b Other --stages.b.factor 0.8 --stages.c Theirs"
DOTTED = BARE.replace("Mine", "my_stage.Mine").replace("Other", "callbacks.other_stage.Other")
DOTTED = DOTTED.replace("Theirs", "their_package.Theirs")


@pytest.mark.parametrize("names", [BARE, DOTTED], ids=["bare", "dotted"])
def test_stages_from_elsewhere_fit(names, with_stages):
    write_recipe(with_stages, {RECIPE[RECIPE.index("stages:") :]: ""})
    done = run_command(with_stages, "fit", "--config", "recipe.yaml", *names.split())
    assert (done.returncode, done.stderr) == (0, "")
    records = stages_of(with_stages / "run")
    assert [stage["method"] for stage in records] == ["", "Mine", "Other", "Theirs"]
    assert [stage["options"]["factor"] for stage in records[1:]] == [0.9, 0.8, 0.5]


def test_stages_from_elsewhere_in_every_order(with_stages):
    write_recipe(with_stages, {RECIPE[RECIPE.index("  quantize:") :]: "  mine: {class_path: Mine}\n"})
    done = run_command(with_stages, "order", "--config", "recipe.yaml", "--stages.theirs", "Theirs")
    assert (done.returncode, done.stderr) == (0, "")
    orders = json.loads((with_stages / "run/order.json").read_text())["orders"]
    assert len(orders) == 6


def test_methods_lists_stages_from_everywhere_with_their_arguments(with_stages):
    (with_stages / "broken.py").write_text(
        "from pqqp_lightning import Stage\n\nclass Broken(Stage):\n    pass\n\n1 / 0\n"
    )
    done = run_command(with_stages, "methods")
    assert done.returncode == 0
    assert done.stderr == (
        "broken.py: cannot be imported: ZeroDivisionError: division by zero. Fix it: it defines Broken.\n"
    )
    for name, module in (("Mine", "my_stage"), ("Other", "callbacks.other_stage"), ("Theirs", "their_package")):
        listed = done.stdout[done.stdout.index(f"\n{name}  {module}\n") :].split("\n\n")[0]
        assert "Scales weights." in listed
        assert "Source: the user" in listed
        assert re.search(r"factor +│ 0\.5 +│ what to multiply with\.", listed)
        assert "learning_rate" in listed
    for name in ("Finetune", "GPTQ", "Magnitude", "RTN", "SparseGPT", "Wanda"):
        assert f"\n{name}  pqqp_lightning.callbacks." in done.stdout


def test_a_package_that_cannot_be_imported_does_no_harm(with_stages):
    (with_stages / "site/their_package/__init__.py").write_text("import nothing\n")
    done = run_command(with_stages, "fit", "--config", "recipe.yaml")
    assert done.returncode == 0
    expected = "the stages of 'their_package' cannot be imported: ModuleNotFoundError: No module named 'nothing'\n"
    assert done.stderr == expected
