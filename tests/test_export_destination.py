"""Where exports go, what they say about sizes, and what a killed one leaves."""

import logging
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import tiny
import torch
from exports import checks_here, run_of  # noqa: F401  # a fixture

from pqqp_lightning.callbacks import RTN
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.export import compressed_size
from pqqp_lightning.export import export_run as module
from pqqp_lightning.export.compressed_size import compressed_remark
from pqqp_lightning.export.export_run import export_run
from pqqp_lightning.models import CausalLM
from pqqp_lightning.storage.run_folder import RunFolder


def export(out, to="hf", **options):
    return export_run(run_of("rtn4"), to=to, out=out, **{"check": False, **options})


def problems_of(out, to="hf", run=None):
    with pytest.raises(RecipeError) as refusal:
        export_run(run_of("rtn4") if run is None else run, to=to, out=out)
    return [(problem.key, problem.text) for problem in refusal.value.problems]


# --- the place ---


@pytest.mark.parametrize("out", ["", "  ", None, 3])
def test_what_is_not_a_path_is_refused(out):
    assert problems_of(out) == [("out", "is not a path")]


def test_a_run_that_is_not_a_path_is_refused_at_the_same_time():
    assert [key for key, _ in problems_of(None, run="")] == ["run", "out"]


@pytest.mark.parametrize("name", ["tokenizer", "stages", "report.json"])
def test_a_place_that_the_run_uses_is_refused(name, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_of("rtn4"), run)
    (run / "report.json").unlink()
    own = name.partition("/")[0]
    assert problems_of(run / name, run=run) == [("out", f"lies in the run's own {own}")]
    export_run(run, to="hf", out=run / "for others", check=False)
    assert (run / "for others" / "config.json").exists()


@pytest.mark.parametrize("run", ["", "model"])
def test_a_checkpoint_gets_no_other_files(run, tmp_path):
    text = "lies in the run's own checkpoint"
    out = run_of("rtn4") / "model" / "hf"
    assert problems_of(out, run=run_of("rtn4") / run) == [("out", text)]


def test_the_name_of_another_formats_file_is_refused(tmp_path):
    text = "names a file of --to gguf, and --to hf writes a folder"
    assert problems_of(tmp_path / "model.gguf") == [("out", text)]
    assert export(tmp_path / "MODEL.GGUF", to="gguf").out.is_file()


def test_a_link_to_the_run_is_the_run(tmp_path):
    (tmp_path / "link").symlink_to(run_of("rtn4"))
    assert problems_of(tmp_path / "link" / "tokenizer") == [("out", "lies in the run's own tokenizer")]


def test_a_folder_where_a_file_goes_is_refused(tmp_path):
    (tmp_path / "model.gguf").mkdir()
    assert problems_of(tmp_path / "model.gguf", to="gguf") == [("out", "is a folder, and a file is to be written")]


def test_every_file_of_a_run_is_known():
    assert {"model", "stages", "tokenizer", "records.jsonl", "run.json"} < RunFolder.file_names()


def test_a_new_parent_folder_is_named_before_anything_is_written(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        export(tmp_path / "new" / "deep" / "model")
        export(tmp_path / "new" / "deep" / "second")
    first, second = [record.message for record in caplog.records if "Writing" in record.message]
    assert f"in a new folder, {tmp_path / 'new' / 'deep'}" in first
    assert "new folder" not in second


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert export("~/model").out == tmp_path / "model"


def test_a_run_is_exported_from_its_folder_alone(tmp_path, monkeypatch):
    """The dense model and the first place of the run are gone, and the name has blanks."""
    torch.manual_seed(0)
    CausalLM(tiny.LLAMA).model.save_pretrained(tmp_path / "dense")
    trainer = tiny.trainer(tmp_path / "first", RTN(4, group_size=32))
    trainer.fit(CausalLM(str(tmp_path / "dense")), datamodule=tiny.make_data("llama", tmp_path))
    shutil.rmtree(tmp_path / "dense")
    (tmp_path / "else where").mkdir()
    (tmp_path / "first").rename(tmp_path / "else where" / "a run")
    monkeypatch.chdir(tmp_path / "else where")
    for target in ("hf", "compressed-tensors", "gguf"):
        export_run("a run", to=target, out=f"for {target}", check=False)


# --- a killed export ---


def kill_at(step, to, out):
    """Export in a forked process that kills itself as hard as possible when it comes to ``step`` of the export."""
    child = os.fork()
    if child == 0:
        try:
            setattr(module, step, lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL))
            export_run(run_of("rtn4"), to=to, out=out, check=step == "_check")
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("to", ["hf", "gguf"])
@pytest.mark.parametrize("step", ["_check", "write_card"])
def test_a_killed_export_leaves_nothing_that_looks_whole(step, to, tmp_path):
    run_of("rtn4")
    torch.set_num_threads(1)  # a forked process has no threads of torch
    out = tmp_path / ("model.gguf" if to == "gguf" else "model")
    kill_at(step, to, out)
    left = list(tmp_path.iterdir())
    assert left
    assert all(file.name.startswith(".") and file.suffix == ".tmp" for file in left)
    export(out, to=to)
    assert list(tmp_path.iterdir()) == [out]


# --- sizes ---


def test_zeros_are_said_beforehand_and_their_size_afterwards(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        done = export_run(run_of("pruned-rtn4"), to="compressed-tensors", out=tmp_path / "model", check=False)
    (before,) = [record.message for record in caplog.records if "Writing" in record.message]
    assert "zeros are kept as values" in before
    assert any(remark.startswith("The files are ") and ", with zstd " in remark for remark in done.remarks)
    assert "The files are " in (tmp_path / "model" / "README.md").read_text()
    assert not any(remark.startswith("The files are ") for remark in export(tmp_path / "dense").remarks)


def test_the_compressed_size_is_that_of_the_files(tmp_path, monkeypatch):
    zeros = Path(tmp_path / "zeros")
    zeros.mkdir()
    (zeros / "a").write_bytes(bytes(400_000) + os.urandom(400_000))
    assert re.fullmatch(r"The files are 800\.0 kB, with zstd 40\d\.\d kB\.", compressed_remark(zeros))
    (zeros / "b").write_bytes(bytes(400_000) + os.urandom(400_000))
    monkeypatch.setattr(compressed_size, "PIECE", 100_000)
    monkeypatch.setattr(compressed_size, "PIECES", 10)
    assert re.fullmatch(r"The files are 1\.6 MB, with zstd about 80\d\.\d kB\.", compressed_remark(zeros))
    monkeypatch.setattr(compressed_size.importlib.util, "find_spec", lambda name: None)
    assert re.fullmatch(r"The files are 1\.6 MB, with zlib about 80\d\.\d kB\.", compressed_remark(zeros))


def test_wider_codes_and_repeated_scales_are_said_with_their_size(tmp_path):
    done = export_run(run_of("rtn3-asymmetric"), to="gguf", out=tmp_path / "model.gguf", check=False)
    entries = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)  # of two blocks
    assert any(f"in 4 bits instead of 3 ({entries / 8e3:.1f} kB more)" in remark for remark in done.remarks)
    assert any("(128 B more); no value changes" in remark for remark in done.remarks)  # down_proj: 2 blocks a row
