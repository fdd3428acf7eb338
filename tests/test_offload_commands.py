"""What is done with the run of an offloaded model: measured, continued, exported, with its weights on disk again."""

import shutil

import pytest
import torch
from command_line import prepare, run
from exports import run_of
from safetensors.torch import load_file
from test_inference import save_tokenizer
from test_offload import all_sizes  # noqa: F401 - a fixture

from pqqp_lightning import load
from pqqp_lightning.checkpoint import load as loading
from pqqp_lightning.export.export_run import export_run
from pqqp_lightning.inference.generation import generate_text
from pqqp_lightning.network import offload
from pqqp_lightning.network.offload import offload_of
from pqqp_lightning.runs import trainer
from pqqp_lightning.storage.files import read_json


@pytest.fixture
def little_memory(monkeypatch):
    """No model fits into memory."""
    for module in (offload, loading):
        monkeypatch.setattr(module, "free_memory", lambda: 1000)


@pytest.mark.usefixtures("all_sizes")
def test_fit_and_test_of_a_run_on_disk(tmp_path, monkeypatch):
    prepare(tmp_path, monkeypatch)
    counts = []
    by_blocks = trainer.evaluate_by_blocks
    monkeypatch.setattr(trainer, "evaluate_by_blocks", lambda *a, **k: counts.append(0) or by_blocks(*a, **k))
    assert run("fit", "--config", "recipe.yaml", "--run_dir", "plain") == 0
    assert not counts
    assert run("fit", "--config", "recipe.yaml", "--model.offload", "disk") == 0
    assert len(counts) == 3
    stages, plain_stages = (read_json(tmp_path / folder / "report.json")["stages"] for folder in ("run", "plain"))
    assert [stage["metrics"] for stage in stages] == [stage["metrics"] for stage in plain_stages]
    found = []
    monkeypatch.setattr(trainer, "evaluate_by_blocks", lambda *a, **k: found.append(by_blocks(*a, **k)) or found[-1])
    for command in ("test", "validate"):
        assert run(command, "--run_dir", "run") == 0
    assert found == [[stages[-1]["metrics"]]] * 2


@pytest.mark.parametrize("name", ["rtn4", "sleb", "channels", "basis"])
@pytest.mark.usefixtures("all_sizes", "little_memory")
def test_a_run_that_is_larger_than_memory_is_loaded_onto_disk(name, monkeypatch):
    module = load(run_of(name))
    assert offload_of(module).mode == "disk"
    assert not [name for name, parameter in module.named_parameters() if parameter.is_meta]
    monkeypatch.undo()
    expected = load(run_of(name))
    assert offload_of(expected).mode == "none"
    weights = expected.state_dict()
    assert weights.keys() == module.state_dict().keys()
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, weights[key]), key
    ids = torch.arange(8)[None]
    assert torch.equal(module(ids), expected(ids))


@pytest.mark.usefixtures("all_sizes")
def test_a_run_that_is_larger_than_memory_is_continued_and_exported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    shutil.copytree(run_of("rtn4"), folder)
    save_tokenizer(folder / "tokenizer")
    expected = generate_text(folder, prompt="Hello", max_new_tokens=5).text
    export_run(folder, to="hf", out=tmp_path / "plain", check=False)
    for module in (offload, loading):
        monkeypatch.setattr(module, "free_memory", lambda: 1000)
    assert generate_text(folder, prompt="Hello", max_new_tokens=5).text == expected
    export_run(folder, to="hf", out=tmp_path / "disk", check=False)
    found, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("disk", "plain"))
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in found)
