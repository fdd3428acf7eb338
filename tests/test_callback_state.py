"""Callbacks with a state of their own: each segment starts anew, and what is measured is what is saved."""

import pytest
import torch
from interrupt import undisturbed_and_resumed
from lightning.pytorch import Callback
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
)
from tiny import Regressor, regression_loader, trainer
from torch import nn

from pqqp_lightning import Stage, load
from pqqp_lightning.callbacks import QAT, RTN, Finetune, LoRA, Magnitude
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.constraints import constrained_layers
from pqqp_lightning.storage.records import read_records

AVERAGING = {
    "ema": lambda: [EMAWeightAveraging(decay=0.9)],
    "swa": lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=0.5)],
}


def fit(folder, *stages, module=None, **options):
    module = module or Regressor()
    trainer(folder, *stages, **options).fit(module, regression_loader(), regression_loader(16, seed=1))
    return module


def measured(module):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return LightningTrainer(**quiet).validate(module, regression_loader(16, seed=1), verbose=False)[0]["mse"]


class Saved(Callback):
    """Keeps a plain measurement of the model whenever an evaluation of the run has ended."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        if trainer.state.fn == "validate":
            x, y = next(iter(regression_loader(16, seed=1, batch_size=16)))
            with torch.no_grad():
                self.seen.append(float(nn.functional.mse_loss(pl_module(x), y)))


CHAINS = {
    "train, round": lambda: [Magnitude(0.5, epochs=2), RTN(2)],
    "train, prune": lambda: [Finetune(2), Magnitude(0.9)],
    "train, train": lambda: [Magnitude(0.5, epochs=2), Magnitude(0.8, epochs=3)],
    "round, adapt": lambda: [RTN(4), LoRA(2, epochs=2)],
    "train rounded": lambda: [Magnitude(0.5), QAT(4, epochs=2)],
}


@pytest.mark.parametrize("averaging", AVERAGING)
@pytest.mark.parametrize("chain", CHAINS)
def test_the_averaged_model_is_measured_saved_and_compressed_further(tmp_path, chain, averaging):
    saved = Saved()
    module = fit(tmp_path, *CHAINS[chain](), callbacks=[*AVERAGING[averaging](), saved])
    records = read_records(tmp_path)
    last = records[-1]["metrics"]["mse"]
    assert measured(module) == pytest.approx(last, rel=1e-6)
    assert measured(load(tmp_path, Regressor())) == pytest.approx(last, rel=1e-6)
    reported = [record["metrics"]["mse"] for record in records]
    assert [value for value in saved.seen if value == pytest.approx(reported[-1], rel=1e-5)]
    assert all(any(value == pytest.approx(mse, rel=1e-5) for value in saved.seen) for mse in reported)
    layers = [layer for _, layer, constraints in constrained_layers(module) if constraints.mask_bits is not None]
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers) / max(1, sum(la.weight.numel() for la in layers))
    assert not layers or zeros >= records[-1]["pruned"] > 0.45


@pytest.mark.parametrize("averaging", AVERAGING)
def test_a_second_segment_averages_its_own_weights(tmp_path, averaging):
    class Ends(Callback):
        """Keeps the weights at the start and at the end of every segment."""

        def __init__(self):
            self.weights = []

        def on_train_start(self, trainer, pl_module):
            self.weights.append(pl_module.head.weight.detach().clone())

        on_train_end = on_train_start

    ends = Ends()
    fit(tmp_path, Finetune(2), Finetune(3), callbacks=[*AVERAGING[averaging](), ends])
    _, first_end, second_start, second_end = ends.weights
    assert torch.equal(first_end, second_start)
    assert not torch.equal(second_start, second_end)


@pytest.mark.parametrize("at", [(1, 1, 1), (2, 1, 2)])
@pytest.mark.parametrize("averaging", AVERAGING)
def test_a_killed_averaging_segment_ends_as_an_undisturbed_one(tmp_path, averaging, at):
    ours, resumed = undisturbed_and_resumed(
        tmp_path, lambda: [Magnitude(0.5, epochs=3), Finetune(3)], Regressor, at, more=AVERAGING[averaging]
    )
    for name, value in ours.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_time_budget_is_of_each_segment(tmp_path):
    timer = Timer(duration={"hours": 1})
    fit(tmp_path / "first", Finetune(1), callbacks=[timer])
    timer._offset = 7200  # as after a resumed segment that took two hours
    module = Regressor()
    before = module.head.weight.detach().clone()
    fit(tmp_path / "second", Finetune(1), module=module, callbacks=[timer])
    assert not torch.equal(before, module.head.weight)


def test_gradient_accumulation_starts_anew_in_every_segment(tmp_path):
    fit(tmp_path, Finetune(2), Finetune(2), callbacks=[GradientAccumulationScheduler({1: 2})])
    assert len(read_records(tmp_path)) == 3


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (BatchSizeFinder(), "BatchSizeFinder would choose another batch size"),
        (ModelPruning("l1_unstructured", amount=0.5), "ModelPruning replaces weights by parametrizations"),
    ],
)
def test_callbacks_that_would_undo_a_run_are_refused_before_any_work(tmp_path, callback, message):
    with pytest.raises(RecipeError, match=message):
        fit(tmp_path / "run", Magnitude(0.5), callbacks=[callback])
    assert not (tmp_path / "run").exists()


class Exchanging(Callback):
    """An average of a user's own, which takes the model's place in every evaluation."""

    def on_fit_end(self, trainer, pl_module):
        self.average = {name: value / 2 for name, value in pl_module.state_dict().items()}

    def on_validation_start(self, trainer, pl_module):
        if hasattr(self, "average"):
            self.own = {name: value.clone() for name, value in pl_module.state_dict().items()}
            pl_module.load_state_dict(self.average)

    def on_validation_end(self, trainer, pl_module):
        if hasattr(self, "average"):
            pl_module.load_state_dict(self.own)


def test_an_evaluation_of_other_weights_than_the_saved_ones_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="measures other weights than the run saves: Exchanging exchanges them"):
        fit(tmp_path, Finetune(1), callbacks=[Exchanging()])


def test_batch_norm_is_averaged_as_lightning_does_it(tmp_path):
    module = Regressor()
    module.blocks.insert(1, nn.BatchNorm1d(8))
    fit(tmp_path, Magnitude(0.5, epochs=2), Finetune(2), module=module, callbacks=AVERAGING["swa"]())
    assert measured(module) == pytest.approx(read_records(tmp_path)[-1]["metrics"]["mse"], rel=1e-6)


def test_the_learning_rate_is_searched_in_every_segment(tmp_path):
    class Rated(Regressor):
        lr = 0.05

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    finder, module = LearningRateFinder(num_training_steps=8, early_stop_threshold=None), Rated()
    fit(tmp_path, Magnitude(0.5, epochs=1), Finetune(1), module=module, callbacks=[finder])
    assert measured(module) == pytest.approx(read_records(tmp_path)[-1]["metrics"]["mse"], rel=1e-6)
    assert all(record["metrics"]["mse"] < 10 for record in read_records(tmp_path))


class Wordy(Stage):
    """A third party's stage whose check returns plain text."""

    source = "none"

    def check(self, model, data, earlier):
        return ["bits is wrong"]


def test_a_check_that_returns_text_breaks_its_contract_in_words(tmp_path):
    with pytest.raises(RecipeError, match=r"stages.wordy \(Wordy\): check must return a list of Problem .* holds str"):
        fit(tmp_path / "run", Wordy())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("averaging", "epochs"),
    [
        (lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=5), 3),
        (lambda: EMAWeightAveraging(update_starting_at_step=1000), 2),
    ],
)
def test_training_that_an_average_never_saw_is_not_lost_in_silence(tmp_path, averaging, epochs):
    with pytest.raises(RecipeError, match=r"stages\.finetune \(Finetune\): .* averaged nothing in this training"):
        fit(tmp_path / "run", Finetune(epochs), callbacks=[averaging()])


def test_two_averages_are_refused(tmp_path):
    both = [make()[0] for make in AVERAGING.values()]
    with pytest.raises(RecipeError, match="would each replace the weights"):
        fit(tmp_path / "run", Finetune(2), callbacks=both)
    assert not (tmp_path / "run" / "run.json").exists()
