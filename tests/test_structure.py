"""Copies without weights, the way back to a dense structure, and promises that follow a layer under another name."""

import copy

import pytest
import tiny
import torch
from torch import nn

from pqqp_lightning.algorithms.grid import fit_grid, round_to_grid
from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.models import CausalLM
from pqqp_lightning.network.blocks import find_layers
from pqqp_lightning.network.constraints import (
    Constraints,
    broken_promises,
    collect_promises,
    constraints_of,
    set_constraints,
)
from pqqp_lightning.network.layers import mark_adapter
from pqqp_lightning.network.structure import Skeleton, copy_model, weightless_copy
from pqqp_lightning.stages.stage import Stage


def tied_llama():
    torch.manual_seed(0)
    return CausalLM(tiny.LLAMA | {"tie_word_embeddings": True})


def test_a_weightless_copy_has_the_structure_and_no_weights():
    model = tied_llama()
    model.model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    bare = weightless_copy(model)
    assert all(p.is_meta for p in bare.parameters())
    assert [(n, p.shape, p.requires_grad) for n, p in bare.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in model.named_parameters()
    ]
    assert bare.model.lm_head.weight is bare.model.model.embed_tokens.weight
    assert torch.equal(bare.model.model.rotary_emb.inv_freq, model.model.model.rotary_emb.inv_freq)


def test_copies_belong_to_no_trainer(tmp_path):
    module = tiny.Regressor()
    tiny.trainer(tmp_path / "run").fit(module, tiny.regression_loader(), tiny.regression_loader(seed=1))
    assert module._trainer is not None
    for made in (copy_model(module), weightless_copy(module)):
        assert made._trainer is None
    assert module._trainer is not None


def test_a_skeleton_brings_the_dense_structure_back():
    model = tied_llama()
    dense = copy.deepcopy(model.state_dict())
    skeleton = Skeleton(model)
    del model.model.model.layers[1]
    model.model.lm_head = nn.Linear(32, 64)
    for _ in range(2):  # more than once
        skeleton.restore(model)
        assert list(model.state_dict()) == list(dense)
        assert model.model.lm_head.weight is model.model.model.embed_tokens.weight
        model.load_state_dict(dense)
        assert torch.isfinite(model(tiny.token_rows(2))).all()


def test_a_promise_follows_a_layer_to_another_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    mask = torch.rand(8, 8) < 0.5
    with torch.no_grad():
        model[1].weight.masked_fill_(~mask, 0)
    set_constraints(model[1], Constraints((8, 8)).with_mask(mask))
    promises = collect_promises(model)
    moved = nn.Sequential(model[1])
    assert broken_promises(moved, promises) == []
    with torch.no_grad():
        model[1].weight.fill_(1)
    ((promise, found),) = broken_promises(moved, promises)
    assert promise.name == "1"
    assert "pruned entries are not zero any more" in found[0]
    assert broken_promises(nn.Sequential(model[0]), promises) == []  # the layer is gone as a whole


@pytest.mark.parametrize("group", [None, 4])
def test_a_layer_of_another_shape_must_carry_constraints_of_that_shape(group):
    layer, rows = nn.Linear(8, 6), torch.tensor([0, 2, 5])
    mask = torch.rand(6, 8) < 0.5
    grid = fit_grid(layer.weight.detach(), 4, group_size=group)
    with torch.no_grad():
        layer.weight.copy_(round_to_grid(layer.weight.masked_fill(~mask, 0), grid))
    set_constraints(layer, Constraints((6, 8)).with_mask(mask, (2, 4)).with_grid(grid))
    model = nn.Sequential(layer)
    promises, before = collect_promises(model), constraints_of(layer)
    layer.weight = nn.Parameter(layer.weight.detach()[rows])
    set_constraints(layer, None)
    ((_, found),) = broken_promises(model, promises)
    assert found == ["its mask is gone", "its grid is gone"]
    after = before.select(rows)
    set_constraints(layer, after)
    assert broken_promises(model, promises) == []
    assert after.shape == (3, 8)
    assert after.pattern == (2, 4)
    assert torch.equal(after.mask(), mask[rows])
    assert broken_promises(model, collect_promises(model)) == []


def test_columns_can_be_selected_where_no_group_is_cut():
    matrix, columns = torch.randn(6, 8), torch.tensor([1, 3, 4])
    mask = torch.rand(6, 8) < 0.5
    whole = Constraints((6, 8)).with_mask(mask, (2, 4)).with_grid(fit_grid(matrix, 4))
    left = whole.select(columns=columns)
    assert left.pattern is None
    assert torch.equal(left.mask(), mask[:, columns])
    assert not left.violations(round_to_grid(matrix, whole.grid)[:, columns].masked_fill(~mask[:, columns], 0))
    grouped = Constraints((6, 8)).with_grid(fit_grid(matrix, 4, group_size=4))
    with pytest.raises(ValueError, match=r"groups of 4 columns, which cannot be cut"):
        grouped.select(columns=columns)


def test_adapters_are_no_layers_to_act_on():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    mark_adapter(model[1])
    assert list(find_layers(model, None, None, {"": model})) == ["0"]


class Halve(Stage):
    """Removes the second half of the blocks."""

    compresses = True
    source = "a test"

    def expected_plan(self, model):
        return {"kept": len(model.blocks) // 2}

    def compress(self, model, context):
        plan = self.expected_plan(model)
        self.restructure(model, plan)
        return plan

    def restructure(self, model, plan):
        model.blocks = model.blocks[: plan["kept"]]


class NeedsFourBlocks(Stage):
    """Refuses models with fewer blocks."""

    compresses = True
    source = "a test"

    def check(self, model, data, earlier):
        if len(model.blocks) >= 4:
            return []
        return [Problem(text=f"the model has {len(model.blocks)} blocks", way_out="Use 4 or more.")]


def fit(tmp_path, *stages):
    module = tiny.Regressor(blocks=4)
    tiny.trainer(tmp_path / "run", *stages).fit(module, tiny.regression_loader(), tiny.regression_loader(seed=1))
    return module


def test_stages_are_checked_against_the_structure_that_earlier_ones_leave(tmp_path):
    assert len(fit(tmp_path / "a", NeedsFourBlocks(), Halve()).blocks) == 2
    with pytest.raises(RecipeError, match=r"stages.needsfourblocks \(NeedsFourBlocks\): the model has 2 blocks"):
        fit(tmp_path / "b", Halve(), NeedsFourBlocks())
    assert not (tmp_path / "b").exists()


def test_what_is_removed_counts_as_removed(tmp_path):
    module = fit(tmp_path, Halve())
    report = (tmp_path / "run" / "report.json").read_text()
    import json

    last = json.loads(report)["stages"][-1]
    assert last["sparsity"] == pytest.approx(0.5)
    assert last["nominal_rate"] == pytest.approx(2.0)
    assert last["size_bytes"] == sum(p.numel() * 4 for p in module.parameters())
