"""Adapters that correct without training (EoRA): the mathematics, what a run leaves, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import tiny
import torch
from test_algorithms import SEEDS, make_layer
from test_lora import logits, make_data, make_model, problems_of, records, run

from pqqp_lightning import load
from pqqp_lightning.algorithms.eora import correct_low_rank
from pqqp_lightning.algorithms.polish import damped_hessian, objective
from pqqp_lightning.algorithms.sparsegpt import prune_sparsegpt
from pqqp_lightning.callbacks import GPTQ, RTN, Finetune, LoRA, Magnitude, QLoRA, QuaRot, SparseGPT
from pqqp_lightning.checkpoint.size import measure_size
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.constraints import broken_constraints, collect_constraints
from pqqp_lightning.network.layers import named_layers, weight_matrix
from pqqp_lightning.surgery.adapters import update_of

EORA = {"initialization": "eora", "epochs": 0, "rank": 4}
APART = {**EORA, "merge": False}


@pytest.mark.parametrize("rows", [48, 400])
@pytest.mark.parametrize("rank", [1, 16])
def test_the_correction_agrees_with_the_paper(rows, rank):
    layer = make_layer(rows=rows)
    hessian = damped_hessian(layer.hessian, 0.01)
    error = layer.weight - prune_sparsegpt(layer.weight, layer.hessian, sparsity=0.6).weight
    a, b = correct_low_rank(error, hessian, rank)
    assert (a.shape, b.shape) == ((rank, 256), (rows, rank))
    np.testing.assert_allclose(b @ a, reference.eora(error, hessian, rank), atol=2e-4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rows", [48, 400])
def test_the_correction_is_below_the_plain_svd_of_the_error(seed, rows):
    layer = make_layer(seed, rows=rows)
    hessian = damped_hessian(layer.hessian, 0.01)
    pruned = prune_sparsegpt(layer.weight, layer.hessian, pattern=(2, 4)).weight
    error = layer.weight - pruned
    a, b = correct_low_rank(error, hessian, 8)
    left, singular, right = torch.linalg.svd(error, full_matrices=False)
    plain = (left[:, :8] * singular[:8]) @ right[:8]
    loss = objective(pruned + b @ a, layer.weight, hessian)
    assert loss < 0.99 * objective(pruned + plain, layer.weight, hessian)
    assert loss < 0.95 * objective(pruned, layer.weight, hessian)


def test_a_full_rank_corrects_everything():
    layer = make_layer()
    error = 0.1 * layer.weight
    a, b = correct_low_rank(error, damped_hessian(layer.hessian, 0.01), 48)
    np.testing.assert_allclose(b @ a, error, atol=1e-5)


def calibration_inputs(kind, folder):
    data = make_data(kind, folder)
    data.setup("fit")
    batch = next(iter(data.calibration_dataloader()))
    return batch["input_ids"] if kind == "llama" else batch[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "stages"),
    [
        ("llama", [SparseGPT(pattern="2:4"), GPTQ(4), LoRA(**APART)]),
        ("resnet", [SparseGPT(0.6, batch_norm="keep"), LoRA(**APART, batch_norm="keep")]),
        ("deit", [Magnitude(0.5), QLoRA(**EORA)]),
    ],
    ids=["llama", "resnet", "deit"],
)
def test_untrained_adapters_bring_outputs_nearer_to_the_dense_models(tmp_path, kind, stages):
    without, _ = run(tmp_path, kind, *stages[:-1], folder="without")
    module, _ = run(tmp_path, kind, *stages)
    inputs = calibration_inputs(kind, tmp_path)
    dense, before, after = (model.eval()(inputs) for model in (make_model(kind), without, module))
    assert (after - dense).norm() < (before - dense).norm()
    assert not broken_constraints(module, collect_constraints(module))
    record = records(tmp_path)[-1]
    assert record["size_bytes"] > records(tmp_path, "without")[-1]["size_bytes"] or kind == "deit"
    note = next(note for note in record["notes"] if note.startswith("squared output error that earlier stages cause"))
    assert float(note.split(": ")[1].split(" ")[0]) < 0.9
    assert "metrics_before_finetuning" not in record
    loaded = load(tmp_path / "run")
    assert torch.equal(logits(loaded, kind), logits(module, kind))
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    assert not frozen  # nothing is trained, so that nothing was frozen


def test_the_size_counts_adapters_and_their_bits(tmp_path):
    sizes = {}
    layers = GPTQ().find_layers(make_model("llama"))
    for bits in (None, 8, 4):
        module, _ = run(tmp_path, "llama", RTN(4), LoRA(**APART, adapter_bits=bits), folder=str(bits))
        sizes[bits] = measure_size(module, layers).size_bytes
        loaded = load(tmp_path / str(bits))
        assert torch.equal(logits(loaded, "llama"), logits(module, "llama"))
        adapters = [layer for name, layer in named_layers(module) if "lora_" in name]
        entries = sum(layer.weight.numel() for layer in adapters)
        levels = max(weight_matrix(layer)[0].unique().numel() for layer in adapters)
        assert levels <= 2 ** (bits or 32)
        if bits is not None:
            saved = sizes[None] - sizes[bits]
            assert 0.7 * entries * (32 - bits) / 8 < saved <= entries * (32 - bits) / 8


@torch.no_grad()
def test_a_block_is_corrected_on_the_inputs_that_corrected_blocks_give_out(tmp_path):
    dense = weight_matrix(dict(named_layers(make_model("llama")))["model.model.layers.1.self_attn.q_proj"])
    module, _ = run(tmp_path, "llama", RTN(3), LoRA(**APART))
    wrapper = module.get_submodule("model.model.layers.1.self_attn.q_proj")
    rows = []
    wrapper.register_forward_pre_hook(lambda _, args: rows.append(args[0].reshape(-1, 32)))
    module.eval()(torch.from_numpy(np.load(tmp_path / "calibration.npy")))
    inputs = torch.cat(rows)
    hessian = damped_hessian(inputs.T @ inputs, 0.01)
    a, b = correct_low_rank(dense - weight_matrix(wrapper.get_base_layer()), hessian, 4)
    np.testing.assert_allclose(update_of(wrapper, *wrapper.active_adapters), b @ a, atol=1e-5)


def test_a_correction_can_be_trained_and_merged(tmp_path):
    run(tmp_path, "llama", SparseGPT(0.5), LoRA(rank=4, initialization="eora", epochs=1, learning_rate=1e-4))
    notes = " ".join(records(tmp_path)[-1]["notes"])
    assert "merged into the mask" in notes
    assert "squared output error" in notes


def test_a_second_correction_adds_to_the_first(tmp_path):
    run(tmp_path, "llama", RTN(3), LoRA(**APART), LoRA(**APART))
    first, second = (records(tmp_path)[i]["notes"] for i in (-2, -1))
    assert any("squared output error" in note for note in first)
    assert any("squared output error" in note for note in second)
    loaded = load(tmp_path / "run")
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == 2 * 2 * 7


@pytest.mark.parametrize(
    ("stages", "key", "message", "way_out"),
    [
        ([LoRA(**APART)], "initialization", "nothing to correct", "Put it after them."),
        ([RTN(4), LoRA(**EORA)], "merge", "round the correction away", "Set merge: false, or epochs to 1 or more."),
        ([QuaRot(), RTN(4), LoRA(**APART)], "initialization", "changed what the layers compute", "Leave one of"),
        ([Finetune(epochs=1), RTN(4), LoRA(**APART)], "initialization", "undo the training", "Put it before"),
        ([RTN(4), LoRA(**{**APART, "rank": 64})], "initialization", "directions out of the error", "Lower rank"),
        ([RTN(4), LoRA(**APART, adapter_bits=9)], "adapter_bits", "is not from 2 to 8", "Leave it out"),
        ([RTN(4), LoRA(rank=4, adapter_bits=4)], "adapter_bits", "training leaves the grid", "Drop it"),
    ],
)
def test_what_cannot_be_corrected_is_refused(tmp_path, stages, key, message, way_out):
    found = problems_of(tmp_path, "llama", *stages)
    assert [problem.key for problem in found] == [key]
    assert message in found[0].text
    assert found[0].way_out.startswith(way_out)


def test_without_calibration_data_it_is_refused(tmp_path):
    module = tiny.Regressor(optimizer=torch.optim.Adam, lr=0.01)
    with pytest.raises(RecipeError, match="needs calibration data"):
        tiny.trainer(tmp_path / "run", RTN(4), LoRA(**{**APART, "rank": 2})).fit(
            module, val_dataloaders=tiny.regression_loader()
        )


def test_the_other_initializations_still_need_training(tmp_path):
    found = problems_of(tmp_path, "llama", LoRA(epochs=0))
    assert [problem.key for problem in found] == ["epochs"]
