"""``load(packed=True)``: weights stay as they are stored, outputs are those of the plain load, bit for bit."""

import copy
import pickle
import sys
import warnings

import kinds
import lightning.pytorch as pl
import pytest
import tiny
import torch
from exports import RUNS, run_of
from torch import nn

import pqqp_lightning.callbacks as c
from pqqp_lightning import Trainer, load
from pqqp_lightning.checkpoint import load as loading
from pqqp_lightning.checkpoint.memory import memory_bytes
from pqqp_lightning.checkpoint.packed_layers import PackedWeight, is_packed_model
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.models import CausalLM
from pqqp_lightning.network.constraints import collect_constraints
from pqqp_lightning.storage.run_folder import RunFolder

IDS = tiny.token_rows(2)
UNPACKED = {"dense", "sleb", "sublayer", "channels", "narrow-channels", "online", "kept-gains", "activations"}
"""Runs without a mask or a grid: there is nothing to pack."""


def load_packed(run, **options):
    """A packed model; loading it must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return load(run, packed=True, **options)


def packed_weights(model):
    return [module for module in model.modules() if isinstance(module, PackedWeight)]


def assert_computes_the_same(plain, packed, inputs):
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert torch.equal(plain(inputs), packed(inputs))
    mine, expected = packed.state_dict(), plain.state_dict()
    assert list(mine) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(tensor, mine[name]), name


@pytest.mark.parametrize("name", [name for name in RUNS if name != "grouped-convolution"])
def test_a_packed_model_computes_the_same(name):
    plain, packed = load(run_of(name)), load_packed(run_of(name))
    assert_computes_the_same(plain, packed, IDS)
    assert is_packed_model(packed) == (name not in UNPACKED)
    if name not in UNPACKED:
        assert memory_bytes(packed) < 0.8 * memory_bytes(plain)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("rtn3-asymmetric", "deit"), ("rtn3-asymmetric", "resnet"), ("grouped-convolution", "convolutions")],
)
def test_packed_convolutions_compute_the_same(name, kind):
    run, images = run_of(name, kind), torch.randn(2, 3, 32, 32)
    packed = load_packed(run)
    assert_computes_the_same(load(run), packed, images)
    kinds = {type(module).__name__ for module in packed.modules()}
    assert ("PackedLinear" if kind == "deit" else "PackedConv2d") in kinds


@pytest.mark.parametrize("kind", kinds.NETWORKS)
def test_every_kind_of_layer_computes_the_same(kind, tmp_path):
    stage = c.RTN(4, symmetric=False, targets=["network*"])
    data = tiny.regression_loader()
    tiny.trainer(tmp_path, c.Magnitude(0.5, targets=["network*"]), stage).fit(kinds.KindModule(kind), data, data)
    packed = load_packed(tmp_path)
    assert_computes_the_same(load(tmp_path), packed, torch.randn(6, 8))
    assert is_packed_model(packed) == (kind not in ("lstm", "gru", "rnn"))


def test_a_4_bit_model_takes_the_memory_of_its_checkpoint():
    run = run_of("rtn4")
    packed = load_packed(run)
    stored = tiny.tensor_bytes(RunFolder(run).model)
    assert stored <= memory_bytes(packed) < stored + 200  # rotary frequencies and metrics
    entries = sum(torch.Size(weight.entry["shape"]).numel() for weight in packed_weights(packed))
    codes = sum(weight.values.nbytes for weight in packed_weights(packed))
    assert codes == entries / 2


def test_loading_never_holds_the_dense_model(monkeypatch):
    dense = []

    def restore(module, *args, **options):
        dense.extend(name for name, parameter in module.named_parameters() if not parameter.is_meta)
        return original(module, *args, **options)

    original = loading.restore
    monkeypatch.setattr(loading, "restore", restore)
    load_packed(run_of("rtn4", tied=True))
    assert dense == []


def test_tied_weights_stay_tied():
    run = run_of("rtn4", tied=True)
    packed = load_packed(run)
    assert packed.model.lm_head.weight is packed.model.model.embed_tokens.weight
    assert_computes_the_same(load(run), packed, IDS)


class Attending(tiny.Regressor):
    """A user's module with packed projections of attention, recurrent weights and a tied Linear."""

    def __init__(self):
        super().__init__(blocks=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.memory = nn.LSTM(8, 8, batch_first=True)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("scales", torch.linspace(0.5, 1.5, 8), persistent=False)

    def forward(self, x):
        x = self.inlet(x)[:, None] * self.scales
        x = x + self.attention(x, x, x)[0] + self.memory(x)[0]
        return self.head(self.blocks(self.second(self.first(x))[:, 0]))


def test_attention_recurrent_weights_tied_layers_and_computed_buffers(tmp_path):
    module, chosen = Attending(), {"targets": ["attention*", "memory*", "blocks*"]}
    stages = [c.Magnitude(0.5, **chosen), c.RTN(4, **chosen)]
    tiny.trainer(tmp_path, *stages).fit(module, tiny.regression_loader(), tiny.regression_loader())
    plain, packed = load(tmp_path), load_packed(tmp_path)
    assert_computes_the_same(plain, packed, torch.randn(3, 8))
    assert "in_proj_weight" in packed.attention.packed_weights
    assert packed.memory.weight_ih_l0.is_floating_point()  # not packed: the LSTM keeps a list of its weights
    assert packed.first.weight is packed.second.weight


class Computing(tiny.Regressor):
    """Computes a buffer from a weight while it is built."""

    def __init__(self):
        super().__init__(blocks=1)
        self.register_buffer("norm", self.inlet.weight.detach().norm(), persistent=False)

    def forward(self, x):
        return super().forward(x) * self.norm


def test_a_module_that_computes_from_its_weights_is_built_with_them(tmp_path):
    tiny.trainer(tmp_path, c.RTN(4)).fit(Computing(), tiny.regression_loader(), tiny.regression_loader())
    with pytest.warns(UserWarning, match="took the memory of the dense model"):
        packed = load(tmp_path, packed=True)
    assert_computes_the_same(load(tmp_path), packed, torch.randn(3, 8))


def test_a_module_of_the_users_is_packed(tmp_path):
    run = run_of("rtn4")
    module = CausalLM(tiny.LLAMA)
    assert load_packed(run, module=module) is module
    assert_computes_the_same(load(run), module, IDS)


def test_copies_pickles_and_other_dtypes():
    run = run_of("pruned-rtn4")
    packed = load_packed(run)
    assert_computes_the_same(load(run), copy.deepcopy(packed), IDS)
    layer = packed.model.model.layers[0].mlp.up_proj
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again.weight, layer.weight)
    assert type(again) is type(layer)
    half = load_packed(run).to(torch.bfloat16)
    assert_computes_the_same(load(run).to(torch.bfloat16), half, IDS)
    assert half.model.model.layers[0].mlp.up_proj.packed_weights["weight"].scale.dtype == torch.float16
    moved = load_packed(run).to("meta")
    assert all(tensor.is_meta for tensor in [*moved.parameters(), *moved.model.buffers()])


def test_training_is_refused_with_words(tmp_path):
    data = tiny.make_data("llama", tmp_path)
    packed = load_packed(run_of("rtn4"))
    with pytest.raises(RecipeError, match=r"packed weights.*Load it without packed=True"):
        tiny.trainer(tmp_path / "run", c.RTN(3)).fit(packed, datamodule=data)
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match="packed weights"):
        pl.Trainer(
            max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
        ).fit(packed, datamodule=data)
    with pytest.raises(RecipeError, match="packed weights"):
        packed(IDS).sum().backward()
    with pytest.raises(RecipeError, match="packed weights"):
        packed.train()(IDS)


def test_a_packed_model_can_be_measured(tmp_path):
    data = tiny.make_data("llama", tmp_path)
    run = run_of("rtn4")
    results = [
        Trainer(default_root_dir=str(tmp_path), enable_progress_bar=False, logger=False, accelerator="cpu").validate(
            model, datamodule=data, verbose=False
        )
        for model in (load(run), load_packed(run))
    ]
    assert results[0] == results[1]


def test_packed_weights_cannot_be_overwritten():
    packed = load_packed(run_of("rtn4"))
    with pytest.raises(RuntimeError, match=r"is packed and cannot be overwritten. Load it without packed=True"):
        packed.load_state_dict(load(run_of("rtn4")).state_dict())
    with pytest.raises(RecipeError, match="packed"):
        packed.model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(64, 32))
    with pytest.raises(RecipeError, match="packed weights"):
        load(run_of("rtn4"), module=packed)


def test_a_packed_model_has_no_constraints():
    assert collect_constraints(load(run_of("rtn4"))) != {}
    assert collect_constraints(load_packed(run_of("rtn4"))) == {}


def test_load_says_the_memory_to_a_person_only(monkeypatch, capsys):
    load(run_of("rtn4"))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    load(run_of("rtn4"))
    load(run_of("rtn4"), packed=True)
    plain, packed = capsys.readouterr().out.splitlines()
    assert "MB in memory. load(..., packed=True) takes about" in plain
    assert packed.endswith("MB in memory.")
