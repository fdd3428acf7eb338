"""Modules whose layers come after construction: configure_model, setup, and torch's lazy layers."""

import pytest
import tiny
import torch
from torch import nn

from pqqp_lightning import load
from pqqp_lightning.callbacks import GPTQ, ChannelPruning, Finetune, Magnitude, Wanda
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.experiments import search_orders
from pqqp_lightning.storage.records import read_records


class Eager(tiny.Regressor):
    """Makes its layers when it is built; those below make equal ones later."""

    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.make()

    def make(self):
        torch.manual_seed(5)
        self.inlet = nn.Linear(8, self.hparams.width)
        self.head = nn.Linear(self.hparams.width, 2)


class Late(Eager):
    def __init__(self, width=8):
        super().__init__(width)
        self.blocks_made = 0
        self.inlet = self.head = None


class InConfigureModel(Late):
    def configure_model(self):
        if self.inlet is None:
            self.make()


class InSetup(Late):
    """As in Lightning's documentation: new layers at every call."""

    def setup(self, stage):
        self.make()


class FromDatamodule(Late):
    def setup(self, stage):
        assert self.trainer.datamodule.train is not None
        self.make()


class AnewInSetup(Eager):
    """Has its layers and makes them again."""

    def setup(self, stage):
        self.make()


class Everything(Late):
    """Has no parameter before."""

    def __init__(self, width=8):
        super().__init__(width)
        self.blocks = None

    def configure_model(self):
        if self.blocks is None:
            self.blocks = tiny.Regressor().blocks
            self.make()


class LazyLayers(Eager):
    def make(self):
        torch.manual_seed(5)
        self.inlet = nn.LazyLinear(self.hparams.width)
        self.head = nn.LazyLinear(2)


LATE = [InConfigureModel, InSetup, AnewInSetup, Everything, LazyLayers]


def fit(folder, module, *stages, **arguments):
    trainer = tiny.trainer(folder, *stages)
    trainer.fit(module, tiny.regression_loader(), tiny.regression_loader(16, 1), **arguments)
    return trainer


def stop(*arguments):
    raise KeyError("stopped")


def stages():
    return [ChannelPruning(0.25, epochs=1), Wanda(0.5, targets=["inlet", "up", "head"]), GPTQ(4)]


@pytest.mark.parametrize("cls", LATE)
def test_late_layers_are_compressed_saved_loaded_and_measured_as_early_ones(cls, tmp_path):
    module = cls()
    trainer = fit(tmp_path / "run", module, *stages())
    if cls is not LazyLayers:  # whose weights are drawn at their first batch
        early = Eager()
        fit(tmp_path / "early", early, *stages())
        assert [r["metrics"] for r in read_records(tmp_path / "run")] == [
            r["metrics"] for r in read_records(tmp_path / "early")
        ]
    x = torch.randn(5, 8)
    expected = module.eval()(x)
    last = read_records(tmp_path / "run")[-1]
    for loaded in (load(tmp_path / "run"), load(tmp_path / "run", cls())):
        assert torch.equal(loaded(x), expected)
        # Lightning's loop calls the hooks again.
        assert trainer.validate(loaded, tiny.regression_loader(16, 1), verbose=False) == [last["metrics"]]
        assert torch.equal(loaded.eval()(x), expected)
    fresh = cls()
    result = trainer.validate(fresh, tiny.regression_loader(16, 1), ckpt_path=str(tmp_path / "run"), verbose=False)
    assert result == [last["metrics"]]


@pytest.mark.parametrize("cls", [InSetup, Everything, LazyLayers])
def test_a_run_of_late_layers_resumes(cls, tmp_path, monkeypatch):
    monkeypatch.setattr(GPTQ, "compress", stop)
    with pytest.raises(KeyError):
        fit(tmp_path, cls(), Finetune(1), ChannelPruning(0.25), GPTQ(4))
    monkeypatch.undo()
    module = cls()
    fit(tmp_path, module, Finetune(1), ChannelPruning(0.25), GPTQ(4), ckpt_path="last")
    assert torch.equal(load(tmp_path)(torch.ones(1, 8)), module.eval()(torch.ones(1, 8)))


def test_setup_finds_the_trainer_and_its_data(tmp_path):
    module = FromDatamodule()
    trainer = tiny.trainer(tmp_path, Magnitude(0.5, targets=["inlet", "head"]))
    trainer.fit(module, datamodule=tiny.RegressionData())
    assert (module.inlet.weight == 0).sum() == 32
    loaded = FromDatamodule()
    result = trainer.validate(loaded, datamodule=tiny.RegressionData(), ckpt_path="last", verbose=False)
    assert result == [read_records(tmp_path)[-1]["metrics"]]
    with pytest.raises(RecipeError, match="module="):
        load(tmp_path)


def test_orders_of_late_layers_are_searched(tmp_path):
    found = {}
    for cls in (Everything, InSetup, Eager):
        trainer = tiny.trainer(tmp_path / cls.__name__ / "run", Magnitude(0.5), GPTQ(3))
        search_orders(trainer, cls(), tiny.RegressionData())
        found[cls] = (tmp_path / cls.__name__ / "run" / "order.json").read_text().count("mse")
    assert len(set(found.values())) == 1


class Reinitialized(Eager):
    def setup(self, stage):
        nn.init.ones_(self.inlet.weight)


class NeedsALoop(Late):
    def __init__(self):
        super().__init__()
        self.blocks = None

    def setup(self, stage):
        self.blocks = nn.Linear(self.trainer.no_such_thing, 8)


class Unreached(LazyLayers):
    def __init__(self):
        super().__init__()
        self.unused = nn.LazyLinear(3)


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Reinitialized, r"setup\(\) changes 1 layer \(inlet\.weight\)"),
        (NeedsALoop, r"setup\(\) makes the layers and fails before the run.*no_such_thing"),
        (Unreached, r"\(unused\) have no shape, and validation_step does not reach them"),
    ],
)
def test_layers_that_cannot_be_made_once_are_refused_before_any_stage(cls, words, tmp_path):
    with pytest.raises(RecipeError, match=words):
        fit(tmp_path / "run", cls(), Magnitude(0.5))
    assert not (tmp_path / "run" / "stages").exists()
