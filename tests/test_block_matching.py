"""Block matching: the loss and Adam's steps by hand, constraints that hold, and errors that never rise."""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest
import torch
from kinds import NETWORKS, KindModule
from test_polish import GRIDS
from tiny import Regressor, blamed, make_data, make_model, regression_loader, trainer
from torch import nn

from pqqp_lightning.algorithms.block_matching import FROM_END, cosine_decay, start_in_cells
from pqqp_lightning.algorithms.grid import encode, fit_grid, round_to_grid
from pqqp_lightning.calibration.batch_norm import batch_norms, norms_of_blocks, recalibrate_batch_norms
from pqqp_lightning.calibration.block_training import BlockTraining, TrainedLayer
from pqqp_lightning.calibration.chain import Call, first_output
from pqqp_lightning.calibration.token_mask import TokenMask
from pqqp_lightning.calibration.walk import BlockPass, Walk, calibrating
from pqqp_lightning.callbacks.activation_quantization import ActivationQuantization
from pqqp_lightning.callbacks.basis_sharing import BasisSharing
from pqqp_lightning.callbacks.block_matching import BlockMatching
from pqqp_lightning.callbacks.gptq import GPTQ
from pqqp_lightning.callbacks.magnitude import Magnitude
from pqqp_lightning.callbacks.nf4 import NF4
from pqqp_lightning.callbacks.polish import Polish
from pqqp_lightning.callbacks.quarot import QuaRot
from pqqp_lightning.callbacks.rtn import RTN
from pqqp_lightning.callbacks.sleb import SLEB
from pqqp_lightning.callbacks.sparsegpt import SparseGPT
from pqqp_lightning.callbacks.wanda import Wanda
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.blocks import find_blocks
from pqqp_lightning.network.constraints import Constraints, broken_constraints, collect_constraints, set_constraints
from pqqp_lightning.storage.records import read_records


@pytest.mark.parametrize("kind", GRIDS)
def test_training_starts_at_the_stored_weights_as_near_to_the_dense_ones_as_they_allow(kind):
    dense = torch.randn(8, 128, generator=torch.manual_seed(0))
    grid = GRIDS[kind](dense)
    weight = round_to_grid(dense + 0.4 * dense.std() * torch.randn(8, 128), grid)  # as GPTQ: not the nearest level
    start = start_in_cells(weight, dense, grid)
    assert torch.equal(round_to_grid(start, grid), weight)
    assert ((start - dense).abs() <= (weight - dense).abs() + 1.01 * FROM_END * grid.scale.max()).all()
    if grid.codebook is None:
        codes = encode(weight, grid)
        inner = (codes > 0) & (codes < grid.levels)  # at the ends the gradient would be zero
        distance = (dense - weight).abs() / grid.expanded_scale()
        near, far = inner & (distance < 0.39), inner & (distance > 0.41)
        assert near.any()
        assert far.any()
        assert torch.allclose(start[near], dense[near], atol=1e-5)
        assert torch.allclose(((start - weight).abs() / grid.expanded_scale())[far], torch.tensor(0.4), atol=1e-3)


def block_training(weight, mask, inputs, targets, masks=None, grid=None):
    block = nn.Linear(*reversed(weight.shape), bias=False)
    with torch.no_grad():
        block.weight.copy_(weight)
    constraints = Constraints(tuple(weight.shape)).with_mask(mask)
    set_constraints(block, constraints if grid is None else constraints.with_grid(grid))
    run = BlockPass(block, [Call((x,), {}) for x in inputs], list(inputs))
    return BlockTraining(run, {"layer": TrainedLayer(block, weight, True)}, targets, masks or [None] * len(inputs))


def toy(seed=0):
    generator = torch.manual_seed(seed)
    mask = torch.rand(4, 6, generator=generator) > 0.5
    weight = torch.randn(4, 6, generator=generator) * mask
    inputs = [torch.randn(5, 6, generator=generator) for _ in range(2)]
    dense = torch.randn(4, 6, generator=generator)
    return weight, mask, inputs, [x @ dense.T for x in inputs]


def test_two_steps_are_adams_on_the_loss_by_hand():
    weight, mask, inputs, targets = toy()
    matched = block_training(weight, mask, inputs, targets).train(passes=1, step=0.05)
    w, m = weight.double().numpy().copy(), mask.numpy()
    x, t = [a.double().numpy() for a in inputs], [a.double().numpy() for a in targets]

    def loss(w):
        return sum(((a @ w.T - b) ** 2).sum() for a, b in zip(x, t, strict=True)) / sum((b**2).sum() for b in t)

    assert matched.before == pytest.approx(loss(w), rel=1e-5)
    size = math.sqrt((w[m] ** 2).mean())
    unit = matched.before * sum((b**2).sum() for b in t) / len(x)
    first = second = np.zeros_like(w)
    for i in range(2):
        gradient = 2 * (x[i] @ w.T - t[i]).T @ x[i] * m / unit
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        rate = 0.05 * size * (1 + math.cos(math.pi * i / 2)) / 2
        w -= rate * (first / (1 - 0.9 ** (i + 1))) / (np.sqrt(second / (1 - 0.999 ** (i + 1))) + 1e-8)
    assert matched.after == pytest.approx(loss(w), rel=1e-4)
    assert matched.after < matched.before
    assert matched.weights["layer"][0].numpy() == pytest.approx(w, abs=1e-5)
    assert cosine_decay(0, 7) == 1
    assert cosine_decay(7, 7) == pytest.approx(0, abs=1e-12)


def test_a_step_too_large_leaves_the_block_as_it_was():
    matched = block_training(*toy()).train(passes=2, step=0.9)
    good = block_training(*toy()).train(passes=2, step=0.01)
    assert good.after < good.before
    assert matched.after <= matched.before
    weight, mask, inputs, _ = toy()
    perfect = block_training(weight, mask, inputs, [x @ weight.T for x in inputs]).train(passes=2, step=0.9)
    assert perfect.weights == {}
    assert perfect.after == perfect.before == pytest.approx(0, abs=1e-12)


def test_padded_positions_do_not_count():
    weight, mask, inputs, targets = toy()
    counts = TokenMask(torch.tensor([[True, True, True, False, False]]))
    inputs, targets = [x[None] for x in inputs], [t[None] for t in targets]
    other = [torch.cat([t[:, :3], t[:, 3:] + 100], dim=1) for t in targets]
    results = [block_training(weight, mask, inputs, t, [counts, counts]).train(2, 0.05) for t in (targets, other)]
    assert results[0].after == results[1].after < results[0].before
    assert torch.equal(results[0].weights["layer"][0], results[1].weights["layer"][0])


def test_a_trained_scale_keeps_its_precision_so_that_the_size_stays():
    weight, mask, inputs, targets = toy()
    for tiny_scale, dtype in ((1e-6, torch.float32), (1.0, torch.float16)):
        grid = fit_grid(weight * tiny_scale, 4)
        assert grid.scale.dtype == dtype
        training = block_training(round_to_grid(weight * tiny_scale, grid), mask, inputs, targets, grid=grid)
        matched = training.train(passes=4, step=0.5)  # far enough for another precision
        assert matched.after < matched.before
        assert matched.weights["layer"][1].scale.dtype == dtype
        assert not torch.equal(matched.weights["layer"][1].scale, grid.scale)


def fit(folder, kind, *stages, **options):
    module = make_model(kind)
    trainer(folder, *stages).fit(module, datamodule=make_data(kind, folder.parent), **options)
    return module, read_records(folder)[-1]


PREFIXES = {
    "SparseGPT, GPTQ": lambda: [SparseGPT(0.5), GPTQ(4)],
    "GPTQ in groups, SparseGPT": lambda: [GPTQ(3, group_size=16, symmetric=False), SparseGPT(pattern="2:4")],
    "a mask alone": lambda: [Wanda(0.5)],
    "NF4": lambda: [NF4(group_size=32)],
    "a shorter model": lambda: [SLEB(1, granularity="sublayer"), Wanda(0.5)],
    "one scale for all": lambda: [RTN(4, group_size="tensor")],
}


@pytest.mark.parametrize(
    ("kind", "prefix", "inputs"),
    [
        *[("llama", prefix, "dense") for prefix in PREFIXES],
        ("llama", "SparseGPT, GPTQ", "compressed"),
        ("opt", "a mask alone", "dense"),
        ("deit", "SparseGPT, GPTQ", "dense"),
        ("resnet", "SparseGPT, GPTQ", "dense"),
    ],
)
def test_masks_and_grids_hold_and_the_error_falls(tmp_path, kind, prefix, inputs):
    before, _ = fit(tmp_path / "before", kind, *PREFIXES[prefix]())
    after, record = fit(tmp_path / "after", kind, *PREFIXES[prefix](), BlockMatching(inputs=inputs))
    promised, kept = collect_constraints(before), collect_constraints(after)
    assert not broken_constraints(after, kept)
    assert promised.keys() == kept.keys()
    for name, constraints in promised.items():
        if constraints.mask_bits is not None:
            assert torch.equal(constraints.mask(), kept[name].mask())
            assert constraints.pattern == kept[name].pattern
        if constraints.grid is not None:
            assert kept[name].grid.is_like(constraints.grid)
            assert kept[name].grid.scale.dtype == constraints.grid.scale.dtype
    (note,) = [note for note in record["notes"] if note.startswith("squared error of the blocks' outputs")]
    numbers = [float(word) for word in re.findall(r"[0-9.]+(?:e-[0-9]+)?", note)]
    assert numbers[0] < 0.99 * numbers[1]  # the images are one batch, so that 8 passes are 8 steps
    assert not all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_scales_stay_where_they_are_not_trained(tmp_path):
    before, _ = fit(tmp_path / "before", "llama", GPTQ(3))
    after, _ = fit(tmp_path / "after", "llama", GPTQ(3), BlockMatching(scales=False))
    moved, _ = fit(tmp_path / "moved", "llama", GPTQ(3), BlockMatching())
    scales = [[c.grid.scale for c in collect_constraints(module).values()] for module in (before, after, moved)]
    assert all(torch.equal(a, b) for a, b in zip(scales[0], scales[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(scales[0], scales[2], strict=True))


def states(module, batches):
    """What each block computes on all ``batches``: float64, in one tensor for each block."""
    found = {name: [] for name in find_blocks(module)}
    handles = []
    for name, block in find_blocks(module).items():
        keep = lambda _, inputs, output, name=name: found[name].append(first_output(output).double())  # noqa: E731
        handles.append(block.register_forward_hook(keep))
    with torch.no_grad():
        for batch in batches:
            module.eval()(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(outputs) for name, outputs in found.items()}


def with_block(module, name, other):
    """``module`` with the block ``name`` of another one, in a copy."""
    mixed = copy.deepcopy(module)
    mixed.set_submodule(name, copy.deepcopy(other.get_submodule(name)))
    return mixed


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [("llama", "dense"), ("llama", "compressed"), ("deit", "dense"), ("deit", "compressed"), ("resnet", "dense")],
)
def test_no_block_ends_further_from_the_dense_one_than_it_began(tmp_path, kind, inputs):
    """Each block on what the finished model gives it, beside the same block before the stage. By hand."""
    prefix = [SparseGPT(0.5, batch_norm="keep"), GPTQ(3, batch_norm="keep")]
    before, _ = fit(tmp_path / "before", kind, *prefix)
    after, _ = fit(tmp_path / "after", kind, *prefix, BlockMatching(inputs=inputs, batch_norm="keep"))
    dense = make_model(kind)
    data = make_data(kind, tmp_path)
    data.setup("fit")
    batches = [batch["input_ids"] if kind == "llama" else batch[0] for batch in data.calibration_dataloader()]
    outputs, of_dense = states(after, batches), states(dense, batches)
    better = []
    for name, output in outputs.items():
        target = of_dense[name]
        if inputs == "compressed":
            target = states(with_block(after, name, dense), batches)[name]
        earlier = (states(with_block(after, name, before), batches)[name] - target).square().sum()
        later = (output - target).square().sum()
        assert later <= earlier * (1 + 1e-5), name
        better.append(later < 0.999 * earlier)
    assert any(better)


@pytest.mark.parametrize("kind", NETWORKS)
def test_layers_of_every_kind_are_trained_or_left(tmp_path, kind):
    blocks = ["inlet", "network"]
    prefix = [Magnitude(0.5), RTN(3)]
    modules = []
    for stages in (prefix, [*prefix, BlockMatching(20, blocks=blocks)]):
        modules.append(KindModule(kind))
        trainer(tmp_path / f"{len(stages)}", *stages).fit(modules[-1], *[regression_loader()] * 2)
    before, after = modules
    note = " ".join(read_records(tmp_path / "3")[-1]["notes"])
    kept = collect_constraints(after)
    assert not broken_constraints(after, kept)
    assert len(kept) == len(collect_constraints(before)) > 0
    changed = []
    for (name, old), new in zip(before.network.named_parameters(), after.network.parameters(), strict=True):
        if not torch.equal(old, new):
            changed.append(name)
    if kind in ("lstm", "gru", "rnn"):
        assert not changed
        assert "cannot exchange their weights in a forward pass" in note
    elif kind != "conv1d":  # circular, so that its mean over the positions is 0 whatever its weights are
        assert changed, note
        assert "bias" not in "".join(changed)


class Watched(BlockMatching):
    """Keeps what each block was trained with."""

    def _train(self, block, training):
        self.seen[block] = [target.clone() for target in training.targets]
        return super()._train(block, training)


@pytest.mark.parametrize("outside", [Magnitude(0.9, targets=["inlet"]), ActivationQuantization(2, targets=["*"])])
def test_dense_inputs_are_the_dense_models_also_where_layers_before_the_blocks_are_compressed(tmp_path, outside):
    stage = Watched(1)
    stage.seen = {}
    loader = regression_loader()
    fitted = Regressor()
    trainer(tmp_path / "run", outside, RTN(2, targets=["blocks.*"]), stage).fit(fitted, loader, loader)
    of_dense = states(Regressor(), [x for x, _ in loader])
    assert stage.seen.keys() == of_dense.keys()
    for name, targets in stage.seen.items():
        assert torch.allclose(torch.cat(targets).double(), of_dense[name], atol=1e-5), name


def test_it_leaves_no_gradients_and_freezes_nothing(tmp_path):
    module, _ = fit(tmp_path / "run", "opt", Wanda(0.5), BlockMatching(1))  # with biases and norms in the blocks
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("killed", ["in the second block", "in the stage after it"])
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch, killed):
    stages = [Wanda(0.5), RTN(3), BlockMatching(2), Polish(2)]
    module, record = fit(tmp_path / "whole", "llama", *stages)
    calls = []
    train = BlockTraining.train

    def die(*arguments, **options):
        calls.append(arguments)
        if killed == "in the second block" and len(calls) < 2:
            return train(*arguments, **options)
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(*((BlockTraining, "train") if killed == "in the second block" else (Polish, "repair")), die)
        with pytest.raises(InterruptedError):
            fit(tmp_path / "killed", "llama", *stages)
    resumed, again = fit(tmp_path / "killed", "llama", *stages, ckpt_path="last")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in module.state_dict().items())
    assert again["metrics"] == record["metrics"]


def test_a_blocks_statistics_are_those_that_the_whole_model_gets(tmp_path):
    """The engine estimates them again after the stage, which must not change what the blocks were matched with."""
    module = make_model("resnet").eval()
    batches = [torch.randn(8, 3, 32, 32, generator=torch.manual_seed(i)) for i in range(2)]
    walk = Walk(module, find_blocks(module), batches, batches[0][:1], module, progress=False)
    recalibrate_batch_norms(walk)
    with torch.no_grad():
        next(iter(walk.blocks.values())).conv1.weight.mul_(-1.5)
    whole = copy.deepcopy(module)
    recalibrate_batch_norms(Walk(whole, find_blocks(whole), batches, batches[0][:1], whole, progress=False))
    with calibrating(module):
        norms = norms_of_blocks(walk)
        for block, run in walk.block_passes(every_block=False):
            norms[block].recalibrate(run)
    for name, norm in batch_norms(module).items():
        assert torch.allclose(norm.running_var, batch_norms(whole)[name].running_var, rtol=1e-4, atol=1e-6), name


class Skipping(Regressor):
    """Its blocks do not feed one another directly."""

    def forward(self, x):
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x * 2)
        return self.head(x)


@pytest.mark.parametrize(
    ("model", "stages", "key", "reason"),
    [
        (Regressor, [BlockMatching()], "", "has nothing to repair"),
        (Regressor, [Magnitude(0.5), BlockMatching(passes=0)], "passes", "is not above 0"),
        (Regressor, [Magnitude(0.5), BlockMatching(step=1.0)], "step", "is not between 0 and 1"),
        (Regressor, [Magnitude(0.5), BlockMatching(inputs="other")], "inputs", "is not one of"),
        (lambda: Regressor(blocks=1), [Magnitude(0.5), BlockMatching()], "blocks", "has no blocks"),
        (Skipping, [Magnitude(0.5), BlockMatching()], "blocks", "do not feed one another"),
        (Regressor, [Magnitude(0.5, targets=["head"]), BlockMatching(targets=["head"])], "targets", "in the blocks"),
        (Regressor, [Magnitude(0.5, epochs=1), BlockMatching()], "", "would undo the training"),
    ],
)
def test_what_cannot_be_matched_is_refused_with_the_way_out(tmp_path, model, stages, key, reason):
    with pytest.raises(RecipeError) as caught:
        trainer(tmp_path / "run", *stages).fit(model(), regression_loader(), regression_loader(16, seed=1))
    (problem,) = caught.value.problems
    assert problem.key == ".".join(["stages", "blockmatching", *([key] if key else [])])
    assert reason in problem.text
    assert problem.way_out.endswith(".")
    assert not (tmp_path / "run").exists()  # before any work


def test_without_calibration_data_it_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="needs calibration data"):
        trainer(tmp_path / "run", Magnitude(0.5), BlockMatching()).fit(Regressor(), val_dataloaders=regression_loader())


def test_outputs_that_are_not_finite_end_the_run_with_the_block_named(tmp_path):
    class Overflowing(Regressor):
        def forward(self, x):
            return super().forward(x * 1e30)

    with pytest.raises(RecipeError, match=r"blocks\.0: its outputs, .* NaN or infinite") as caught:
        trainer(tmp_path / "run", Magnitude(0.5), BlockMatching()).fit(Overflowing(), *[regression_loader()] * 2)
    assert caught.value.problems[0].way_out


@pytest.mark.parametrize(
    ("stage", "reason"),
    [(QuaRot(), "changed what the layers compute"), (BasisSharing(ratio=0.5), "no dense block corresponds")],
)
def test_a_changed_structure_is_refused(tmp_path, stage, reason):
    with pytest.raises(RecipeError) as caught:
        fit(tmp_path / "run", "llama", stage, RTN(4), BlockMatching())
    assert any(reason in problem.text for problem in caught.value.problems)
    assert blamed(caught.value)
