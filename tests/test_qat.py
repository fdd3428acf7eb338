"""Quantization-aware finetuning: gradients as the papers write them, and weights that end on their grid."""

import copy
import math

import numpy as np
import pytest
import torch
from interrupt import undisturbed_and_resumed
from lightning.pytorch import Callback
from tiny import Regressor, make_data, make_model, regression_loader, trainer
from torch import nn

from pqqp_lightning import load
from pqqp_lightning.algorithms.grid import fit_grid, round_to_grid
from pqqp_lightning.algorithms.lsq import fake_quantize, grid_of, scale_from_units, scale_unit, stored_scale
from pqqp_lightning.callbacks.finetune import Finetune
from pqqp_lightning.callbacks.gradual_pruning import GradualPruning
from pqqp_lightning.callbacks.magnitude import Magnitude
from pqqp_lightning.callbacks.qat import QAT
from pqqp_lightning.callbacks.rtn import RTN
from pqqp_lightning.checkpoint.format import read_manifest
from pqqp_lightning.checkpoint.load import restore
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.constraints import broken_constraints, collect_constraints
from pqqp_lightning.network.layers import to_weight, weight_matrix
from pqqp_lightning.storage.records import read_records
from pqqp_lightning.surgery.fake_quantize import FakeQuantize, attach, detach, quantizer_of

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.005, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.005, "weight_decay": 0.1}),
}


def fit(folder, *stages, module=None, samples=24, **options):
    """Run ``stages`` on a tiny regressor: three steps an epoch with 24 samples."""
    module = module or Regressor(optimizer=torch.optim.AdamW, lr=0.005)
    trainer(folder, *stages, **options).fit(module, regression_loader(samples), regression_loader(16, seed=1))
    return module


class Watch(Callback):
    """Keeps what ``look`` says of the module at every training batch."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(self.look(pl_module))


def lsq_by_loops(weight, scale, zero, bits, gradient):
    """(rounded weights, their gradient, the scales' gradient) entry by entry from equations 1, 2, 3 and 5."""
    rows, columns = weight.shape
    groups = 1 if scale.size == 1 else scale.shape[1]
    rounded, to_weight, to_scale = np.zeros_like(weight), np.zeros_like(weight), np.zeros_like(scale)
    sharing = weight.size / scale.size
    for i in range(rows):
        for j in range(columns):
            at = (0, 0) if scale.size == 1 else (i, j // (columns // groups))
            s = scale[at]
            q_n = 2 ** (bits - 1) if zero is None else int(zero[at])
            q_p = 2**bits - 1 - q_n
            ratio = weight[i, j] / s
            rounded[i, j] = np.round(min(max(ratio, -q_n), q_p)) * s
            if ratio <= -q_n:
                slope = -q_n
            elif ratio >= q_p:
                slope = q_p
            else:
                slope = -ratio + np.round(ratio)
                to_weight[i, j] = gradient[i, j]
            to_scale[at] += gradient[i, j] * slope / math.sqrt(sharing * max(q_p, 1))
    return rounded, to_weight, to_scale


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("grouping", [{}, {"group_size": 4}, {"per_tensor": True}], ids=str)
def test_rounding_and_gradients_agree_with_the_papers_equations(bits, symmetric, grouping):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 12, generator=generator)
    gradient = torch.randn(6, 12, generator=generator)
    grid = fit_grid(weight, bits, symmetric=symmetric, **grouping)
    scale = grid.scale.float() * 0.7  # so that some weights are out of range
    v, s = weight.clone().requires_grad_(), scale.clone().requires_grad_()
    result = fake_quantize(v, s, grid.zero, bits)
    result.backward(gradient)
    zero = None if grid.zero is None else grid.zero.numpy()
    expected = lsq_by_loops(weight.double().numpy(), scale.double().numpy(), zero, bits, gradient.double().numpy())
    for ours, reference in zip((result.detach(), v.grad, s.grad), expected, strict=True):
        assert ours.numpy() == pytest.approx(reference, rel=1e-4, abs=1e-5)


def test_the_gradient_is_that_at_the_rounded_point_inside_of_the_range_and_none_outside():
    weight = torch.linspace(-3, 3, 24).view(1, 24).requires_grad_()
    scale = torch.full((1, 1), 0.3)
    rounded = fake_quantize(weight, scale, None, 3)
    (rounded**3).sum().backward()
    inside = (weight / scale > -4) & (weight / scale < 3)
    assert 0 < int(inside.sum()) < 24
    assert torch.equal(weight.grad, torch.where(inside, 3 * rounded.detach() ** 2, torch.zeros(())))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [1e-12, 1e-3, 1.0, 1e6])
def test_what_is_trained_is_what_is_stored(size, symmetric):
    weight = size * torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    start = fit_grid(weight, 4, symmetric=symmetric, group_size=8)
    learned = start.scale.float() * (
        1 + 0.1 * torch.rand(start.scale.shape, generator=torch.Generator().manual_seed(2))
    )
    grid = grid_of(learned, start.zero, 4, 16)
    assert grid.scale.dtype == (torch.float16 if size in (1e-3, 1.0) else torch.float32)
    trained = fake_quantize(weight, stored_scale(learned), start.zero, 4)
    assert torch.equal(trained, round_to_grid(weight, grid))
    assert torch.equal(trained, round_to_grid(trained, grid))


def test_a_scale_never_leaves_the_positive_numbers():
    scale = torch.tensor([[-0.3], [0.0], [0.3]], requires_grad=True)
    stored = stored_scale(scale)
    assert bool((stored > 0).all())
    stored.sum().backward()
    assert bool(torch.isfinite(scale.grad).all())


def steps_of(optimizer, learning_rate, unit):
    """How far one step of an optimizer moves a scale that is trained in units of ``unit``, and the weights."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    start = fit_grid(weight.detach(), 4).scale.float()
    unit = torch.ones_like(start) if unit is None else unit(start, weight.detach())
    parameter = (start / unit).requires_grad_()
    step = optimizer([weight, parameter], lr=learning_rate)
    before = weight.detach().clone()
    (fake_quantize(weight, scale_from_units(parameter, unit), None, 4) - torch.ones(4, 64)).square().sum().backward()
    step.step()
    moved = (parameter.detach() * unit - start).abs() / start
    return moved, float((weight.detach() - before).norm() / before.norm())


def test_plain_sgd_moves_a_scale_as_if_it_were_the_parameter():
    ours, plain = (steps_of(torch.optim.SGD, 1e-3, unit)[0] for unit in (scale_unit, None))
    assert ours.numpy() == pytest.approx(plain.numpy(), rel=1e-4)


def test_adam_moves_a_scale_by_the_fraction_by_which_it_moves_the_weights():
    ours, weights = steps_of(torch.optim.Adam, 1e-3, scale_unit)
    plain, _ = steps_of(torch.optim.Adam, 1e-3, None)
    assert all(0.6 < float(ratio) < 1.7 for ratio in ours / weights)
    assert float((plain / weights).min()) > 2


@pytest.mark.parametrize("weight", [torch.zeros(3, 8), torch.eye(8)[:3], 1e-30 * torch.ones(3, 8)], ids=str)
def test_units_are_powers_of_two_whatever_the_weights(weight):
    unit = scale_unit(fit_grid(weight, 4).scale, weight)
    assert bool(torch.isfinite(unit).all())
    assert bool((unit.log2() == unit.log2().round()).all())


@pytest.mark.parametrize("layer", [torch.nn.Linear(8, 6), torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(4, 6, 3, groups=2)])
def test_a_layer_computes_with_rounded_weights_and_gets_its_own_back(layer):
    before, kind = layer.weight, type(layer)
    dense = before.detach().clone()
    grid = fit_grid(weight_matrix(layer), 3, group_size=2)
    attach(layer, 3, tuple(grid.scale.shape), symmetric=True, learn_scale=True).start_from(grid, dense)
    assert isinstance(layer, kind)
    assert torch.equal(weight_matrix(layer), round_to_grid(weight_matrix_of(dense), grid))
    assert torch.equal(weight_matrix(copy.deepcopy(layer)), weight_matrix(layer))
    found = detach(layer)
    assert layer.weight is before
    assert type(layer) is kind
    assert torch.equal(layer.weight, dense)
    assert torch.equal(found.scale, grid.scale)


def weight_matrix_of(weight):
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.dim() == 4 else weight


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("options", [{}, {"symmetric": False, "group_size": 4}, {"group_size": "tensor"}], ids=str)
def test_weights_end_on_the_grid_with_the_bits_claimed(tmp_path, options, learn):
    scales = Watch(lambda m: quantizer_of(m.blocks[0].up).scale.detach().clone())
    originals = Watch(lambda m: m.blocks[0].up.parametrizations.weight.original.detach().clone())
    module = fit(tmp_path, QAT(3, **options, learn_scales=learn, epochs=3), callbacks=[scales, originals])
    constraints = collect_constraints(module)
    assert len(constraints) == 4
    assert not broken_constraints(module, constraints)
    for name, c in constraints.items():
        assert c.grid.bits == 3
        assert len(module.get_submodule(name).weight[0].unique()) <= 8 * c.grid.scale.shape[1]
    assert torch.equal(scales.seen[0], scales.seen[-1]) == (not learn)
    assert not torch.equal(originals.seen[0], originals.seen[-1])
    assert type(module.blocks[0].up) is torch.nn.Linear
    assert list(module.state_dict()) == list(Regressor().state_dict())
    assert all(p.requires_grad for p in module.parameters())
    assert read_manifest(tmp_path / "model")["plans"][0]["plan"] == {}


def test_it_starts_where_rounding_to_nearest_stands_and_ends_as_trained(tmp_path):
    fit(tmp_path / "rtn", RTN(3))
    fit(tmp_path / "qat", QAT(3, epochs=2))
    rtn, qat = (read_records(tmp_path / name)[-1]["metrics"] for name in ("rtn", "qat"))
    record = read_records(tmp_path / "qat")[-1]
    assert record["metrics_before_finetuning"] == rtn
    with next((tmp_path / "qat").glob("logs/version_0/metrics.csv")).open() as file:
        header, *rows = [line.strip().split(",") for line in file]
    evaluations = [float(row[header.index("mse")]) for row in rows if row[header.index("mse")]]
    assert evaluations[-1] == pytest.approx(qat["mse"], rel=1e-6)
    assert evaluations[-1] != pytest.approx(rtn["mse"], rel=1e-3)


@pytest.mark.parametrize("learn", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("bits", [2, pytest.param(3, marks=pytest.mark.long)])
def test_training_through_the_rounding_loses_less_than_rounding(tmp_path, bits, learn):
    every = {"targets": ["*"]}
    losses = {}
    stages = {"rtn": lambda: RTN(bits, **every), "qat": lambda: QAT(bits, learn_scales=learn, epochs=30, **every)}
    for name, stage in stages.items():
        module = Regressor(optimizer=torch.optim.AdamW, lr=0.005)
        train = regression_loader(96)
        trainer(tmp_path / name, Finetune(40), stage()).fit(module, train, train)
        losses[name] = read_records(tmp_path / name)[-1]["metrics"]["mse"]
    assert losses["qat"] < 0.7 * losses["rtn"]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("first", ["2:4", "gradual"])
def test_an_earlier_mask_holds_throughout(tmp_path, first, optimizer, options):
    kind, arguments = OPTIMIZERS[optimizer]
    zeros = Watch(lambda m: (weight_matrix(m.blocks[0].up) == 0).clone())
    stage = Magnitude(pattern="2:4", epochs=1) if first == "2:4" else GradualPruning(0.6, epochs=1)
    module = Regressor(optimizer=kind, **arguments)
    fit(tmp_path, stage, QAT(8, epochs=3), module=module, callbacks=[zeros], **options)
    constraints = collect_constraints(module)["blocks.0.up"]
    mask = constraints.mask()
    assert all(bool(zero[~mask].all()) for zero in zeros.seen[3:])
    assert constraints.kept() == (64 if first == "2:4" else 128 - round(0.6 * 128))
    assert constraints.grid.bits == 8
    assert not broken_constraints(module, collect_constraints(module))


def test_a_half_done_checkpoint_brings_back_mask_scales_and_weights(tmp_path):
    class Died(Exception):
        pass

    def die(module):
        raise Died

    module = Regressor()
    stages = [Magnitude(0.5), QAT(4, symmetric=False, group_size=4, epochs=1)]
    with pytest.raises(Died):
        fit(tmp_path, *stages, module=module, callbacks=[Watch(die)])
    other = Regressor()
    restore(other, tmp_path / "stages" / "2-qat")
    assert set(other.state_dict()) == set(module.state_dict())
    assert "blocks.0.up.parametrizations.weight.original" in other.state_dict()
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in module.state_dict().items())
    x = torch.randn(5, 8)
    assert torch.equal(module.eval()(x), other.eval()(x))
    assert all(c.kept() == 64 and c.grid is None for c in collect_constraints(other).values())


@pytest.mark.parametrize("at", [(2, 0, 1), (2, 1, 0), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"symmetric": False, "group_size": 4}, {"learn_scales": False}], ids=str)
def test_a_resumed_run_ends_as_an_undisturbed_one(tmp_path, options, at):
    stages = lambda: [Magnitude(0.5, epochs=1), QAT(3, epochs=3, **options)]  # noqa: E731
    make = lambda: Regressor(optimizer=torch.optim.AdamW, dropout=0.2, lr=0.005)  # noqa: E731
    a, b = undisturbed_and_resumed(tmp_path, stages, make, at)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    scales = [[c.grid.scale for c in collect_constraints(m).values()] for m in (a, b)]
    assert all(torch.equal(x, y) for x, y in zip(*scales, strict=True))


@pytest.mark.parametrize("kind", ["llama", "opt", "deit", "resnet"])
def test_what_is_saved_loads_to_the_same_weights(tmp_path, kind):
    module, data = make_model(kind), make_data(kind, tmp_path)
    stage = QAT(4, group_size=8, epochs=1, learning_rate=1e-3)
    trainer(tmp_path / "run", stage).fit(module, datamodule=data)
    loaded = load(tmp_path / "run")
    assert not broken_constraints(loaded, collect_constraints(loaded))
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_layers_may_differ_in_bits(tmp_path):
    module = fit(tmp_path, QAT({"up": 2, "0.down": 6, "*": 4}))
    bits = {name: c.grid.bits for name, c in collect_constraints(module).items()}
    assert bits == {"blocks.0.up": 2, "blocks.0.down": 6, "blocks.1.up": 2, "blocks.1.down": 4}


class Frozen(Regressor):
    """Its first block does not train."""

    def __init__(self):
        super().__init__(optimizer=torch.optim.AdamW, lr=0.005)
        self.blocks[0].requires_grad_(False)


def test_a_frozen_layer_keeps_its_weights_while_its_scales_are_learned(tmp_path):
    scales = Watch(lambda m: quantizer_of(m.blocks[0].up).scale.detach().clone())
    module = fit(tmp_path, QAT(3, epochs=2), module=Frozen(), callbacks=[scales])
    grid = collect_constraints(module)["blocks.0.up"].grid
    assert torch.equal(module.blocks[0].up.weight, round_to_grid(Frozen().blocks[0].up.weight, grid))
    assert not torch.equal(scales.seen[0], scales.seen[-1])
    assert not module.blocks[0].up.weight.requires_grad


class ChosenParameters(Regressor):
    """An optimizer over parameters chosen by name."""

    def configure_optimizers(self):
        chosen = [p for name, p in self.named_parameters() if name.endswith(("weight", "bias", "original"))]
        return torch.optim.SGD(chosen, lr=0.01)


def test_an_optimizer_that_leaves_out_the_scales_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"ChosenParameters leaves out the scales of 4 layers.*learn_scales: false"):
        fit(tmp_path / "a", QAT(4), module=ChosenParameters())
    fit(tmp_path / "b", QAT(4, learn_scales=False), module=ChosenParameters())


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (lambda: [QAT(4, epochs=0)], r"epochs=0 leaves no training.*use RTN or GPTQ"),
        (lambda: [QAT(4, epochs=-1)], r"epochs=-1 is negative"),
        (lambda: [QAT(9)], r"bits=9 is not between 2 and 8"),
        (lambda: [QAT(1)], r"bits=1 is not between 2 and 8"),
        (lambda: [QAT(4, group_size=3)], r"group_size=3 does not divide in_features=8"),
        (lambda: [RTN(4), QAT(4)], r"would leave the grid of stage 'rtn'.*disjoint"),
        (lambda: [QAT(4), RTN(4)], r"would leave the grid of stage 'qat'.*disjoint"),
        (lambda: [RTN(4, targets=["up"]), QAT(4, targets=["down"])], r"would move .*up.weight.* off the grid"),
        (lambda: [QAT(4, targets=["up"]), QAT(4, targets=["down"])], r"would move .*up.weight.* off the grid"),
        (lambda: [QAT(4), Finetune(1)], r"would move .* off the grid of stage 'qat'"),
    ],
)
def test_what_cannot_hold_is_refused_before_any_work(tmp_path, stages, message):
    with pytest.raises(RecipeError, match=message):
        fit(tmp_path / "run", *stages())
    assert not (tmp_path / "run").exists()


def test_an_earlier_grid_may_be_replaced_on_request(tmp_path):
    module = fit(tmp_path, RTN(8), QAT(4, allow_undo=True))
    assert {c.grid.bits for c in collect_constraints(module).values()} == {4}


@pytest.mark.parametrize("shape", [(4, 4, 1, 1), (4, 4, 3, 3), (5, 3, 1, 2)])
def test_a_convolution_s_weight_comes_back_in_plain_strides(shape):
    """A permuted 1x1 kernel counts as contiguous and as channels_last, and oneDNN's backward pass of it with stride 2
    wrote beyond its buffers: the process was aborted some tests later."""
    layer = nn.Conv2d(shape[1], shape[0], shape[2:])
    weight = to_weight(layer, weight_matrix(layer))
    assert torch.equal(weight, layer.weight)
    assert weight.stride() == layer.weight.stride()
    rounded = FakeQuantize(4, "channels_last", (shape[0], 1), True, False, torch.device("cpu"))(layer.weight)
    assert rounded.stride() == layer.weight.stride()
