"""Uploads to the hub, with a mocked hub: exactly the folder's files, after everything was checked."""

import re

import huggingface_hub
import pytest
import tiny
import torch
from command_line import prepare, run
from exports import run_of
from safetensors import safe_open

from pqqp_lightning import load
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.export import stock_files
from pqqp_lightning.export.export_run import CheckFailed, export_run
from pqqp_lightning.export.hub import NotUploaded
from pqqp_lightning.export.targets.hf import HuggingFace
from pqqp_lightning.models import CausalLM


class Hub:
    """What the tests see of uploads, in place of ``HfApi``."""

    def __init__(self):
        self.uploaded = {}

    def create_repo(self, repo_id, **options):
        assert options == {"repo_type": "model", "exist_ok": True}
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        files = {str(file.relative_to(folder_path)) for file in folder_path.rglob("*") if file.is_file()}
        self.uploaded[repo_id] = files


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return found


def test_the_command_uploads_exactly_the_folders_files(tmp_path, monkeypatch, capsys, hub):
    prepare(tmp_path, monkeypatch)
    words = ["export", str(run_of("rtn4")), "--to", "hf", "--out", "a model", "--check", "false"]
    assert run(*words, "--push_to_hub", "me/my-model.v2") == 0
    written = {file.name for file in (tmp_path / "a model").iterdir()}
    assert hub.uploaded == {"me/my-model.v2": written}
    assert {"README.md", "config.json", "model.safetensors"} <= written
    assert "Uploaded to https://huggingface.co/me/my-model.v2." in capsys.readouterr().out
    assert 'from_pretrained("me/my-model.v2")' in (tmp_path / "a model" / "README.md").read_text()


def test_a_folder_in_a_folder_goes_along(tmp_path, hub):
    export_run(run_of("adapters"), to="peft", out=tmp_path / "model", check=False, push_to_hub="me/adapter")
    assert {"adapter_config.json", "base/config.json", "base/model.safetensors"} <= hub.uploaded["me/adapter"]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("my-model", "it has no slash, and needs one"),
        ("me/my/model", "it has 2 slashes, and needs one"),
        ("me/", "it has nothing before or after the slash"),
        ("/model", "it has nothing before or after the slash"),
        ("me/a b ü", "it contains ' ', 'ü'"),
        ("https://hf.co/me/m", "it is an address"),
        ("me/a--b", "the hub allows no --"),
        (".me/a", "the hub allows no --, no .., no - or . at either end"),
        ("", "it has no slash"),
        (7, "it is not text"),
    ],
)
def test_what_is_not_an_id_is_refused_before_any_work(name, wrong, tmp_path, hub):
    words = f"is not an id of the hub: {re.escape(wrong)}.*Write OWNER/NAME"
    with pytest.raises(RecipeError, match=words):
        export_run(run_of("rtn4"), to="hf", out=tmp_path / "model", push_to_hub=name)
    assert not list(tmp_path.iterdir())


def test_without_a_token_nothing_is_done(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(RecipeError, match=r"needs a token of the hub, and there is none. Run hf auth login") as refusal:
        export_run(run_of("rtn4"), to="gguf", out=tmp_path / "m.gguf", dtype="f16", push_to_hub="me/model")
    assert [problem.argument for problem in refusal.value.problems] == ["dtype", "push_to_hub", "push_to_hub"]
    assert "m.gguf is a file. Name a folder in --out." in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_offline_nothing_is_done(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="needs the hub, and HF_HUB_OFFLINE is set"):
        export_run(run_of("rtn4"), to="hf", out=tmp_path / "model", push_to_hub="me/model")


def test_a_failed_check_is_not_uploaded(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(HuggingFace, "decoded", lambda self, folder: iter(()))
    with pytest.raises(CheckFailed):
        export_run(run_of("rtn4"), to="hf", out=tmp_path / "model", push_to_hub="me/model")
    assert hub.uploaded == {}


def test_a_refusal_of_the_hub_leaves_the_folder_and_says_how_to_go_on(tmp_path, hub, monkeypatch, capsys):
    def refuse(**options):
        raise ConnectionError("403 Forbidden: no write access.\nDetails")

    monkeypatch.setattr(hub, "upload_folder", refuse)
    with pytest.raises(
        NotUploaded, match=r"403 Forbidden: no write access. Run hf auth login.* Then: hf upload me/model"
    ):
        export_run(run_of("rtn4"), to="hf", out=tmp_path / "model", check=False, push_to_hub="me/model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("to", ["hf", "compressed-tensors", "gptq"])
def test_large_models_are_written_in_shards(to, tmp_path, monkeypatch):
    monkeypatch.setattr(stock_files, "SHARD", "20KB")
    export_run(run_of("rtn4"), to=to, out=tmp_path / "model", dtype="float32", check=False)
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    assert all(len(safe_open(shard, framework="pt").keys()) for shard in shards)
    loaded = CausalLM(str(tmp_path / "model")).eval()  # reads all of them
    assert torch.equal(loaded(tiny.token_rows(2)), load(run_of("rtn4")).eval()(tiny.token_rows(2)))
