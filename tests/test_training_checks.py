"""What a model lacks to be measured or trained is a problem of the recipe, known before any work."""

import pytest
import tiny
import torch
from lightning.pytorch import LightningModule
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from pqqp_lightning.callbacks import Finetune, GradualPruning, Magnitude, Wanda
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.experiments import search_orders
from pqqp_lightning.runs.run_data import FALLBACK_SAMPLES, RunData
from pqqp_lightning.runs.training_checks import vanishing_epsilon
from pqqp_lightning.stages.distillation import Distillation
from pqqp_lightning.storage.records import read_records

TRAINS = {"epochs": 1}


class NoOptimizers(tiny.Regressor):
    configure_optimizers = LightningModule.configure_optimizers


class NoneOptimizers(tiny.Regressor):
    def configure_optimizers(self):
        return None


class NoTrainingStep(tiny.Regressor):
    training_step = LightningModule.training_step


class NoValidationStep(tiny.Regressor):
    validation_step = LightningModule.validation_step


class OldHook(tiny.Regressor):
    def validation_epoch_end(self, outputs):
        pass


class ByHand(tiny.Regressor):
    """Steps its optimizer in ``training_step``, as often for a batch as ``steps`` says."""

    def __init__(self, steps=1, **options):
        super().__init__(**options)
        self.automatic_optimization = False
        self.steps = steps

    def training_step(self, batch, batch_idx):
        for _ in range(self.steps):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = F.mse_loss(self(batch[0]), batch[1])
            self.manual_backward(loss)
            optimizer.step()
        return loss


class ByHandAlone(ByHand):
    """Lightning does not know its optimizer."""

    def configure_optimizers(self):
        return None


def fit(folder, module, *stages, train=None, validation=None, **options):
    train = tiny.regression_loader() if train is None else train
    validation = tiny.regression_loader(16, 1) if validation is None else validation  # an empty loader is falsy
    tiny.trainer(folder, *stages, **options).fit(module, train, validation)
    return module


@pytest.mark.parametrize(
    ("module", "stage", "options", "blamed", "words"),
    [
        (NoOptimizers, TRAINS, {}, "stages.magnitude.epochs", "needs a configure_optimizers in NoOptimizers"),
        (NoneOptimizers, TRAINS, {}, "stages.magnitude.epochs", "configure_optimizers of NoneOptimizers returns None"),
        (NoTrainingStep, TRAINS, {}, "stages.magnitude.epochs", "needs a training_step in NoTrainingStep"),
        (NoValidationStep, {}, {}, "model", "NoValidationStep has no validation_step"),
        (OldHook, {}, {}, "model", "validation_epoch_end, which Lightning does not call since version 2"),
        (tiny.Regressor, TRAINS, {"limit_train_batches": 0}, "trainer.limit_train_batches", "leaves no training"),
        (ByHand, TRAINS, {"gradient_clip_val": 0.1}, "trainer.gradient_clip_val", "ByHand optimizes by hand"),
        (ByHand, TRAINS, {"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches", "optimizes by hand"),
        (ByHand, {**TRAINS, "distill": Distillation(loss="mse")}, {}, "stages.magnitude.distill", "by hand"),
        (ByHandAlone, {**TRAINS, "learning_rate": 0.1}, {}, "stages.magnitude.learning_rate", "returns None"),
    ],
)
def test_is_refused_before_any_work(module, stage, options, blamed, words, tmp_path):
    with pytest.raises(RecipeError) as error:
        fit(tmp_path / "run", module(), Magnitude(0.5, **stage), **options)
    [problem] = error.value.problems
    assert problem.key == blamed
    assert words in problem.text
    assert problem.way_out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", [NoOptimizers, NoneOptimizers, NoTrainingStep])
def test_is_not_needed_without_training(module, tmp_path):
    fit(tmp_path, module(), Magnitude(0.5))


class LogsNothing(tiny.Regressor):
    def validation_step(self, batch, batch_idx):
        self(batch[0])


def test_a_validation_that_logs_nothing_is_refused_before_the_first_stage(tmp_path):
    with pytest.raises(RecipeError, match="validation_step of LogsNothing logs no metric"):
        fit(tmp_path / "run", LogsNothing(), Magnitude(0.5))
    assert not (tmp_path / "run" / "stages").exists()
    trainer = tiny.trainer(tmp_path / "order", Magnitude(0.5), Wanda(0.6))
    with pytest.raises(RecipeError, match="logs no metric"):
        search_orders(trainer, LogsNothing(), tiny.RegressionData())
    fit(tmp_path / "unmeasured", LogsNothing(), Magnitude(0.5), limit_val_batches=0)


def test_evaluation_data_without_a_batch_is_refused(tmp_path):
    empty = DataLoader(tiny.regression_data(3), batch_size=8, drop_last=True)
    with pytest.raises(RecipeError, match="the evaluation data has no batch"):
        fit(tmp_path / "run", tiny.Regressor(), Magnitude(0.5), validation=empty)


def test_training_data_without_a_batch_is_refused(tmp_path):
    empty = DataLoader(tiny.regression_data(3), batch_size=8, drop_last=True)
    with pytest.raises(RecipeError, match="the training data has no batch"):
        fit(tmp_path / "run", tiny.Regressor(), Magnitude(0.5), Finetune(1), train=empty)
    assert not (tmp_path / "run").exists()
    fit(tmp_path / "untrained", tiny.Regressor(), Magnitude(0.5), train=empty)


def test_training_by_hand_gets_the_stages_learning_rate_and_keeps_zeros(tmp_path):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)  # names no metric: it is stepped by hand

    def stage():
        return Magnitude(0.5, epochs=2, learning_rate=0.01)

    by_hand = fit(tmp_path / "by-hand", ByHand(schedule=schedule, momentum=0.9, lr=0.3), stage())
    automatic = fit(tmp_path / "automatic", tiny.Regressor(momentum=0.9, lr=0.3), stage())
    for (name, value), expected in zip(by_hand.state_dict().items(), automatic.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    assert (by_hand.blocks[0].up.weight == 0).sum() == 64


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_gradual_pruning_counts_batches_where_the_model_steps_by_hand(steps, tmp_path):
    class Steps(ByHand):
        def training_step(self, batch, batch_idx):
            seen.append(int((self.blocks[0].up.weight == 0).sum()))
            return super().training_step(batch, batch_idx) if self.steps else None

    seen: list[int] = []
    module = fit(tmp_path, Steps(steps), GradualPruning(0.5, epochs=4, ramp=1.0))
    growing = list(seen)
    assert growing == sorted(growing)
    assert len(set(growing)) > 8, "of 12 batches"
    assert (module.blocks[0].up.weight == 0).sum() == 64


# float16


def adam(**options):
    return tiny.Regressor(optimizer=torch.optim.AdamW, lr=1e-3, **options)


def test_an_epsilon_that_float16_rounds_to_zero_is_refused_before_any_work(tmp_path):
    with pytest.raises(RecipeError, match="AdamW's eps=1e-08 is 0 in float16") as error:
        fit(tmp_path / "run", adam(), Magnitude(0.5, epochs=1), precision="16-true")
    [problem] = error.value.problems
    assert (problem.key, problem.value) == ("trainer.precision", "16-true")
    assert not (tmp_path / "run").exists()
    fit(tmp_path / "larger", adam(eps=1e-4), Magnitude(0.5, epochs=1), precision="16-true")
    fit(tmp_path / "untrained", adam(), Magnitude(0.5), precision="16-true")


def test_a_model_in_float16_is_refused_as_well(tmp_path):
    class Halved(tiny.Regressor):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [part.half() for part in batch]

    module = Halved(optimizer=torch.optim.Adam, lr=1e-3).half()
    with pytest.raises(RecipeError, match="Adam's eps=1e-08 is 0 in float16"):
        fit(tmp_path, module, Magnitude(0.5, epochs=1))


def test_divergence_names_the_epsilon_that_could_not_be_seen_before(tmp_path):
    class AsksItsTrainer(tiny.Regressor):
        def configure_optimizers(self):
            assert self.trainer.training
            return torch.optim.AdamW(self.parameters(), lr=1e-12)

    with pytest.raises(RecipeError, match="eps=1e-08 is 0 in float16") as error:
        fit(tmp_path, AsksItsTrainer(), Magnitude(0.5, epochs=1), precision="16-true")
    assert "bf16-true" in error.value.problems[0].way_out


def test_epsilons_that_survive_are_not_blamed():
    half = torch.zeros(3, dtype=torch.float16, requires_grad=True)
    optimizers = [
        torch.optim.SGD([half], lr=1),
        torch.optim.AdamW([half], eps=1e-4),
        torch.optim.AdamW([half.detach().float()]),
        torch.optim.AdamW([half.detach().bfloat16()]),
    ]
    assert vanishing_epsilon(optimizers) == ""
    assert vanishing_epsilon([*optimizers, torch.optim.RMSprop([half])]) == "RMSprop's eps=1e-08 is 0 in float16"


# loaders


class Stream(IterableDataset):
    """A dataset that is only iterated, of a known length."""

    def __init__(self, samples=24):
        self.data = tiny.regression_data(samples)

    def __iter__(self):
        return (self.data[index] for index in range(len(self.data)))

    def __len__(self):
        return len(self.data)


class Batches(torch.utils.data.Dataset):
    """Its items are whole batches."""

    def __init__(self, samples=24, size=8):
        data = tiny.regression_data(samples)
        self.items = [data[first : first + size] for first in range(0, samples, size)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Unnamed:
    """An iterable that is no DataLoader."""

    def __iter__(self):
        return iter(tiny.regression_loader())


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Stream(), batch_size=8),
        DataLoader(Batches(), batch_size=None),
        [tiny.regression_loader()],
        Unnamed(),
        DataLoader(tiny.regression_data(), batch_sampler=[[0, 1, 2], list(range(3, 24))]),
    ],
    ids=["stream with a length", "batches", "list of one", "iterable", "batch sampler"],
)
def test_calibration_reads_the_same_samples_from_every_kind_of_loader(loader, tmp_path):
    module = fit(tmp_path / "run", tiny.Regressor(), Wanda(0.5), train=loader)
    expected = fit(tmp_path / "expected", tiny.Regressor(), Wanda(0.5))
    assert torch.equal(module.blocks[1].up.weight, expected.blocks[1].up.weight)
    assert read_records(tmp_path / "run")[-1]["metrics"] == read_records(tmp_path / "expected")[-1]["metrics"]


@pytest.mark.parametrize(
    "loader",
    [DataLoader(Stream(400), batch_size=10), DataLoader(Batches(400, 10), batch_size=None)],
    ids=["stream", "batches"],
)
def test_training_data_is_not_read_beyond_the_samples_that_calibrate(loader):
    batches, _ = RunData(tiny.Regressor(), loader).calibration_batches(0, 1, None)
    assert FALLBACK_SAMPLES <= sum(len(x) for x, _ in batches) < FALLBACK_SAMPLES + 10
    halves = [RunData(tiny.Regressor(), loader).calibration_batches(rank, 2, None)[0] for rank in (0, 1)]
    assert sorted(len(half) for half in halves) == [6, 7]


@pytest.mark.parametrize(
    "loaders", [[tiny.regression_loader(), tiny.regression_loader()], {"a": tiny.regression_loader()}]
)
def test_several_loaders_are_refused_before_any_work_where_a_stage_calibrates(loaders, tmp_path):
    with pytest.raises(RecipeError, match=r"several loaders.*calibration_dataloader"):
        fit(tmp_path / "run", tiny.Regressor(), Wanda(0.5), train=loaders)
    assert not (tmp_path / "run").exists()
    fit(tmp_path / "uncalibrated", tiny.Regressor(), Magnitude(0.5), train=loaders)


def test_too_few_batches_of_a_stream_for_all_processes_are_refused():
    with pytest.raises(RecipeError, match="at least one calibration batch per process"):
        RunData(tiny.Regressor(), DataLoader(Stream(), batch_size=24)).calibration_batches(1, 2, None)


class BatchAlone(tiny.Regressor):
    """Lightning gives a step the arguments that it asks for."""

    def validation_step(self, batch):
        super().validation_step(batch, 0)


class LoaderIndex(tiny.Regressor):
    def validation_step(self, batch, batch_idx, dataloader_idx):
        self.log("error", F.mse_loss(self(batch[0]), batch[1]))


def test_calibration_calls_validation_step_as_lightning_does(tmp_path):
    several = [tiny.regression_loader(16, 1)] * 2
    for cls, validation in ((BatchAlone, several[0]), (LoaderIndex, several)):
        fit(tmp_path / cls.__name__, cls(), Wanda(0.5), validation=validation)


@pytest.mark.parametrize("what", ["training", "evaluation"])
def test_data_that_can_be_iterated_only_once_is_refused(tmp_path, what):
    loaders = {"training": tiny.regression_loader(), "evaluation": tiny.regression_loader(16, seed=1)}
    loaders[what] = (batch for batch in loaders[what])
    with pytest.raises(RecipeError, match=rf"the {what} data can be iterated only once \(generator\)"):
        tiny.trainer(tmp_path / "run", Magnitude(0.5)).fit(tiny.Regressor(), loaders["training"], loaders["evaluation"])
    assert not (tmp_path / "run").exists()


def test_an_option_of_the_trainer_that_is_no_flag_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="fold_parametrizations='false' should be true or false"):
        tiny.trainer(tmp_path / "run", fold_parametrizations="false")
