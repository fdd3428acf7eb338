"""What holds for every kind of layer: its matrix, its constraints, packing, training, and who can act on it."""

import copy
import json
import pickle

import pytest
import tiny
import torch
from kinds import NETWORKS, Experts, KindModule, Sequence
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pqqp_lightning import load
from pqqp_lightning.calibration.chain import first_output
from pqqp_lightning.callbacks import (
    ALPS,
    GPTQ,
    NF4,
    QAT,
    RTN,
    ActivationQuantization,
    Finetune,
    GradualPruning,
    LoRA,
    Magnitude,
    SparseGPT,
    Wanda,
)
from pqqp_lightning.checkpoint.size import measure_size
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.experiments import AnalysisOptions, analyze_pair
from pqqp_lightning.network.constraints import broken_constraints, collect_constraints, constraints_of
from pqqp_lightning.network.layers import (
    columns_of,
    groups_of,
    has_readable_inputs,
    input_rows,
    matrix_shape,
    named_layers,
    set_weight_matrix,
    weight_matrix,
)
from pqqp_lightning.network.parameter_layers import ParameterLayer
from pqqp_lightning.network.structure import Skeleton

KINDS = list(NETWORKS)


def own_layers(module):
    """The layers of the kind itself."""
    return {name: layer for name, layer in named_layers(module) if name.startswith("network")}


def fit(folder, kind, *stages, **options):
    module = KindModule(kind)
    trainer = tiny.trainer(folder, *stages, **options)
    trainer.fit(module, tiny.regression_loader(24), tiny.regression_loader(16, seed=1))
    return module


class LoaderData(LightningDataModule):
    """Gives the same loader for training, calibration and evaluation."""

    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self):
        return self.loader

    val_dataloader = train_dataloader


def products(layer, inputs):
    """The matrix of ``layer`` times its input rows, group by group: [groups, T, O / groups]."""
    rows, groups = input_rows(layer, inputs), groups_of(layer)
    return torch.einsum("gti,goi->gto", rows, weight_matrix(layer).view(groups, -1, columns_of(layer)))


CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(("cls", "dimensions"), list(zip(CONVOLUTIONS, (1, 2, 3), strict=True)))
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "groups": 2, "padding": 2},
        {"kernel_size": 2, "stride": 2, "padding": 1, "dilation": 2},
        {"kernel_size": 3, "padding": "same", "groups": 4},
        {"kernel_size": 1},
    ],
)
def test_a_convolution_is_its_matrix_times_its_patches(cls, dimensions, mode, options):
    torch.manual_seed(0)
    layer = cls(4, 8, bias=False, padding_mode=mode, **options)
    inputs = torch.randn(2, 4, *range(6, 6 + dimensions))
    output = layer(inputs)  # [B, O, *L]
    expected = output.transpose(0, 1).flatten(1).view(groups_of(layer), -1, output.numel() // 8).transpose(1, 2)
    assert torch.allclose(products(layer, inputs), expected, atol=1e-5)
    assert torch.equal(input_rows(layer, inputs[0]), input_rows(layer, inputs[:1]))  # without a batch


def test_conv1d_of_gpt2_is_its_matrix_times_its_input():
    layer = Conv1D(6, 4)
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 5, 4)
    assert matrix_shape(layer) == (6, 4)
    assert torch.allclose(products(layer, x).view(2, 5, 6), layer(x), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"kdim": 4, "vdim": 12}])
def test_the_projections_of_attention_are_matrices_in_the_order_query_key_value(options):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True, **options)
    query, key, value = torch.randn(2, 3, 8), torch.randn(2, 5, attention.kdim), torch.randn(2, 5, attention.vdim)
    matrices = [weight_matrix(layer) for name, layer in named_layers(attention) if name != "out_proj"]
    if not options:
        assert groups_of(dict(named_layers(attention))["in_proj_weight"]) == 3
        matrices = list(matrices[0].chunk(3))
    projected = [x @ w.T for x, w in zip((query, key, value), matrices, strict=True)]
    heads = [x.unflatten(-1, (2, 4)).transpose(1, 2) for x in projected]
    own = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2) @ attention.out_proj.weight.T
    assert torch.allclose(own, attention(query, key, value)[0], atol=1e-6)


def test_the_recurrent_weights_are_matrices_of_input_and_state():
    torch.manual_seed(0)
    lstm = nn.LSTM(5, 4, bias=False, batch_first=True, bidirectional=True, proj_size=2)
    layers = dict(named_layers(lstm))
    assert set(layers) == {f"weight_{part}_l0{way}" for part in ("ih", "hh", "hr") for way in ("", "_reverse")}
    x, state, cell = torch.randn(1, 1, 5), torch.randn(1, 2), torch.randn(1, 4)
    gates = x[0] @ weight_matrix(layers["weight_ih_l0"]).T + state @ weight_matrix(layers["weight_hh_l0"]).T
    i, f, g, o = gates.chunk(4, dim=1)
    hidden = o.sigmoid() * (f.sigmoid() * cell + i.sigmoid() * g.tanh()).tanh()
    own = hidden @ weight_matrix(layers["weight_hr_l0"]).T
    both = torch.stack([state, state]), torch.stack([cell, cell])
    assert torch.allclose(own, lstm(x, both)[0][0, :, :2], atol=1e-6)
    assert set(dict(named_layers(nn.GRUCell(3, 2)))) == {"weight_ih", "weight_hh"}


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_is_a_row_group_of_the_matrix(transposed):
    torch.manual_seed(0)
    experts = Experts(transposed)
    layers = dict(named_layers(experts))
    up, down = (weight_matrix(layers[name]).chunk(3) for name in ("gate_up_proj", "down_proj"))
    assert [matrix_shape(layer) for layer in layers.values()] == [(48, 8), (24, 16)]
    x = torch.randn(6, 8)
    own = torch.stack([torch.relu(x[t] @ up[t % 3].T) @ down[t % 3].T for t in range(6)])
    assert torch.allclose(own, experts(x), atol=1e-6)


def experts_of(**sizes):
    """A module with two 3-D parameters and these attributes."""
    module = nn.Module()
    for name, size in sizes.items():
        setattr(module, name, nn.Parameter(torch.zeros(size)) if isinstance(size, tuple) else size)
    return module


@pytest.mark.parametrize(
    ("module", "transposed"),
    [
        (experts_of(num_experts=2, hidden_size=4, gate_up_proj=(2, 6, 4), down_proj=(2, 4, 3)), False),
        (experts_of(num_experts=2, hidden_size=4, gate_up_proj=(2, 4, 6), down_proj=(2, 3, 4)), True),
        (experts_of(num_experts=2, hidden_size=4, up_proj=(2, 4, 6), down_proj=(2, 4, 4)), True),  # one is square
        (experts_of(num_experts=2, input_size=4, output_size=6, weight=(2, 6, 4)), False),
        (experts_of(num_experts=2, hidden_size=4, up_proj=(2, 4, 4)), None),  # cannot be known
        (experts_of(num_experts=2, pos_embed=(2, 6, 4)), None),
        (experts_of(pos_embed=(1, 6, 4), hidden_size=4), None),  # positions, not experts
        (experts_of(num_experts=2, hidden_size=4, up_proj=(1, 6, 4)), None),
    ],
)
def test_the_orientation_of_experts_follows_from_what_the_module_says_or_they_are_left(module, transposed):
    found = {layer.transposed for _, layer in named_layers(module)}
    assert found == (set() if transposed is None else {transposed})


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_goes_back_into_its_weight_and_the_layer_stays_the_same_object(kind):
    module = KindModule(kind)
    names = list(module.state_dict())
    layers = own_layers(module)
    for layer in layers.values():
        before = layer.weight.detach().clone()
        matrix = weight_matrix(layer).clone()
        assert tuple(matrix.shape) == matrix_shape(layer)
        set_weight_matrix(layer, torch.zeros_like(matrix))
        assert not layer.weight.any()
        set_weight_matrix(layer, matrix)
        assert torch.equal(layer.weight, before)
        assert layer.weight.stride() == before.stride()
    assert all(again is layers[name] for name, again in own_layers(module).items())
    assert list(module.state_dict()) == names


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_have_layers_of_their_own_with_the_constraints(kind):
    module = KindModule(kind)
    for layer in own_layers(module).values():
        Magnitude(0.5)._compress_groups({"": layer}, [None], [None])
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert set(collect_constraints(twin)) == set(own_layers(module))
        for name, layer in own_layers(twin).items():
            assert layer is not own_layers(module)[name]
            assert layer.weight is not own_layers(module)[name].weight
            assert constraints_of(layer).kept() == constraints_of(own_layers(module)[name]).kept()
        set_weight_matrix(layer, torch.ones(matrix_shape(layer)))
        assert not broken_constraints(module, collect_constraints(module))
        assert broken_constraints(twin, collect_constraints(twin))


def test_an_lstm_whose_modules_are_restored_computes_with_its_new_weights():
    module = KindModule("lstm")
    state = copy.deepcopy(module.state_dict())
    x = torch.randn(3, 8)
    expected = module(x)
    Skeleton(module).restore(module)
    module.load_state_dict(state)
    assert torch.equal(module(x), expected)


ORDERS = [
    (lambda: Magnitude(0.5), lambda: RTN(4)),
    (lambda: RTN(4, group_size=4), lambda: Magnitude(pattern="2:4")),
    (lambda: Magnitude(pattern="2:4", epochs=1), lambda: NF4(group_size=4)),
    (lambda: SparseGPT(0.5), lambda: GPTQ(4)),
    (lambda: GPTQ(4, symmetric=False), lambda: SparseGPT(pattern="2:4")),
    (lambda: Wanda(0.5), lambda: GPTQ(3, group_size=4)),
    (lambda: ALPS(0.5), lambda: GPTQ(4)),
    (lambda: GPTQ(4), lambda: ALPS(pattern="2:4")),
]


@pytest.mark.parametrize("make", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_orders_keep_both_promises_and_the_checkpoint_is_as_large_as_counted(tmp_path, kind, make):
    stages = [one() for one in make]
    stages[1].name = "second"
    if stages[0].needs_calibration and not all(map(has_readable_inputs, own_layers(KindModule(kind)).values())):
        pytest.skip("calibration does not read the inputs of this kind")
    module = fit(tmp_path / "run", kind, *stages)
    constraints = collect_constraints(module)
    assert not broken_constraints(module, constraints)
    for name, layer in own_layers(module).items():
        assert constraints[name].grid is not None
        zeros = (weight_matrix(layer) == 0).float().mean()
        assert zeros >= 0.49, name
    folder = tmp_path / "run" / "model"
    assert tiny.tensor_bytes(folder) == measure_size(module, []).size_bytes
    again = load(tmp_path / "run")
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert {n: c.kept() for n, c in collect_constraints(again).items()} == {n: c.kept() for n, c in constraints.items()}
    x = torch.randn(4, 8)
    assert torch.equal(again(x), module.eval()(x))


@pytest.mark.parametrize("kind", KINDS)
def test_training_keeps_zeros_and_moves_the_rest(tmp_path, kind):
    module = fit(tmp_path, kind, Magnitude(0.5), Finetune(epochs=1), gradient_clip_val=0.5)
    dense = dict(KindModule(kind).named_parameters())
    for layer in own_layers(module).values():
        mask = constraints_of(layer).mask()
        matrix = weight_matrix(layer)
        assert not matrix[~mask].any()
        assert matrix.ne(0).sum() == mask.sum()
    assert any(not torch.equal(p, dense[n]) for n, p in module.named_parameters() if "bias" in n or n.endswith("proj"))


@pytest.mark.parametrize("kind", ["attention", "experts", "transposed experts", "conv1d", "transposed"])
def test_fake_quantization_trains_every_kind_and_restores_the_order_of_the_parameters(tmp_path, kind):
    module = fit(tmp_path, kind, Magnitude(0.5), QAT(4, epochs=1, learning_rate=0.01))
    assert list(module.state_dict()) == list(KindModule(kind).state_dict())
    constraints = collect_constraints(module)
    assert all(constraints[name].grid is not None for name in own_layers(module))
    assert not broken_constraints(module, constraints)
    x = torch.randn(4, 8)
    assert torch.equal(load(tmp_path)(x), module.eval()(x))


@pytest.mark.parametrize("kind", ["attention", "lstm", "experts", "conv3d"])
def test_gradual_pruning_reaches_its_sparsity_on_every_kind(tmp_path, kind):
    module = fit(tmp_path, kind, GradualPruning(0.5, epochs=1))
    for layer in own_layers(module).values():
        assert (weight_matrix(layer) == 0).float().mean() >= 0.5


@pytest.mark.parametrize(
    ("kind", "stage"),
    [("lstm", GPTQ), ("gru", QAT), ("lstm", ActivationQuantization), ("experts", LoRA), ("conv1d", LoRA)],
)
def test_a_stage_leaves_what_it_cannot_do_and_says_so(tmp_path, kind, stage):
    module = fit(tmp_path, kind, stage())
    notes = " ".join(json.loads((tmp_path / "report.json").read_text())["stages"][-1]["notes"])
    left = next(iter(own_layers(module)))
    assert "left as they are" in notes
    assert left in notes
    assert left not in collect_constraints(module)


@pytest.mark.parametrize(
    ("kind", "stage"),
    [("lstm", GPTQ), ("gru", QAT), ("lstm", Wanda), ("lstm", ActivationQuantization), ("experts", LoRA)],
)
def test_targets_of_a_kind_that_the_stage_cannot_do_are_refused_with_the_way_out(tmp_path, kind, stage):
    made = stage(0.5, targets=["network"]) if stage is Wanda else stage(targets=["network"])
    with pytest.raises(RecipeError) as caught:
        fit(tmp_path / "run", kind, made)
    assert tiny.blamed(caught.value)[0] == ("targets", "network")
    assert "another stage" in caught.value.problems[0].way_out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["attention", "lstm", "experts", "transposed"])
def test_analysis_compares_the_outputs_of_the_module_that_holds_a_parameter(tmp_path, kind):
    stages = [Magnitude(0.5), RTN(3)]
    data = tiny.regression_loader(24)
    module, options = KindModule(kind), AnalysisOptions(samples=8)
    analyze_pair(tiny.trainer(tmp_path, *stages), module, LoaderData(data), options)
    report = json.loads((tmp_path / "analysis.json").read_text())
    assert not any(report["gone"].values())
    found = {layer["name"]: layer["errors"] for layer in report["layers"]}
    assert set(own_layers(module)) <= set(found)
    pruned = fit(tmp_path / "alone", kind, Magnitude(0.5))
    dense = KindModule(kind).eval()
    for name, layer in own_layers(dense).items():
        held = isinstance(layer, ParameterLayer) or name.endswith("out_proj")
        path = name.rpartition(".")[0] if held else name
        inputs = {}
        handle = dense.get_submodule(path).register_forward_pre_hook(lambda _, args, i=inputs: i.update(args=args))
        with torch.no_grad():
            dense(next(iter(data))[0])
        handle.remove()
        with torch.no_grad():
            both = [first_output(m.eval().get_submodule(path)(*inputs["args"])) for m in (dense, pruned)]
        expected = float((both[1] - both[0]).square().sum() / both[0].square().sum())
        assert found[name]["magnitude"] == pytest.approx(expected, rel=1e-4)


def test_blocks_of_attention_are_swapped_whole(tmp_path):
    """Interference between blocks needs each block's layers in the dense model, parameters among them."""

    class Encoder(KindModule):
        def __init__(self):
            super().__init__("transposed")
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.network = Sequence(nn.TransformerEncoder(layer, 2))

    analyze_pair(tiny.trainer(tmp_path, Magnitude(0.5), RTN(3)), Encoder(), LoaderData(tiny.regression_loader(24)))
    report = json.loads((tmp_path / "analysis.json").read_text())
    assert report["additivity"] is not None
    assert sum(layer["name"].endswith("in_proj_weight") for layer in report["layers"]) == 2
