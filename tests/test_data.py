"""Sampling, loaders, token files: what every kind of data has in common."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

import pqqp_lightning.data as data
from pqqp_lightning.data import TokenData
from pqqp_lightning.data.loaders import Windows, draw_indices, evaluation_loader, fixed_loader, train_loader
from pqqp_lightning.data.samplers import EpochSampler
from pqqp_lightning.errors import RecipeError


@pytest.fixture
def token_files(tmp_path):
    generator = np.random.default_rng(0)
    files = {}
    for name, rows in (("calibration", 10), ("evaluation", 7), ("train", 12)):
        files[name] = str(tmp_path / f"{name}.npy")
        np.save(files[name], generator.integers(0, 50, (rows, 8)).astype(np.uint16))
    return files


def gather(loader):
    return torch.cat([batch["input_ids"] for batch in loader])


def test_the_order_depends_on_seed_and_epoch_alone():
    sampler = EpochSampler(range(50), seed=3)
    first = list(sampler)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert list(sampler) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(first) == list(range(50))
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    resumed = EpochSampler(range(50), seed=3)
    resumed.set_epoch(1)
    assert list(resumed) == second
    assert list(EpochSampler(range(50), seed=4)) not in (first, second)


def test_the_order_is_drawn_when_iteration_begins():
    sampler = EpochSampler(range(50))
    iterator = iter(sampler)
    sampler.set_epoch(5)
    expected = EpochSampler(range(50))
    expected.set_epoch(5)
    assert list(iterator) == list(expected)


def test_loaders_of_evaluation_and_calibration_leave_the_global_random_state_alone():
    windows = Windows(torch.arange(12).view(6, 2))
    state = torch.get_rng_state()
    rows = gather(fixed_loader(windows, 4, 0))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(rows, torch.arange(12).view(6, 2))
    assert sorted(gather(train_loader(windows, 4, 0, 0))[:, 0].tolist()) == [0, 2, 4, 6, 8, 10]


def test_evaluation_samples_are_shared_out_once_each(monkeypatch):
    windows = Windows(torch.arange(10).view(5, 2))
    shares = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *_: 2)
    for rank in (0, 1):
        monkeypatch.setattr("torch.distributed.get_rank", lambda *_, rank=rank: rank)
        shares.append(gather(evaluation_loader(windows, 2, 0))[:, 0].tolist())
    assert shares == [[0, 4, 8], [2, 6]]
    with pytest.raises(
        RecipeError, match=r"needs at least one evaluation sample per process: got 1 for 2\. Use more samples\."
    ):
        evaluation_loader(Windows(torch.zeros(1, 2)), 2, 0)


def test_what_is_drawn_is_distinct_and_follows_the_seed():
    assert draw_indices(5, 5, seed=7) == [0, 1, 2, 3, 4]
    assert len(set(draw_indices(100, 30, seed=1))) == 30
    assert draw_indices(100, 30, seed=1) == draw_indices(100, 30, seed=1) != draw_indices(100, 30, seed=2)


def test_names_are_imported_when_asked_for():
    code = "import sys, pqqp_lightning.data; print([m for m in ('lightning', 'datasets') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert set(data.__all__) <= set(dir(data))
    with pytest.raises(AttributeError, match="TextDate"):
        _ = data.TextDate


def test_token_files_are_served_as_they_are(token_files):
    module = TokenData(**token_files, batch_size=4)
    assert module.check() == []
    module.setup("validate")
    module.setup("validate")
    evaluation = gather(module.val_dataloader())
    assert evaluation.dtype is torch.int64
    assert np.array_equal(evaluation, np.load(token_files["evaluation"]))
    assert torch.equal(gather(module.test_dataloader()), evaluation)
    assert np.array_equal(gather(module.calibration_dataloader()), np.load(token_files["calibration"]))
    assert next(iter(module.calibration_dataloader()))["input_ids"].shape == (4, 8)
    assert sorted(gather(module.train_dataloader()).tolist()) == sorted(np.load(token_files["train"]).tolist())


def test_token_samples_can_be_fewer(token_files):
    module = TokenData(**token_files, calibration_samples=3, evaluation_samples=2, seed=1)
    module.setup("fit")
    assert np.array_equal(gather(module.val_dataloader()), np.load(token_files["evaluation"])[:2])
    rows = np.load(token_files["calibration"]).tolist()
    drawn = gather(module.calibration_dataloader()).tolist()
    assert len(drawn) == 3
    assert all(row in rows for row in drawn)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((3, 8)), r"is not an array of integers \[windows, tokens\].*got float64 \[3, 8\]"),
        (np.zeros(8, int), r"is not an array of integers .*got int64 \[8\]"),
        (np.zeros((3, 1), int), r"at least two tokens each: got int64 \[3, 1\]"),
        (np.zeros((0, 8), int), r"is an empty array"),
        (np.full((1, 8), -1), r"negative token id, -1"),
        (np.array([[{}, {}]]), r"is not a readable \.npy file"),
        (b"junk", r"is not a readable \.npy file \(.*Write it with numpy\.save"),
        (b"", r"is not a readable \.npy file"),
    ],
)
def test_token_files_of_another_kind_are_refused(token_files, content, message):
    if isinstance(content, bytes):
        with open(token_files["evaluation"], "wb") as file:
            file.write(content)
    else:
        np.save(token_files["evaluation"], content)
    with pytest.raises(RecipeError, match=message):
        TokenData(**token_files).setup("validate")


def test_a_truncated_token_file_is_refused(token_files):
    with open(token_files["calibration"], "r+b") as file:
        file.truncate(150)
    with pytest.raises(RecipeError, match=r"calibration=.* is not a readable \.npy file"):
        TokenData(**token_files).setup("validate")


def test_an_archive_is_not_a_token_file(token_files, tmp_path):
    np.savez(tmp_path / "both.npz", np.zeros((2, 4), int))
    with pytest.raises(RecipeError, match="got an archive"):
        TokenData(**token_files | {"evaluation": str(tmp_path / "both.npz")}).setup("validate")


def test_token_ids_beyond_the_vocabulary_of_the_model_are_refused(token_files):
    module = TokenData(**token_files)
    module.setup("validate")
    module.trainer = SimpleNamespace(lightning_module=SimpleNamespace(vocabulary_size=40))
    with pytest.raises(RecipeError, match=r"gives a token id 49, but the model knows 40 tokens"):
        module.setup("validate")


def test_all_problems_with_token_files_are_told_at_once(tmp_path):
    module = TokenData(str(tmp_path / "a.npy"), str(tmp_path / "b.npy"), batch_size=0, num_workers=-1)
    problems = module.check()
    assert len(problems) == 4
    with pytest.raises(
        RecipeError, match=r"batch_size=0 is too small[^\0]*num_workers=-1[^\0]*does not exist \(looked at"
    ):
        module.setup("fit")


def test_more_windows_than_there_are_cannot_be_asked_for(token_files):
    with pytest.raises(
        RecipeError, match=r"evaluation_samples=8 is more than the 7 windows in .*Lower evaluation_samples"
    ):
        TokenData(**token_files, evaluation_samples=8).setup("validate")


def test_finetuning_needs_training_tokens(token_files):
    module = TokenData(token_files["calibration"], token_files["evaluation"])
    module.setup("fit")
    with pytest.raises(RecipeError, match=r"train is not set, but finetuning needs it"):
        module.train_dataloader()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("TextData", {"source": ["a.txt", "b.txt"], "sequence_length": 64, "tokenizer": "org/name"}),
        ("TextData", {"source": "python-docs", "evaluation_samples": 3}),
        ("TokenData", {"calibration": "a.npy", "evaluation": "b.npy"}),
        ("ImageData", {"train_transforms": [{"RandomCrop": {"size": 32, "padding": 4}}, "RandomHorizontalFlip"]}),
    ],
)
def test_the_command_line_builds_every_kind(name, settings, tmp_path):
    import_all = [getattr(data, each) for each in data.__all__]
    (tmp_path / "data.yaml").write_text(json.dumps({"data": {"class_path": name, "init_args": settings}}))
    cli = LightningCLI(
        BoringModel,
        LightningDataModule,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        args=[f"--config={tmp_path / 'data.yaml'}", "--data.seed=5", "--trainer.logger=false"],
    )
    assert type(cli.datamodule) in import_all
    assert type(cli.datamodule).__name__ == name
    assert cli.datamodule.seed == 5
    assert {problem.key for problem in cli.datamodule.check()} <= {"data.source", "data.calibration", "data.evaluation"}


def test_finetuning_sees_another_order_in_every_epoch(token_files):
    seen = []

    class Model(BoringModel):
        def training_step(self, batch, batch_idx):
            seen.append(batch["input_ids"][0].tolist())
            return self.layer.weight.sum()

        def validation_step(self, batch, batch_idx):
            return None

    silent = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    Trainer(accelerator="cpu", max_epochs=2, **silent).fit(Model(), TokenData(**token_files))
    first, second = seen[:12], seen[12:]
    assert first != second
    assert sorted(first) == sorted(second)
