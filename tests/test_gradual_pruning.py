"""Gradual pruning: the mask follows the cubic, never shrinks, is never trained over, and ends at the exact count."""

from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from interrupt import undisturbed_and_resumed
from lightning.pytorch import Callback
from tiny import Regressor, make_data, make_model, regression_data, regression_loader, trainer
from torch.utils.data import DataLoader, IterableDataset

from pqqp_lightning import load
from pqqp_lightning.algorithms.gradual import cubic_sparsity, grow_mask
from pqqp_lightning.algorithms.magnitude import prune_magnitude
from pqqp_lightning.callbacks.finetune import Finetune
from pqqp_lightning.callbacks.gradual_pruning import GradualPruning
from pqqp_lightning.callbacks.magnitude import Magnitude
from pqqp_lightning.callbacks.rtn import RTN
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.constraints import collect_constraints
from pqqp_lightning.network.layers import weight_matrix
from pqqp_lightning.storage.records import read_records

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.005, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


class Zeros(Callback):
    """Where the weights of a layer are zero, at the start of every training batch and in every validation."""

    def __init__(self, layer="blocks.0.up"):
        self.layer, self.training, self.validation = layer, [], []

    def _seen(self, module):
        return weight_matrix(module.get_submodule(self.layer)).cpu().clone() == 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.training.append((trainer.global_step, self._seen(pl_module)))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.training or trainer.state.fn == "fit":
            self.validation.append(self._seen(pl_module))


def fit(folder, *stages, module=None, samples=24, **options):
    """Run ``stages`` on a tiny regressor: three steps an epoch with 24 samples."""
    module = module or Regressor(optimizer=torch.optim.AdamW, lr=0.01)
    trainer(folder, *stages, **options).fit(module, regression_loader(samples), regression_loader(16, seed=1))
    return module


def test_the_schedule_is_the_papers_equation():
    for initial, final, steps in ((0.0, 0.5, 10), (0.25, 0.9, 37), (0.5, 0.5, 4)):
        for t in range(steps + 1):
            expected = final + (initial - final) * (1 - t / steps) ** 3
            assert cubic_sparsity(t, steps, initial=initial, final=final) == pytest.approx(expected)
        assert cubic_sparsity(0, steps, initial=initial, final=final) == initial
        assert cubic_sparsity(steps + 5, steps, initial=initial, final=final) == final
    assert cubic_sparsity(0, 0, initial=0.0, final=0.5) == 0.5


def grow_by_loops(weight, sparsity, pattern, mask):
    """Remove one entry after another: the smallest remaining one that its group of M columns may still lose."""
    removed = ~mask
    rows, columns = weight.shape
    by_size = sorted(
        ((abs(weight[i, j]), i, j) for i in range(rows) for j in range(columns)), key=lambda entry: entry[0]
    )
    for _, i, j in by_size:
        if removed.sum() >= round(sparsity * weight.size):
            break
        if pattern is not None:
            n, m = pattern
            if removed[i, j // m * m : j // m * m + m].sum() >= m - n:
                continue
        removed[i, j] = True
    return ~removed


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("earlier", [0.0, 0.2])
def test_growing_masks_agree_with_loops_and_never_shrink(pattern, earlier):
    generator = np.random.default_rng(5)
    weight = generator.standard_normal((6, 16))
    mask = generator.random(weight.shape) >= earlier
    for sparsity in (0.0, 0.1, 0.3, 0.45, 0.5, 0.7):
        expected = grow_by_loops(weight, sparsity, pattern, mask.copy())
        grown = grow_mask(
            torch.from_numpy(weight), sparsity=sparsity, pattern=pattern, mask=torch.from_numpy(mask)
        ).numpy()
        assert (grown == expected).all()
        assert (grown <= mask).all()
        mask, weight = grown, weight + 0.3 * generator.standard_normal(weight.shape)  # training moves the weights


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_follow_the_cubic_and_stay_whatever_the_optimizer(tmp_path, optimizer, accumulate):
    kind, arguments = OPTIMIZERS[optimizer]
    zeros, module = Zeros(), Regressor(optimizer=kind, **arguments)
    stage = GradualPruning(0.8, initial_sparsity=0.1, every=2, ramp=0.5, epochs=8)
    fit(tmp_path, stage, module=module, callbacks=[zeros], samples=48, accumulate_grad_batches=accumulate)
    entries, ramp = 128, 24 // accumulate
    for step, zero in zeros.training:
        updated = min(step if step >= ramp else step - step % 2, ramp)
        s_i = round(0.1 * entries) / entries
        s_f = round(0.8 * entries) / entries
        assert int(zero.sum()) == round((s_f + (s_i - s_f) * (1 - updated / ramp) ** 3) * entries), step
    seen = [zero for _, zero in zeros.training]
    assert all(bool((before <= after).all()) for before, after in pairwise(seen))
    final = ~collect_constraints(module)["blocks.0.up"].mask()
    assert torch.equal(seen[-1], final)
    assert torch.equal(weight_matrix(module.blocks[0].up) == 0, final)


def test_validation_inside_of_the_segment_sees_the_zeros(tmp_path):
    zeros = Zeros()
    fit(tmp_path, GradualPruning(0.75, epochs=4, ramp=0.5), callbacks=[zeros])
    inside = [int(zero.sum()) for zero in zeros.validation if zero.any()]
    assert inside == sorted(inside)
    assert inside[-1] == 96


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
def test_the_final_count_is_that_of_one_shot_pruning(tmp_path, sparsity, epochs):
    module = fit(tmp_path, GradualPruning(sparsity, epochs=epochs))
    for name, constraints in collect_constraints(module).items():
        one_shot = prune_magnitude(torch.randn(constraints.shape), sparsity=sparsity)
        assert constraints.kept() == int(one_shot.sum()), name
    assert read_records(tmp_path)[-1]["constraints_verified"]


def test_a_segment_that_ends_early_still_gives_the_final_mask(tmp_path):
    module = fit(tmp_path, GradualPruning(0.5, epochs=4, ramp=1.0), max_steps=5)
    assert all(c.kept() * 2 == c.shape[0] * c.shape[1] for c in collect_constraints(module).values())


@pytest.mark.parametrize("earlier", [None, 0.6])
def test_a_pattern_is_reached_entry_by_entry(tmp_path, earlier):
    zeros = Zeros()
    stages = [] if earlier is None else [Magnitude(earlier)]
    module = fit(tmp_path, *stages, GradualPruning(pattern="2:4", epochs=8, ramp=0.5), callbacks=[zeros])
    counts = [int(zero.sum()) for _, zero in zeros.training]
    assert counts == sorted(counts)
    assert len(set(counts)) > 3
    assert counts[0] == (0 if earlier is None else round(0.6 * 128))
    constraints = collect_constraints(module)["blocks.0.up"]
    assert constraints.pattern == (2, 4)
    groups = constraints.mask().view(16, 2, 4).sum(-1)
    assert bool((groups == 2).all()) if earlier is None else bool((groups <= 2).all())
    assert int((~constraints.mask()).sum()) == counts[-1]


def test_it_starts_from_an_earlier_mask_and_stays_within_it(tmp_path):
    zeros, masks = Zeros(), []

    class Between(Finetune):
        def on_train_start(self, trainer, pl_module):
            masks.append(collect_constraints(pl_module)["blocks.0.up"].mask())

    module = fit(tmp_path, Magnitude(0.5), Between(1), GradualPruning(0.8, epochs=4), callbacks=[zeros])
    assert min(int(zero.sum()) for _, zero in zeros.training) == 64
    final = collect_constraints(module)["blocks.0.up"].mask()
    assert bool((final <= masks[0]).all())
    assert int((~final).sum()) == round(0.8 * 128)


def test_a_milder_stage_after_a_stronger_one_changes_no_mask(tmp_path):
    module = fit(tmp_path, Magnitude(0.75), GradualPruning(0.5, epochs=1))
    assert collect_constraints(module)["blocks.0.up"].kept() == 32


def test_pruning_in_training_loses_less_than_pruning_after_it(tmp_path):
    losses = {}
    for name, stages in {
        "gradual": [Finetune(20), GradualPruning(0.8, epochs=10)],
        "one-shot": [Finetune(20), Magnitude(0.8)],
    }.items():
        fit(tmp_path / name, *stages, samples=96)
        losses[name] = read_records(tmp_path / name)[-1]["metrics"]["mse"]
    assert losses["gradual"] < 0.8 * losses["one-shot"]


@pytest.mark.parametrize("at", [(1, 0, 1), (1, 2, 0), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("amount", [{"sparsity": 0.7, "initial_sparsity": 0.2}, {"pattern": "2:4"}], ids=str)
def test_a_resumed_run_ends_as_an_undisturbed_one(tmp_path, amount, at):
    stages = lambda: [GradualPruning(**amount, epochs=4, every=2), RTN(4)]  # noqa: E731
    a, b = undisturbed_and_resumed(tmp_path, stages, lambda: Regressor(dropout=0.2, lr=0.005, momentum=0.9), at)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert all(torch.equal(c.mask(), collect_constraints(b)[name].mask()) for name, c in collect_constraints(a).items())


@pytest.mark.parametrize("kind", ["llama", "opt", "deit", "resnet"])
def test_what_is_saved_loads_to_the_same_outputs(tmp_path, kind):
    module, data = make_model(kind), make_data(kind, tmp_path)
    trainer(tmp_path / "run", GradualPruning(pattern="2:4", epochs=2, learning_rate=1e-3)).fit(module, datamodule=data)
    loaded = load(tmp_path / "run")
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert read_records(tmp_path / "run")[-1]["sparsity"] == 0.5


class Endless(IterableDataset):
    """Training data without a length."""

    def __iter__(self):
        return iter([regression_data()[i] for i in range(24)])


def test_training_data_without_a_length_needs_a_limit(tmp_path):
    def fit_endless(folder, **options):
        module = Regressor()
        engine = trainer(folder, GradualPruning(0.5), **options)
        engine.fit(module, DataLoader(Endless(), 8), regression_loader(16))
        return collect_constraints(module)

    with pytest.raises(RecipeError, match=r"gradualpruning.*has no length.*Set trainer.limit_train_batches"):
        fit_endless(tmp_path / "a")
    assert fit_endless(tmp_path / "b", limit_train_batches=3)["blocks.0.up"].kept() == 64


@pytest.mark.parametrize(
    ("options", "blamed"),
    [
        ({"epochs": 0}, ("epochs", 0)),
        ({"epochs": -1}, ("epochs", -1)),
        ({"ramp": 0.0}, ("ramp", 0.0)),
        ({"every": 0}, ("every", 0)),
        ({"initial_sparsity": 0.5}, ("initial_sparsity", 0.5)),
        ({"sparsity": {"up": 0.3, "*": 0.6}, "initial_sparsity": 0.4}, ("initial_sparsity", 0.4)),
        ({"sparsity": None, "pattern": "3:4", "initial_sparsity": 0.25}, ("initial_sparsity", 0.25)),
        ({"pattern": "2:4"}, ("pattern", "2:4")),
        ({"sparsity": 1.5}, ("sparsity", 1.5)),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tmp_path, options, blamed):
    with pytest.raises(RecipeError) as caught:
        fit(tmp_path / "run", GradualPruning(**({"sparsity": 0.5} | options)))
    assert blamed in tiny.blamed(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_quantized_layer_is_not_moved(tmp_path):
    with pytest.raises(RecipeError, match=r"epochs=1 would move .* off the grid of stage 'rtn'"):
        fit(tmp_path / "run", RTN(4), GradualPruning(0.5))
