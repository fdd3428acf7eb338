"""Parametrized weights: refused before any work, or folded into plain weights that compute the same."""

import copy

import pytest
import tiny
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrize import register_parametrization

from pqqp_lightning import load
from pqqp_lightning.callbacks import GPTQ, RTN, BasisSharing, ChannelPruning, Finetune, Magnitude, SparseGPT
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.structure import copy_model, weightless_copy
from pqqp_lightning.stages.distillation import Distillation
from pqqp_lightning.storage.records import read_records
from pqqp_lightning.surgery.parametrized import fold, parametrized_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")


class Halved(nn.Module):
    """A parametrization of the user's own."""

    def forward(self, weight):
        return weight / 2


KINDS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": old_weight_norm,
    "old spectral_norm": old_spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "Halved": lambda layer: register_parametrization(layer, "weight", Halved()),
}


class Parametrized(tiny.Regressor):
    """Its blocks' layers are parametrized when it is built."""

    def __init__(self, kind):
        super().__init__()
        self.save_hyperparameters()
        for block in self.blocks:
            KINDS[kind](block.up)
            KINDS[kind](block.down)
        self.train()
        for _ in range(20):
            self(torch.ones(1, 8))  # lets the estimate of spectral_norm converge


def fit(folder, module, *stages, **options):
    tiny.trainer(folder, *stages, **options).fit(module, tiny.regression_loader(), tiny.regression_loader(16, 1))
    return module.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_folding_keeps_the_outputs_bit_for_bit(kind):
    module = Parametrized(kind)
    module.blocks[1].requires_grad_(False)
    module.eval()
    copied, weightless = copy_model(module), weightless_copy(module)
    x = torch.randn(5, 8)
    expected, tensors = module(x), parametrized_tensors(module)
    assert set(tensors) == {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("up", "down")}
    assert set(tensors.values()) == {kind.removeprefix("old ")}
    fold(module, tensors)
    assert torch.equal(module(x), expected)
    assert torch.equal(copied(x), expected), "a copy shares the class of a parametrized module"
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in tiny.Regressor().named_parameters()]
    assert [p.requires_grad for p in module.blocks[0].parameters()] == [True] * 4
    assert [p.requires_grad for p in module.blocks[1].parameters()] == [False] * 4
    assert type(module.blocks[0].up) is nn.Linear
    assert not parametrized_tensors(module)
    fold(weightless, tensors)
    assert weightless.blocks[0].up.weight.is_meta


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_on_parametrized_layers_is_refused_before_any_work(kind, tmp_path):
    with pytest.raises(RecipeError, match=r"blocks\.0\.up.*fold_parametrizations") as error:
        fit(tmp_path / "run", Parametrized(kind), Magnitude(0.5), ChannelPruning(0.25))
    problems = error.value.problems
    assert [problem.section for problem in problems] == ["stages.magnitude", "stages.channelpruning"]
    assert all(f"({kind.removeprefix('old ')})" in problem.text for problem in problems)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "stages"),
    [
        ("weight_norm", [Magnitude(0.5, epochs=1)]),
        ("spectral_norm", [ChannelPruning(0.25), GPTQ(4)]),
        ("orthogonal", [SparseGPT(0.5)]),
        ("old weight_norm", [ChannelPruning(0.25), RTN(4)]),
        ("old spectral_norm", [Finetune(1, learning_rate=1e-3), SparseGPT(0.5)]),
        ("prune", [GPTQ(4)]),
        ("Halved", [RTN(4)]),
    ],
)
def test_a_folded_model_is_compressed_and_its_run_loads(kind, stages, tmp_path):
    dense = fit(tmp_path / "dense", Parametrized(kind), fold_parametrizations=False, max_epochs=0)
    module = fit(tmp_path / "run", Parametrized(kind), *copy.deepcopy(stages), fold_parametrizations=True)
    records = read_records(tmp_path / "run")
    assert records[0]["metrics"] == read_records(tmp_path / "dense")[0]["metrics"]
    assert kind.removeprefix("old ") in records[0]["notes"][0]
    x = torch.randn(5, 8)
    assert not torch.equal(module(x), dense(x))
    assert torch.equal(load(tmp_path / "run")(x), module(x))
    assert torch.equal(load(tmp_path / "run", Parametrized(kind))(x), module(x))


def test_the_mask_of_torch_prune_holds_through_later_stages(tmp_path):
    module = Parametrized("prune")
    removed = module.blocks[0].up.weight_mask == 0
    fit(tmp_path, module, Magnitude({"*.up": 0.5, "*": 0.4}, epochs=1), RTN(4), fold_parametrizations=True)
    weight = module.blocks[0].up.weight
    assert removed.any()
    assert not weight[removed].any()
    assert not constraints_of(module.blocks[0].up).mask()[removed].any()


def test_a_mask_of_torch_prune_on_a_convolution_becomes_its_constraint():
    conv = nn.Sequential(nn.Conv2d(4, 6, 3))
    prune.random_unstructured(conv[0], "weight", 0.5)
    expected = conv[0].weight.detach().clone()
    fold(conv, parametrized_tensors(conv))
    assert torch.equal(conv[0].weight, expected)
    matrix = expected.permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(constraints_of(conv[0]).mask(), matrix != 0)


def test_what_would_lose_the_mask_of_torch_prune_is_refused_before_any_work(tmp_path):
    sharing = BasisSharing(0.2)
    with pytest.raises(RecipeError, match="carry a mask that the model had before the run"):
        fit(tmp_path / "run", Parametrized("prune"), sharing, fold_parametrizations=True)
    assert not (tmp_path / "run").exists()
    fit(tmp_path / "loaded", Parametrized("prune"), RTN(4), fold_parametrizations=True)
    with pytest.raises(RecipeError, match="carry a grid that the model had before the run"):
        fit(tmp_path / "run", load(tmp_path / "loaded"), sharing)
    with pytest.raises(RecipeError, match="off the grid that they had before the run"):
        fit(tmp_path / "run", load(tmp_path / "loaded"), Finetune(1))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm", "prune"])
def test_parametrized_layers_that_no_stage_touches_stay_as_they_are(kind, tmp_path):
    module = tiny.Regressor()
    KINDS[kind](module.head)
    fit(tmp_path, module, Magnitude(0.5), Finetune(1, distill=Distillation(loss="mse")))
    assert parametrized_tensors(module) == {"head.weight": kind.removeprefix("old ")}


def test_channels_coupled_with_a_parametrized_layer_are_refused(tmp_path):
    module = tiny.Regressor()
    parametrizations.weight_norm(module.blocks[0].down)
    with pytest.raises(RecipeError, match=r"blocks\.0\.down\) compute"):
        fit(tmp_path / "run", module, ChannelPruning(0.25, ignore=["down"]))


def stop(*arguments):
    raise KeyError("stopped")


def test_a_folded_run_resumes(tmp_path, monkeypatch):
    stages = [ChannelPruning(0.25), RTN(4)]
    monkeypatch.setattr(RTN, "compress", stop)
    with pytest.raises(KeyError):
        fit(tmp_path / "run", Parametrized("weight_norm"), *stages, fold_parametrizations=True)
    monkeypatch.undo()
    resumed, whole = Parametrized("weight_norm"), Parametrized("weight_norm")
    trainer = tiny.trainer(tmp_path / "run", *stages, fold_parametrizations=True)
    trainer.fit(resumed, tiny.regression_loader(), tiny.regression_loader(16, 1), ckpt_path="last")
    fit(tmp_path / "whole", whole, *stages, fold_parametrizations=True)
    for (name, expected), value in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    unfolded = tiny.trainer(tmp_path / "run", *stages)
    with pytest.raises(RecipeError, match="fold_parametrizations"):
        unfolded.fit(tiny.Regressor(), tiny.regression_loader(), tiny.regression_loader(16, 1), ckpt_path="last")
