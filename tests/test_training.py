"""Finetuning between stages: ordinary Lightning training that undoes nothing, whatever the optimizer or callback."""

import csv
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from interrupt import DieAt, Died
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny import RegressionData, Regressor, regression_data, regression_loader, trainer

import pqqp_lightning
from pqqp_lightning import Stage
from pqqp_lightning.callbacks import GPTQ, RTN, Finetune, LoRA, Magnitude, SparseGPT
from pqqp_lightning.checkpoint.format import read_manifest
from pqqp_lightning.data.loaders import train_loader
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.constraints import collect_constraints, constrained_layers
from pqqp_lightning.network.layers import weight_matrix
from pqqp_lightning.storage.records import read_records


def fit(folder, *stages, module=None, **options):
    """Run ``stages`` on a tiny regressor with plain DataLoaders."""
    module = module or Regressor()
    trainer(folder, *stages, **options).fit(module, regression_loader(), regression_loader(16, seed=1))
    return module


class Watch(Callback):
    """Keeps what ``look`` says at the start of every training batch, one list for each segment."""

    def __init__(self, look):
        self.look, self.segments = look, []

    def on_train_start(self, trainer, pl_module):
        self.segments.append([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.segments[-1].append(self.look(trainer, pl_module))


def rates(trainer, module):
    return [group["lr"] for group in trainer.optimizers[0].param_groups]


def logged(folder, column):
    """(step, value) of a metric in the run's CSV log."""
    with next(Path(folder).glob("logs/version_0/metrics.csv")).open() as file:
        return [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row.get(column)]


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}),
}


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pruned_weights_stay_zero_under_any_optimizer(tmp_path, optimizer, options):
    kind, arguments = OPTIMIZERS[optimizer]
    revived = Watch(
        lambda _, module: sum(int((weight_matrix(la)[~c.mask()] != 0).sum()) for _, la, c in constrained_layers(module))
    )
    changed = Watch(lambda _, module: module.blocks[0].up.weight.detach().clone())
    module = Regressor(optimizer=kind, **arguments)
    fit(tmp_path, SparseGPT(0.5, epochs=3), module=module, callbacks=[revived, changed], **options)
    assert not any(revived.segments[0])
    first, last = changed.segments[0][0], module.blocks[0].up.weight
    kept = collect_constraints(module)["blocks.0.up"].mask()
    assert float((first != last)[kept].float().mean()) > 0.7  # some units never fire
    assert int((last == 0).sum()) == last.numel() // 2
    assert read_records(tmp_path)[-1]["sparsity"] == 0.5


@pytest.mark.parametrize(
    "stages",
    [
        lambda: [GPTQ(4, epochs=1)],
        lambda: [RTN(4), Finetune(1)],
        lambda: [RTN(4, targets=["up"]), Magnitude(0.5, epochs=1)],
    ],
)
def test_finetuning_the_weights_of_a_quantized_layer_is_refused(tmp_path, stages):
    with pytest.raises(
        RecipeError, match=r"epochs=1 would move \d layers .* off the grid of stage '(gptq|rtn)'.*freeze"
    ):
        fit(tmp_path / "run", *stages())
    assert not (tmp_path / "run").exists()


def test_frozen_quantized_layers_may_be_followed_by_finetuning(tmp_path):
    module = Regressor()
    module.blocks.requires_grad_(False)
    inlet = module.inlet.weight.detach().clone()
    fit(tmp_path, RTN(4), Finetune(1), module=module)
    assert not torch.equal(inlet, module.inlet.weight)
    assert read_records(tmp_path)[-1]["constraints_verified"]


def test_finetuning_may_stand_first(tmp_path):
    fit(tmp_path, Finetune(2), SparseGPT(0.5), Finetune(1))
    dense, first, prune, last = read_records(tmp_path)
    assert [r["name"] for r in (first, prune, last)] == ["finetune", "sparsegpt", "finetune-2"]
    assert first["metrics"]["mse"] < dense["metrics"]["mse"]
    assert first["metrics_before_finetuning"] == dense["metrics"]
    assert last["metrics"]["mse"] < prune["metrics"]["mse"]
    assert first["compression_rate"] == 1.0


SCHEDULES = {
    "none": None,
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=[0.4, 0.04], total_steps=5, pct_start=0.4),
    "warm-up, then cosine": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.25, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(o, 2, eta_min=0.01),
        ],
        milestones=[2],
    ),
}


class TwoGroups(Regressor):
    """Two parameter groups whose learning rates are ten to one."""

    def __init__(self, schedule):
        super().__init__()
        self._schedule = schedule

    def configure_optimizers(self):
        inner = list(self.blocks.parameters())
        groups = [{"params": inner, "lr": 0.2}, {"params": self.head.parameters(), "lr": 0.02}]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        return optimizer if self._schedule is None else ([optimizer], [self._schedule(optimizer)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_learning_rate_of_a_segment_scales_every_group_and_the_whole_schedule(tmp_path, name):
    seen = Watch(rates)
    stages = [Finetune(4), Finetune(4, learning_rate=0.003), Finetune(4)]
    fit(tmp_path, *stages, module=TwoGroups(SCHEDULES[name]), callbacks=[seen], limit_train_batches=1)
    own, set_by_stage, own_again = seen.segments
    assert own == own_again
    assert len(own) == 4
    peak = {"one cycle": 0.4}.get(name, 0.2)
    expected = [[rate * 0.003 / peak for rate in step] for step in own]
    assert set_by_stage == [pytest.approx(step) for step in expected]
    if name in ("none", "step", "one cycle"):
        assert max(rate for step in set_by_stage for rate in step) == pytest.approx(0.003)


def test_learning_rate_monitor_logs_every_segment(tmp_path):
    monitor = LearningRateMonitor(logging_interval="step")
    fit(tmp_path, Finetune(1), Finetune(1, learning_rate=0.001), callbacks=[monitor])
    assert [value for _, value in logged(tmp_path, "lr-SGD")] == [0.05] * 3 + [0.001] * 3


class EpochCounter(Regressor):
    """A schedule over the segment: from 1 to 0 in the trainer's epochs."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        epochs, steps = self.trainer.max_epochs, self.trainer.estimated_stepping_batches
        assert steps == 3 * epochs
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=epochs)]


def test_a_schedule_depends_on_the_segments_own_epochs(tmp_path):
    seen = Watch(rates)
    fit(
        tmp_path,
        Finetune(2, learning_rate=0.01),
        Finetune(4, learning_rate=0.01),
        module=EpochCounter(),
        callbacks=[seen],
    )
    by_epoch = [[step[0] for step in segment[::3]] for segment in seen.segments]
    assert by_epoch == [pytest.approx([0.01, 0.005]), pytest.approx([0.01, 0.0075, 0.005, 0.0025])]


class Falling(Regressor):
    """Logs a score that gets worse in every epoch of a segment."""

    def on_validation_epoch_end(self):
        self.log("score", float(self.trainer.current_epoch))


def test_early_stopping_ends_a_segment_and_starts_afresh_in_the_next(tmp_path):
    stopping, seen = EarlyStopping("score", patience=1), Watch(lambda trainer, _: trainer.current_epoch)
    fit(
        tmp_path,
        Finetune(5),
        SparseGPT(0.5, epochs=5),
        RTN(8, ignore=None),
        module=Falling(),
        callbacks=[stopping, seen],
    )
    assert [sorted(set(segment)) for segment in seen.segments] == [[0, 1], [0, 1]]
    assert [record["name"] for record in read_records(tmp_path)] == ["dense", "finetune", "sparsegpt", "rtn"]


@pytest.mark.parametrize("dirpath", [None, "kept"])
def test_model_checkpoint_writes_each_segment_into_a_folder_of_its_own(tmp_path, dirpath):
    checkpoint = ModelCheckpoint(
        dirpath and tmp_path / dirpath, "{epoch}", monitor="mse", save_top_k=1, save_last=True, every_n_epochs=1
    )
    module = fit(tmp_path, Finetune(1), SparseGPT(0.5, epochs=1), callbacks=[checkpoint])
    files = sorted(tmp_path.rglob("*.ckpt"))
    assert [(f.parent.name, f.name) for f in files] == [
        (stage, name) for stage in ("finetune", "sparsegpt") for name in ("epoch=0.ckpt", "last.ckpt")
    ]
    assert checkpoint.best_model_path == str(files[2])
    saved = torch.load(files[2], weights_only=True)["state_dict"]
    assert torch.equal(saved["blocks.0.up.weight"], module.blocks[0].up.weight)
    assert not torch.equal(torch.load(files[0], weights_only=True)["state_dict"]["head.weight"], saved["head.weight"])


def test_the_loggers_step_goes_on_over_segments(tmp_path):
    fit(tmp_path, Finetune(2), SparseGPT(0.5), Finetune(1))
    steps = [step for step, _ in logged(tmp_path, "train_loss")]
    assert steps == list(range(9))
    evaluations = [step for step, _ in logged(tmp_path, "mse")]
    assert evaluations == sorted(evaluations)


def test_a_logger_of_the_users_own_is_used(tmp_path):
    logger = CSVLogger(tmp_path, name="mine")
    fit(tmp_path / "run", Finetune(1), logger=logger)
    assert (tmp_path / "mine" / "version_0" / "metrics.csv").is_file()
    assert not (tmp_path / "run" / "logs").exists()


@pytest.mark.parametrize(
    ("stages", "epochs", "message"),
    [
        (
            lambda: [SparseGPT(0.5, epochs=2), Finetune(1)],
            5,
            r"max_epochs=5 contradicts .* 3 in all \(sparsegpt 2 \+ finetune 1\)",
        ),
        (lambda: [SparseGPT(0.5)], 1, r"max_epochs=1 contradicts .* 0 in all \(no stage has any\)"),
    ],
)
def test_max_epochs_that_contradict_the_stages_are_refused(tmp_path, stages, epochs, message):
    with pytest.raises(RecipeError, match=message):
        fit(tmp_path, *stages(), max_epochs=epochs)


def test_max_epochs_that_agree_with_the_stages_are_accepted_again_and_again(tmp_path):
    engine = trainer(tmp_path, Finetune(2), Finetune(1), max_epochs=3)
    for _ in range(2):
        engine.fit(Regressor(), regression_loader(), regression_loader(16, seed=1))
    assert len(read_records(tmp_path)) == 3


def test_fit_without_stages_is_ordinary_training(tmp_path):
    ours = fit(tmp_path / "ours", max_epochs=2)
    theirs = Regressor()
    plain = LightningTrainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    plain.fit(theirs, regression_loader(), regression_loader(16, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert [r["name"] for r in read_records(tmp_path / "ours")] == ["dense", "training"]
    loaded = pqqp_lightning.load(tmp_path / "ours")
    assert torch.equal(loaded.head.weight, ours.head.weight)


def test_fit_without_stages_or_epochs_measures_and_saves_the_dense_model(tmp_path):
    module = fit(tmp_path)
    assert [r["name"] for r in read_records(tmp_path)] == ["dense"]
    assert torch.equal(pqqp_lightning.load(tmp_path).head.weight, module.head.weight)


def test_fast_dev_run_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    batches = Watch(lambda trainer, _: trainer.max_epochs)
    module = fit(
        tmp_path / "run", SparseGPT(0.5, epochs=3), RTN(4, targets=["head"]), callbacks=[batches], fast_dev_run=True
    )
    assert batches.segments == [[1]]
    assert sum(1 for _ in constrained_layers(module)) == 5
    assert not (tmp_path / "run").exists()


class Dropping(Stage):
    """A third party's stage that writes weights without a look at their constraints."""

    source = "none"
    compresses = True

    def __init__(self, fill=1.0, **kwargs):
        super().__init__(**kwargs)
        self.fill = fill

    def compress(self, model, context):
        for layer in self.find_layers(model).values():
            with torch.no_grad():
                layer.weight[0].fill_(self.fill)
        return {}


def test_a_stage_that_revives_pruned_weights_is_caught(tmp_path):
    with pytest.raises(
        RecipeError, match=r"dropping \(Dropping\): broke .* 4 layers .*: \d pruned entries are not zero"
    ):
        fit(tmp_path, SparseGPT(0.5), Dropping(), GPTQ(4))
    assert [record["name"] for record in read_records(tmp_path)] == ["dense", "sparsegpt"]


def test_what_a_stage_undoes_with_leave_is_on_record(tmp_path):
    module = fit(tmp_path, SparseGPT(0.5), Dropping(targets=["0.up"], allow_undo=True), RTN(8, targets=["down"]))
    dropping, last = read_records(tmp_path)[-2:]
    assert len(dropping["notes"]) == 1
    assert dropping["notes"][0].startswith("undone in blocks.0.up: ")
    assert "pruned entries are not zero any more" in dropping["notes"][0]
    assert dropping["pruned"] == pytest.approx(0.375)
    assert last["constraints_verified"]
    assert "blocks.0.up" not in [name for name, _, c in constrained_layers(module) if c.mask_bits is not None]


@pytest.mark.parametrize(("fill", "lost", "kept"), [(0.7371, "grid", "mask"), (None, "mask", "grid")])
def test_undoing_one_promise_keeps_the_other(tmp_path, fill, lost, kept):
    class Halfway(Dropping):
        def compress(self, model, context):
            for _, layer, c in constrained_layers(model):
                matrix, mask = weight_matrix(layer), c.mask()
                changed = torch.where(mask, 0.7371, 0.0) if fill else torch.where(mask, matrix, matrix.max())
                layer.weight.data.copy_(changed)
            return {}

    module = fit(tmp_path, SparseGPT(0.5), RTN(4, group_size="tensor"), Halfway(allow_undo=True))
    assert len(collect_constraints(module)) == 4
    for constraints in collect_constraints(module).values():
        parts = {"mask": constraints.mask_bits, "grid": constraints.grid}
        assert parts[lost] is None
        assert parts[kept] is not None
    record = read_records(tmp_path)[-1]
    assert len(record["notes"]) == 4
    assert record["constraints_verified"]


def test_a_pruning_stage_may_leave_a_grid_with_leave(tmp_path):
    class Rough(SparseGPT):
        def compress(self, model, context):
            for layer in self.find_layers(model).values():
                matrix = weight_matrix(layer) * 1.01
                self.write_mask(layer, matrix, matrix.abs() > matrix.abs().median(), None)
            return {}

    with pytest.raises(RecipeError, match="entries are off the 4-bit grid"):
        fit(tmp_path / "refused", RTN(4), Rough(0.5))
    module = fit(tmp_path / "run", RTN(4), Rough(0.5, allow_undo=True))
    assert all(c.grid is None and c.mask_bits is not None for c in collect_constraints(module).values())


def test_each_segment_trains_with_an_optimizer_of_its_own(tmp_path):
    kept = []
    weights = Watch(lambda trainer, module: kept.append(trainer.optimizers[0]) or module.head.weight.detach().clone())
    fit(tmp_path, Finetune(1), SparseGPT(0.5, epochs=1), Finetune(1), callbacks=[weights])
    assert len({id(o) for o in kept}) == 3
    for segment in weights.segments:
        assert not torch.equal(segment[0], segment[-1])


def test_an_optimizer_starts_each_segment_without_momentum(tmp_path):
    module = Regressor(optimizer=torch.optim.SGD, lr=0.05, momentum=0.9)
    states = Watch(lambda trainer, _: len(trainer.optimizers[0].state))
    fit(tmp_path, Finetune(1), Finetune(1), module=module, callbacks=[states])
    assert [segment[0] for segment in states.segments] == [0, 0]
    assert [segment[1] > 0 for segment in states.segments] == [True, True]


@pytest.mark.parametrize("own_data", [False, True])
def test_the_same_seed_gives_the_same_run(tmp_path, own_data):
    results = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        seed_everything(seed)
        module = Regressor(optimizer=torch.optim.AdamW, dropout=0.3, lr=0.01)
        engine = trainer(tmp_path / name, SparseGPT(0.5, epochs=2), Finetune(1))
        torch.rand(len(results))  # whatever happened before
        if own_data:
            engine.fit(module, datamodule=RegressionData())
        else:
            engine.fit(module, regression_loader(shuffle=True), regression_loader(16, seed=1))
        results.append([p.detach().clone() for p in module.parameters()])
    a, b, c = results
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(a[2:6], c[2:6], strict=True))


def test_a_datamodule_that_sets_up_stage_by_stage_gives_calibration_data(tmp_path):
    module = Regressor()
    trainer(tmp_path, SparseGPT(0.5, epochs=1), GPTQ(4)).fit(module, datamodule=RegressionData())
    assert read_records(tmp_path)[-1]["sparsity"] >= 0.5


def test_a_resumed_python_run_sets_its_data_up(tmp_path, monkeypatch):
    """In Python too: what evaluating the dense model sets up is there when a resumed run skips that."""

    def dies(self, model, context):
        raise Died

    stages = lambda: [SparseGPT(0.5, epochs=1), GPTQ(4)]  # noqa: E731
    undisturbed = Regressor()
    trainer(tmp_path / "undisturbed", *stages()).fit(undisturbed, datamodule=RegressionData())
    with monkeypatch.context() as patch:
        patch.setattr(GPTQ, "compress", dies)
        killed = trainer(tmp_path / "run", *stages())
        with pytest.raises(Died):
            killed.fit(Regressor(), datamodule=RegressionData())
    resumed = Regressor()
    trainer(tmp_path / "run", *stages()).fit(resumed, datamodule=RegressionData(), ckpt_path="last")
    assert all(torch.equal(a, b) for a, b in zip(undisturbed.parameters(), resumed.parameters(), strict=True))


class OwnLoaders(Regressor):
    """A module that brings its own data."""

    def train_dataloader(self):
        return regression_loader()

    def val_dataloader(self):
        return regression_loader(16, seed=1)


def test_a_module_may_bring_its_own_data(tmp_path):
    module = OwnLoaders()
    trainer(tmp_path, SparseGPT(0.5, epochs=1), GPTQ(4)).fit(module)
    assert isinstance(module, LightningModule)
    assert read_records(tmp_path)[-1]["sparsity"] >= 0.5


class Noisy(torch.utils.data.Dataset):
    """Training data with random augmentation."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        x, y = regression_data(12)[index]
        return x + torch.randn(8), y


def resumed(folder, stages, loader, dying, **options):
    """(module of an undisturbed run, module of a run that died and was resumed)."""
    modules = []
    for name, callbacks in (("undisturbed", []), ("died", [dying]), ("died", [])):
        module = Regressor(optimizer=torch.optim.AdamW, dropout=0.2, lr=0.01)
        engine = trainer(folder / name, *stages(), callbacks=callbacks, **options)
        torch.rand(len(modules) + 1)  # processes differ in what they drew before
        ckpt_path = "last" if name == "died" and not callbacks else None
        with pytest.raises(Died) if callbacks else nullcontext():
            engine.fit(module, loader(), regression_loader(16, seed=1), ckpt_path=ckpt_path)
        modules.append(module)
    return modules[0], modules[2]


def assert_equal(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


LOADERS = {
    "epoch sampler": lambda **options: train_loader(Noisy(), 4, seed=5, **options),
    "shuffle": lambda num_workers: torch.utils.data.DataLoader(Noisy(), 4, shuffle=True, num_workers=num_workers),
}


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("order", LOADERS)
def test_a_resumed_epoch_sees_the_same_augmented_data_in_the_same_order(tmp_path, order, workers, epoch):
    a, b = resumed(
        tmp_path, lambda: [SparseGPT(0.5, epochs=3)], lambda: LOADERS[order](num_workers=workers), DieAt(1, epoch, 1)
    )
    assert_equal(a, b)


def test_a_resumed_run_goes_on_with_the_loggers_step(tmp_path):
    resumed(tmp_path, lambda: [Finetune(2), Finetune(2)], regression_loader, DieAt(2, 0, 0))
    with next(tmp_path.glob("died/logs/version_1/metrics.csv")).open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert steps == list(range(6, 12))


@pytest.mark.parametrize("dies", [DieAt(1, 1, 0), DieAt(2, 0, 0)], ids=["while it is finetuned", "in a later stage"])
def test_early_stopping_and_model_checkpoint_resume_with_the_run(tmp_path, dies):
    def options():
        return [EarlyStopping("mse", patience=2), ModelCheckpoint(monitor="mse", dirpath=tmp_path / "kept")]

    a, b = resumed(tmp_path, lambda: [Finetune(3), Finetune(3), *options()], regression_loader, dies)
    assert_equal(a, b)


class Narrow(Stage):
    """Keeps some units of every block: another structure, and a plan of tensors to rebuild it from."""

    source = "none"
    compresses = True

    def compress(self, model, context):
        kept = torch.randperm(16)[:10].sort().values
        for block in model.blocks:
            up, down = block.up, block.down
            self._rebuild(block, len(kept))
            block.up.load_state_dict({"weight": up.weight[kept], "bias": up.bias[kept]})
            block.down.load_state_dict({"weight": down.weight[:, kept], "bias": down.bias})
        return {"kept": kept, "units": len(kept)}

    def restructure(self, model, plan):
        assert len(plan["kept"]) == plan["units"]
        for block in model.blocks:
            assert block.up.out_features == 16, "restructured twice"
            self._rebuild(block, plan["units"])

    @staticmethod
    def _rebuild(block, units):
        block.up, block.down = torch.nn.Linear(8, units), torch.nn.Linear(units, 8)


@pytest.mark.parametrize("dies", [DieAt(1, 1, 1), DieAt(2, 1, 0)], ids=["while it is finetuned", "in a later stage"])
def test_a_stage_that_changes_the_structure_resumes_from_its_plan(tmp_path, dies):
    stages = lambda: [Narrow(epochs=2), SparseGPT(0.5, epochs=2), RTN(8)]  # noqa: E731
    a, b = resumed(tmp_path, stages, regression_loader, dies)
    assert b.blocks[0].up.out_features == 10
    assert_equal(a, b)
    loaded = pqqp_lightning.load(tmp_path / "died")
    assert_equal(a, loaded)
    plans = [read_manifest(tmp_path / name / "model")["plans"] for name in ("undisturbed", "died")]
    assert plans[0] == plans[1]
    assert plans[0][0]["tensors"] == ["kept"]


def test_the_working_folder_is_never_a_run_folder(tmp_path, monkeypatch):
    """What a run folder held is moved aside: that must not happen to the folder a user works in."""
    monkeypatch.chdir(tmp_path)
    for folder, what in ((".", "is"), (str(tmp_path), "is"), (str(tmp_path.parent), "contains")):
        with pytest.raises(RecipeError, match=f"{what} the current folder"):
            trainer(folder, Magnitude(0.5)).fit(Regressor(), val_dataloaders=regression_loader())
    assert not list(tmp_path.iterdir())


def test_without_a_run_folder_a_run_goes_to_one_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet = pqqp_lightning.Trainer(callbacks=[Magnitude(0.5)], accelerator="cpu", enable_progress_bar=False)
    quiet.fit(Regressor(), val_dataloaders=regression_loader())
    assert (tmp_path / "runs" / "run" / "report.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    "stages",
    [
        lambda: [SparseGPT(0.5), Finetune(1, learning_rate=1e30)],
        lambda: [SparseGPT(0.5, epochs=1, learning_rate=1e30)],
        lambda: [SparseGPT(0.5), LoRA(2, learning_rate=1e30)],
    ],
)
def test_training_that_diverges_names_the_learning_rate_and_loses_nothing(tmp_path, stages):
    with pytest.raises(RecipeError, match=r"not finite after training.*learning_rate \(1e\+30 now\)"):
        fit(tmp_path, *stages())
    assert [r["name"] for r in read_records(tmp_path)][:1] == ["dense"]
    assert list(tmp_path.glob("stages/1-*/model.safetensors"))
