"""Sparsities by layer under one overall target, for the pruning stages."""

import numpy as np
import pytest
import tiny
import torch
from reference import magnitude
from torch.nn import functional as F

from pqqp_lightning import load
from pqqp_lightning.callbacks import GPTQ, Magnitude, SparseGPT, Wanda
from pqqp_lightning.data import TokenData
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.models import CausalLM
from pqqp_lightning.network.constraints import broken_constraints, collect_constraints
from pqqp_lightning.storage.records import read_records


def fit(tmp_path, *stages, module=None, folder="run"):
    torch.manual_seed(0)
    module = CausalLM(tiny.LLAMA) if module is None else module
    tiny.trainer(tmp_path / folder, *stages).fit(module, datamodule=TokenData(**tiny.write_tokens(tmp_path)))
    return module


def sparsities(module):
    return {name: 1 - c.kept() / (c.shape[0] * c.shape[1]) for name, c in collect_constraints(module).items()}


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.63, 0.9])
@pytest.mark.parametrize("method", [Magnitude, Wanda, SparseGPT])
def test_sparsities_differ_by_layer_and_their_sum_is_the_one_asked_for(tmp_path, method, sparsity):
    module = fit(tmp_path, method(sparsity, allocation="sensitivity"))
    found = collect_constraints(module)
    entries = sum(c.shape[0] * c.shape[1] for c in found.values())
    removed = entries - sum(c.kept() for c in found.values())
    granule = 64 if method is Wanda else 1  # Wanda removes as many from each row
    assert abs(removed - round(sparsity * entries)) < max(granule, 2)
    assert abs(removed / entries - sparsity) <= (2e-3 if method is Wanda else 1e-3)
    assert sparsity == 0.9 or len({round(s, 2) for s in sparsities(module).values()}) > 1
    assert all(sparsity - 0.22 <= s <= sparsity + 0.22 for s in sparsities(module).values())
    assert not broken_constraints(module, found)
    assert "sparsities: " in read_records(tmp_path / "run")[-1]["notes"][-1]
    assert sparsities(load(tmp_path / "run")) == sparsities(module)


@pytest.mark.parametrize(("method", "reference"), [(Magnitude, magnitude), (Wanda, None)])
def test_each_layer_is_pruned_as_by_the_method_itself(tmp_path, method, reference):
    torch.manual_seed(0)
    dense = CausalLM(tiny.LLAMA).state_dict()
    module = fit(tmp_path, method(0.6, allocation="sensitivity"))
    for name, sparsity in sparsities(module).items():
        mask = collect_constraints(module)[name].mask()
        if reference is None:  # as many in each row
            assert len(set((~mask).sum(dim=1).tolist())) == 1
        else:
            np.testing.assert_array_equal(mask.numpy(), reference(dense[f"{name}.weight"].numpy(), sparsity=sparsity))


class Lopsided(tiny.Lopsided):
    def outputs(self):
        return self(tiny.regression_data(64, seed=5).tensors[0])


def compressed_error(tmp_path, stage):
    module = Lopsided()
    dense = module.outputs().detach()
    tiny.trainer(tmp_path / f"{stage.name}-{stage.allocation}", stage).fit(module, datamodule=tiny.RegressionData())
    return float((module.outputs() - dense).detach().square().mean()), module


@pytest.mark.parametrize("method", [Magnitude, Wanda, SparseGPT])
def test_a_sensitive_layer_keeps_more_and_the_model_changes_less(tmp_path, method):
    uniform, _ = compressed_error(tmp_path, method(0.6))
    allocated, module = compressed_error(tmp_path, method(0.6, allocation="sensitivity"))
    found = sparsities(module)
    assert found["blocks.0.down"] < 0.6 < found["blocks.1.down"]
    assert allocated < 0.8 * uniform


def test_an_earlier_mask_counts(tmp_path):
    module = fit(tmp_path, Magnitude(0.5, targets=["down_proj"]), SparseGPT(0.4, allocation="sensitivity"))
    found = sparsities(module)
    entries = {name: c.shape[0] * c.shape[1] for name, c in collect_constraints(module).items()}
    assert sum(found[n] * entries[n] for n in found) / sum(entries.values()) == pytest.approx(0.4, abs=1e-3)
    assert all(s >= 0.5 for n, s in found.items() if "down_proj" in n)
    beyond = fit(tmp_path, Magnitude(0.7), Wanda(0.4, allocation="sensitivity"), folder="beyond")
    assert all(s == pytest.approx(0.7, abs=1e-3) for s in sparsities(beyond).values())


def test_allocated_sparsity_goes_with_a_grid_before_and_after(tmp_path):
    for order in (("q", "p"), ("p", "q")):
        stages = {"q": GPTQ(4, group_size=16), "p": SparseGPT(0.5, allocation="sensitivity")}
        module = fit(tmp_path, *(stages[s] for s in order), folder="".join(order))
        found = collect_constraints(module)
        assert all(c.grid is not None for c in found.values())
        assert len({round(s, 2) for s in sparsities(module).values()}) > 1
        assert not broken_constraints(module, found)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Wanda(pattern="2:4", allocation="sensitivity"), r"allocation='sensitivity' needs one sparsity for all layers"),
        (
            SparseGPT({"*": 0.5}, allocation="sensitivity"),
            r"allocation='sensitivity' needs one sparsity for all layers",
        ),
        (
            Magnitude(0.5, scope="global", allocation="sensitivity"),
            r"scope='global' contradicts allocation='sensitivity'",
        ),
    ],
)
def test_what_allocation_does_not_go_with_is_refused(tmp_path, stage, message):
    with pytest.raises(RecipeError, match=message):
        fit(tmp_path, stage)
    assert not (tmp_path / "run").exists()


class Untrained(tiny.Regressor):
    """A module that can only be evaluated."""

    training_step = tiny.LightningModule.training_step


def test_a_model_without_a_loss_is_refused(tmp_path):
    trainer = tiny.trainer(tmp_path, Wanda(0.5, allocation="sensitivity"))
    with pytest.raises(RecipeError, match="allocation='sensitivity' needs a training_step in Untrained, for its loss"):
        trainer.fit(Untrained(), datamodule=tiny.RegressionData())


def test_magnitude_needs_data_only_to_allocate():
    assert not Magnitude(0.5).needs_calibration
    assert Magnitude(0.5, allocation="sensitivity").needs_calibration


class Cut(tiny.Regressor):
    """Its last block's output takes no part in the loss."""

    def training_step(self, batch, batch_idx):
        hidden = self.blocks[0](self.inlet(batch[0]))
        with torch.no_grad():
            self.blocks[1](hidden)
        return F.mse_loss(self.head(hidden), batch[1]) * self.factor

    factor = 1.0


def test_layers_without_a_gradient_or_with_an_infinite_one_are_named(tmp_path):
    stage = Wanda(0.5, allocation="sensitivity")
    tiny.trainer(tmp_path / "a", stage).fit(Cut(), datamodule=tiny.RegressionData())
    record = read_records(tmp_path / "a")[-1]
    assert any("2 layers (blocks.1.up, blocks.1.down): assumed" in note for note in record["notes"])
    assert record["sparsity"] == pytest.approx(0.5, abs=0.01)

    none = Wanda(0.5, allocation="sensitivity", ignore=["blocks.0"])
    with pytest.raises(RecipeError, match=r"the loss has no gradient for 2 layers \(blocks.1.up, blocks.1.down\)"):
        tiny.trainer(tmp_path / "c", none).fit(Cut(), datamodule=tiny.RegressionData())
    module = Cut()
    module.factor = float("nan")
    partly = Wanda(0.5, allocation="sensitivity", ignore=["blocks.1"])
    with pytest.raises(RecipeError, match=r"stages.wanda.*NaN or infinite gradients for 2 layers \(blocks.0.up, "):
        tiny.trainer(tmp_path / "b", partly).fit(module, datamodule=tiny.RegressionData())
