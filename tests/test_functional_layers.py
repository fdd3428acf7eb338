"""Layers whose module is not called: weights used functionally, and layers that no forward pass or no token reaches."""

import copy
import json

import pytest
import tiny
import torch
from forked import run_forked, start
from lightning.pytorch import LightningModule
from tiny import regression_loader, trainer
from torch import nn
from torch.nn import functional as F

from pqqp_lightning import load
from pqqp_lightning.calibration.collect import Collector
from pqqp_lightning.calibration.functional import FunctionalReader
from pqqp_lightning.calibration.layer_errors import layer_errors
from pqqp_lightning.calibration.layer_probe import observe_uses
from pqqp_lightning.calibration.statistics import Hessian, SquaredNorm
from pqqp_lightning.calibration.walk import Walk, calibrating
from pqqp_lightning.callbacks import (
    GPTQ,
    QAT,
    SLEB,
    ActivationQuantization,
    BasisSharing,
    ChannelPruning,
    LoRA,
    Magnitude,
    MixedPrecision,
    QLoRA,
    SparseGPT,
    Wanda,
)
from pqqp_lightning.data import TokenData
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.models import CausalLM, ImageClassifier
from pqqp_lightning.network.blocks import find_blocks, find_layers
from pqqp_lightning.network.layers import named_layers, weight_matrix
from pqqp_lightning.stages.sensitivity import mean_squared_gradients
from pqqp_lightning.storage.records import read_records


def statistics_of(model, batches, run=None, kind=Hessian, layers=None):
    """The statistic of every layer, collected over ``batches``."""
    layers = layers or dict(named_layers(model))
    collector = Collector(layers, kind)
    with calibrating(model), collector.watching():
        for batch in batches:
            with collector.forward_pass():
                (run or model)(batch)
    found = {}
    for reading in collector.readings:
        found.update(dict.fromkeys(reading.layers, reading.statistic))
    return found


class Functional(nn.Module):
    """Uses its weights in each way that a forward can, beside a layer that it calls."""

    def __init__(self, called):
        super().__init__()
        torch.manual_seed(0)
        self.called = called
        self.linear, self.matmul, self.times = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.addmm, self.left, self.plain = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        if self.called:
            for layer in (self.linear, self.matmul, self.times, self.addmm, self.left):
                x = torch.tanh(layer(x))
            return self.plain(x)
        x = torch.tanh(F.linear(x, weight=self.linear.weight, bias=self.linear.bias))
        x = torch.tanh(torch.matmul(x, self.matmul.weight.T) + self.matmul.bias)
        x = torch.tanh(x @ self.times.weight.t() + self.times.bias)
        x = torch.tanh(torch.addmm(self.addmm.bias, x, self.addmm.weight.t()))
        x = torch.tanh((self.left.weight @ x.T).T + self.left.bias)
        return self.plain(x)


@pytest.mark.parametrize("kind", [Hessian, SquaredNorm])
def test_statistics_of_functionally_used_weights_equal_those_of_called_layers(kind):
    batches = [torch.randn(n, 8) for n in (3, 5)]
    called = statistics_of(Functional(called=True), batches, kind=kind)
    found = statistics_of(Functional(called=False), batches, kind=kind)
    assert found.keys() == called.keys()
    for name, statistic in found.items():
        assert int(statistic.rows) == int(called[name].rows) == 8
        torch.testing.assert_close(statistic.value(), called[name].value(), rtol=1e-5, atol=1e-6)


class Attention(nn.Module):
    """What nn.MultiheadAttention computes, with Linear layers that are called."""

    def __init__(self, attention):
        super().__init__()
        self.heads, self.first = attention.num_heads, attention.batch_first
        width = attention.embed_dim
        for i, name in enumerate("qkv"):
            layer = nn.Linear(width, width)
            layer.weight.data = attention.in_proj_weight.data[i * width : (i + 1) * width]
            layer.bias.data = attention.in_proj_bias.data[i * width : (i + 1) * width]
            setattr(self, name, layer)
        self.out_proj = nn.Linear(width, width)
        self.out_proj.load_state_dict(attention.out_proj.state_dict())

    def forward(self, query, key, value, **ignored):
        if not self.first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        heads = [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.q(query), self.k(key), self.v(value))]
        x = self.out_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return (x if self.first else x.transpose(0, 1)), None


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_statistics_inside_torchs_attention_equal_those_of_called_layers(first, cross, need_weights):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=first)
    reference = Attention(attention)
    batches = []
    for tokens in (4, 6):
        x = torch.randn(3, tokens, 8)
        batches.append((x, torch.randn(3, tokens, 8)) if cross else (x, x))

    def run(model):
        return lambda batch: model(batch[0], batch[1], batch[1], need_weights=need_weights)

    expected = statistics_of(reference, batches, run(reference))
    found = statistics_of(attention, batches, run(attention))
    torch.testing.assert_close(found["out_proj"].value(), expected["out_proj"].value(), rtol=1e-5, atol=1e-6)
    projections = [expected[name].value()[0] for name in "qkv"]
    wanted = torch.stack(projections) if cross else projections[0][None]
    torch.testing.assert_close(found["in_proj_weight"].value(), wanted, rtol=1e-5, atol=1e-6)
    assert found["out_proj"].rows == found["in_proj_weight"].rows == 30


class Attending(LightningModule):
    def __init__(self, attention, cross):
        super().__init__()
        self.attention, self.cross = attention, cross
        torch.manual_seed(1)
        self.before, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, batch):
        x = self.before(batch)
        context = self.other(batch) if self.cross else x
        return self.attention(x, context, context)[0].tanh().square().mean()

    def training_step(self, batch, batch_idx):
        return self(batch)


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_gradients_inside_torchs_attention_equal_those_of_called_layers(cross, wide):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    if wide:  # as torch holds the projections of keys and values that are wider than the queries
        attention._qkv_same_embed_dim = False
        for name, weight in zip("qkv", attention.in_proj_weight.detach().chunk(3), strict=True):
            attention.register_parameter(f"{name}_proj_weight", nn.Parameter(weight.clone()))
    reference = Attention(attention)
    batches = [torch.randn(3, 5, 8), torch.randn(2, 4, 8)]
    found = {}
    for key, inner in (("called", reference), ("functional", attention)):
        model = Attending(inner, cross)
        walk = Walk(model, {"": model}, batches, batches[0][:1], model, progress=False)
        walk.loss = lambda batch, model=model: model.training_step(batch, 0)
        layers = {n: layer for n, layer in named_layers(model) if not (wide and n.endswith("in_proj_weight"))}
        found[key] = mean_squared_gradients(walk, layers)
    called, functional = found["called"], found["functional"]
    three = [called[f"attention.{name}"] for name in "qkv"]
    ours = (
        [functional[f"attention.{n}_proj_weight"] for n in "qkv"] if wide else [functional["attention.in_proj_weight"]]
    )
    torch.testing.assert_close(torch.cat(ours), torch.cat(three), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(functional["attention.out_proj"], called["attention.out_proj"], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(functional["before"], called["before"], rtol=1e-4, atol=1e-9)


def test_reading_does_not_change_what_attention_computes():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(3, 5, 8)
    rows = []
    reader = FunctionalReader({"out_proj": attention.out_proj}, lambda name, inputs, part, parts: rows.append(inputs))
    plain, shares = attention(x, x, x)
    with reader:
        read, read_shares = attention(x, x, x)
    assert torch.equal(plain, read)
    assert torch.equal(shares, read_shares)
    projected = F.linear(rows[0], attention.out_proj.weight, attention.out_proj.bias)
    assert torch.equal(projected.transpose(0, 1), plain)  # the rows are the projection's inputs, exactly


@pytest.mark.parametrize("norm_first", [True, False])
def test_statistics_inside_torchs_encoder_equal_those_of_called_layers(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    reference = copy.deepcopy(encoder)
    for inner in reference.layers:
        inner.self_attn = Attention(inner.self_attn)
        inner.activation_relu_or_gelu = 0
    batches = [torch.randn(2, 5, 8), torch.randn(3, 4, 8)]

    def slowly(x):  # without the encoder's own preparation, which reads the attention's packed weights
        for inner in reference.layers:
            inner.self_attn._qkv_same_embed_dim, inner.self_attn.batch_first = True, True
            x = inner.norm1(x + inner.self_attn(x, x, x)[0]) if not norm_first else x
            if norm_first:
                y = inner.norm1(x)
                x = x + inner.self_attn(y, y, y)[0]
                x = x + inner.linear2(F.relu(inner.linear1(inner.norm2(x))))
            else:
                x = inner.norm2(x + inner.linear2(F.relu(inner.linear1(x))))
        return x

    expected = statistics_of(reference, batches, slowly)
    enabled = torch.backends.mha.get_fastpath_enabled()
    found = statistics_of(encoder, batches)
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    assert len(found) == 8
    for name, statistic in found.items():
        name = name.replace("in_proj_weight", "q")
        torch.testing.assert_close(statistic.value(), expected[name].value(), rtol=1e-4, atol=1e-5)


class Experts(nn.Module):
    """Fused experts, used one by one or by a batched product, and the same as a list of Linear layers."""

    def __init__(self, how, dead=False):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.dead = how, dead
        self.num_experts, self.is_transposed = 3, False
        self.fused = nn.Parameter(torch.randn(3, 6, 8))
        self.separate = nn.ModuleList([nn.Linear(8, 6, bias=False) for _ in range(3)])
        for layer, weight in zip(self.separate, self.fused, strict=True):
            layer.weight.data = weight.data.clone()

    def forward(self, x):
        choice = x[:, 0].gt(0).long() + x[:, 1].gt(0).long()
        choice = choice.clamp(max=1) if self.dead else choice
        result = x.new_zeros(len(x), 6)
        if self.how == "bmm":
            rows = torch.stack([x * choice.eq(e)[:, None] for e in range(3)])
            return torch.bmm(rows, self.fused.transpose(1, 2)).sum(0)
        for e in range(3):
            mine = choice == e
            if not mine.any():
                continue
            if self.how == "linear":
                result[mine] = F.linear(x[mine], self.fused[e])
            elif self.how == "chunks":
                up, down = self.fused[e].chunk(2)
                result[mine] = torch.cat([F.linear(x[mine], up), F.linear(x[mine], down)], dim=1)
            elif self.how == "called":
                result[mine] = self.separate[e](x[mine])
        return result


@pytest.mark.parametrize("how", ["linear", "bmm", "chunks"])
def test_statistics_of_fused_experts_equal_those_of_separate_ones(how):
    batches = [torch.randn(n, 8) for n in (20, 30)]
    separate = Experts("called")
    expected = statistics_of(separate, batches)
    model = Experts(how)
    found = statistics_of(model, batches)["fused"]
    for expert in range(3):
        mine = expected[f"separate.{expert}"]
        parts = [2 * expert, 2 * expert + 1] if how == "chunks" else [expert]
        for part in parts:
            assert int(found.counts[part]) == int(mine.rows)
            torch.testing.assert_close(found.value()[part], mine.value()[0], rtol=1e-5, atol=1e-5)


MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}


def mixture(name):
    torch.manual_seed(0)
    return CausalLM(tiny.LLAMA | MIXTURES[name] | {"model_type": name})


@pytest.mark.parametrize("name", list(MIXTURES))
def test_each_expert_of_a_language_model_has_the_statistics_of_its_tokens(name):
    module = mixture(name)
    batches = [{"input_ids": tiny.token_rows(3, seed)} for seed in range(2)]
    expected = {}

    def route(layer_name):
        def hook(experts, args, kwargs):
            hidden, chosen = [*args, *kwargs.values()][:2]
            hidden = hidden.reshape(-1, hidden.shape[-1])
            for expert in range(4):
                rows = hidden[(chosen == expert).any(dim=1)]
                key = f"{layer_name}.gate_up_proj", expert
                expected[key] = expected.get(key, 0) + rows.T @ rows

        return hook

    for layer_name, experts in module.named_modules():
        if layer_name.endswith("experts"):
            experts.register_forward_pre_hook(route(layer_name), with_kwargs=True)
    kinds = {m.config._experts_implementation for m in module.modules() if hasattr(m, "config")}
    found = statistics_of(module, batches, lambda batch: module.calibration_step(batch, 0))
    assert {m.config._experts_implementation for m in module.modules() if hasattr(m, "config")} == kinds
    assert len(expected) == 8
    for (layer, expert), gram in expected.items():
        torch.testing.assert_close(found[layer].value()[expert], gram, rtol=1e-4, atol=1e-4)
        down = found[layer.replace("gate_up", "down")]
        assert torch.equal(down.counts, found[layer].counts)
        assert int(found[layer].counts.sum()) == 2 * 3 * tiny.TOKENS * 2


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize(
    "stage", [SparseGPT(0.5), GPTQ(4), Wanda(0.5), MixedPrecision()], ids=lambda stage: type(stage).__name__
)
def test_calibrated_stages_compress_fused_experts(tmp_path, name, stage):
    module, data = mixture(name), TokenData(**tiny.write_tokens(tmp_path))
    experts = {n: p for n, p in module.named_parameters() if "experts" in n and p.dim() == 3}
    before = {n: p.detach().clone() for n, p in experts.items()}
    trainer(tmp_path / "run", stage).fit(module, datamodule=data)
    assert len(experts) == 4
    for n, weight in experts.items():
        assert not torch.equal(before[n], weight)
        if "mask" in stage.promises:
            assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    tokens = {"input_ids": tiny.token_rows(2)}
    loaded = load(tmp_path / "run")
    assert torch.equal(loaded.calibration_step(tokens, 0), module.eval().calibration_step(tokens, 0))


VISION = {"patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}


def vision(name="eva02_tiny_patch14_224"):
    torch.manual_seed(0)
    network = ImageClassifier(name, pretrained=False, num_classes=10, image_size=32, model_args=VISION)
    nn.init.normal_(network.model.head.weight)
    return network


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_statistics_of_qkv_equal_a_hook_on_what_it_reads(name):
    network = vision(name)
    images = torch.randn(4, 3, 32, 32)
    inputs = {}
    for block_name, block in find_blocks(network).items():
        hook = lambda _, args, name=block_name: inputs.update({f"{name}.attn.qkv": args[0]})  # noqa: E731
        block.attn.register_forward_pre_hook(hook)
    found = statistics_of(network, [images])
    assert len(inputs) == 2
    for qkv, rows in inputs.items():
        rows = rows.flatten(0, 1)
        torch.testing.assert_close(found[qkv].value()[0], rows.T @ rows, rtol=1e-5, atol=1e-4)


class Net(LightningModule):
    """A user's module around ``body``."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("mse", F.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


class EncoderBody(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inlet, self.head = nn.Linear(8, 16), nn.Linear(16, 2)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x):
        return self.head(self.encoder(self.inlet(x)[:, None].expand(-1, 5, -1)).mean(1))


def fit(folder, module, *stages):
    trainer(folder, *stages).fit(module, regression_loader(64), regression_loader(16, seed=1))
    return read_records(folder)[-1]


@pytest.mark.parametrize("stage", [Wanda(0.5), SparseGPT(0.5), GPTQ(4), MixedPrecision(), QAT(4, epochs=1)])
def test_calibrated_stages_compress_the_output_projection_of_torchs_attention(tmp_path, stage):
    module = Net(EncoderBody())
    before = module.body.encoder.layers[0].self_attn.out_proj.weight.detach().clone()
    record = fit(tmp_path, module, stage)
    after = module.body.encoder.layers[0].self_attn.out_proj.weight
    assert not torch.equal(before, after)
    assert not any("no calibration token" in note for note in record["notes"])


@pytest.mark.parametrize(
    "stage",
    [
        ActivationQuantization(2, targets=["out_proj"]),
        LoRA(targets=["out_proj"]),
        QLoRA(targets=["out_proj"]),
        BasisSharing(targets=["out_proj"]),
    ],
    ids=lambda stage: type(stage).__name__,
)
def test_a_stage_on_a_forward_that_is_never_called_is_refused(tmp_path, stage):
    with pytest.raises(RecipeError, match=r"targets='out_proj' selects only .*a forward that is called"):
        fit(tmp_path, Net(EncoderBody()), stage)
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("stage", [ActivationQuantization(2, targets=["qkv"]), LoRA(targets=["qkv"])])
def test_the_probe_finds_a_forward_that_is_never_called(tmp_path, stage):
    data = tiny.make_data("deit", tmp_path)
    with pytest.raises(RecipeError, match=r"targets='qkv' selects only Linear layers .*needs a forward that is called"):
        trainer(tmp_path / "run", stage).fit(vision(), datamodule=data)


@pytest.mark.parametrize("merge", [True, False])
def test_adapters_in_torchs_encoder_layer_count_in_evaluation(tmp_path, merge):
    """Its fused kernel would read the weights below the adapters."""
    module = Net(EncoderBody()).eval()  # as loaded: the kernel is for evaluation mode
    record = fit(tmp_path, module, LoRA(epochs=2, learning_rate=0.05, merge=merge, rank=2))
    assert any("self_attn.out_proj" in note and "needs a forward" in note for note in record["notes"])
    x = torch.randn(4, 8)
    with_gradients = module.eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(module(x), with_gradients, rtol=1e-4, atol=1e-5)
        assert torch.allclose(load(tmp_path, module=Net(EncoderBody()))(x), module(x), atol=1e-6)


def test_activation_quantization_says_which_layers_it_leaves_out(tmp_path):
    module = Net(EncoderBody())
    x = torch.randn(4, 8)
    before = module.eval()(x)
    record = fit(tmp_path, module, ActivationQuantization(2))
    assert any("2 layers (body.encoder.layers.0.self_attn.out_proj" in note for note in record["notes"])
    assert not torch.allclose(module.eval()(x), before)


def test_bases_are_shared_in_torchs_encoder_layer(tmp_path):
    module = Net(EncoderBody())
    fit(tmp_path, module, BasisSharing(0.2))
    x = torch.randn(4, 8)
    with torch.no_grad():
        fused = module.eval()(x)
    torch.testing.assert_close(fused, module(x), rtol=1e-4, atol=1e-5)


class Mixture(nn.Module):
    """Experts in a ModuleList; no token takes the last one."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3)])
        with torch.no_grad():
            self.gate.bias[2] = -100.0

    def forward(self, x):
        weight, choice = self.gate(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = choice == number
            if mine.any():
                y[mine] = weight[mine, None] * expert(x[mine])
        return x + y


class MixtureNet(Net):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Sequential(Mixture(), Mixture(), nn.Linear(8, 2)))


UNREACHED = "body.0.experts.2.0, body.0.experts.2.2, body.1.experts.2.0"


@pytest.mark.parametrize(
    ("stage", "note"),
    [
        (Wanda(0.5), "pruned by magnitude"),
        (Wanda(pattern="2:4"), "pruned by magnitude"),
        (SparseGPT(0.5), "pruned by magnitude"),
        (SparseGPT(0.5, allocation="sensitivity"), "assumed to be as sensitive as the other layers"),
        (GPTQ(4, group_size=4), "rounded to nearest"),
        (MixedPrecision(), "assumed to be as sensitive as the other layers"),
        (BasisSharing(0.2), "factorised as if all inputs were alike"),
        (SLEB(amount=1), None),
    ],
)
def test_experts_that_no_token_takes_do_not_end_the_run(tmp_path, stage, note):
    module = MixtureNet()
    record = fit(tmp_path, module, stage)
    if note is not None:
        assert any(UNREACHED in line and note in line for line in record["notes"])
    x = torch.randn(5, 8)
    assert torch.equal(load(tmp_path, module=MixtureNet())(x), module.eval()(x))


def test_an_expert_without_tokens_is_pruned_and_rounded_as_without_data(tmp_path):
    module = MixtureNet()
    dense = module.body[0].experts[2][0].weight.detach().clone()
    fit(tmp_path, module, Wanda(0.5), GPTQ(4))
    weight = module.body[0].experts[2][0].weight.detach()
    kept = weight != 0
    smallest_kept = torch.where(kept, dense.abs(), torch.inf).amin(dim=1)
    largest_gone = torch.where(kept, 0.0, dense.abs()).amax(dim=1)
    scale = dense.abs().amax(dim=1) / 7
    assert bool((largest_gone <= smallest_kept + scale).all())
    assert bool(((weight - dense).abs()[kept] <= scale[:, None].expand_as(dense)[kept] * 0.51).all())


@pytest.mark.parametrize("importance", ["activation", "taylor"])
def test_channels_that_no_token_reaches_are_ranked_by_norm(tmp_path, importance):
    class Branches(tiny.Regressor):
        def forward(self, x):
            x = self.inlet(x)
            # the second block runs on rows with a large sum only, which no calibration sample has
            rare = self.blocks[1](x[:0]).sum(0)
            return self.head(self.blocks[0](x) + rare)

    stage = ChannelPruning(0.25, importance=importance, targets=["blocks.*.up"])
    record = fit(tmp_path, Branches(), stage)
    assert record["sparsity"] > 0


class Auxiliary(tiny.Regressor):
    """With a head that only training uses."""

    def __init__(self):
        super().__init__()
        self.blocks[0].extra = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        hidden = self.inlet(batch[0])
        return F.mse_loss(self(batch[0]), batch[1]) + F.mse_loss(self.blocks[0].extra(hidden), batch[1])


@pytest.mark.parametrize("stage", [Wanda(0.5), GPTQ(4), MixedPrecision()], ids=lambda s: type(s).__name__)
def test_a_head_used_in_training_only_is_left_out_and_named(tmp_path, stage):
    module = Auxiliary()
    before = module.blocks[0].extra.weight.detach().clone()
    record = fit(tmp_path, module, stage)
    assert any("blocks.0.extra" in note and "evaluation mode uses" in note for note in record["notes"])
    assert torch.equal(module.blocks[0].extra.weight, before)


def test_a_head_used_in_training_only_is_refused_as_a_target(tmp_path):
    with pytest.raises(
        RecipeError, match=r"targets='extra' selects only Linear layers .1 layer .blocks.0.extra.*evaluation mode uses"
    ):
        fit(tmp_path, Auxiliary(), GPTQ(4, targets=["up", "extra"]))
    assert not (tmp_path / "report.json").exists()


def test_magnitude_needs_no_forward_pass(tmp_path):
    module = Auxiliary()
    fit(tmp_path, module, Magnitude(0.5))
    assert float((module.blocks[0].extra.weight == 0).float().mean()) == 0.5


def test_the_head_behind_the_blocks_is_calibrated_on_the_compressed_model(tmp_path):
    def language_model():
        torch.manual_seed(0)
        return CausalLM(tiny.LLAMA | {"tie_word_embeddings": False})

    module, data = language_model(), TokenData(**tiny.write_tokens(tmp_path))
    trainer(tmp_path / "run", SparseGPT(0.5), GPTQ(4, targets=["lm_head"])).fit(module, datamodule=data)
    record = read_records(tmp_path / "run")[-1]
    assert not any("no calibration token" in note for note in record["notes"])
    assert len(torch.unique(module.model.lm_head.weight[0])) <= 16

    pruned = language_model()
    trainer(tmp_path / "pruned", SparseGPT(0.5)).fit(pruned, datamodule=data)
    trainer(tmp_path / "head", GPTQ(4, targets=["lm_head"])).fit(pruned, datamodule=data)
    assert torch.equal(pruned.model.lm_head.weight, module.model.lm_head.weight)


def test_the_probe_tells_experts_from_layers_that_nothing_uses():
    module = MixtureNet()
    module.body[0].unused = nn.Linear(8, 8)
    layers = find_layers(module, None, None, {"": module})
    uses = observe_uses(module, layers, lambda: module(torch.randn(64, 8)))
    assert uses["body.0.unused"] == "unused"
    assert "body.0.experts.2.0" not in uses
    assert uses["body.0.experts.0.0"] == "called"


def test_a_block_of_called_layers_is_not_watched_after_its_first_pass(monkeypatch):
    seen = []
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    original = FunctionalReader.__torch_function__

    def count(self, func, types, args=(), kwargs=None):
        seen.append(func)
        return original(self, func, types, args, kwargs)

    monkeypatch.setattr(FunctionalReader, "__torch_function__", count)
    statistics_of(model, [torch.randn(2, 8)])
    first = len(seen)
    seen.clear()
    statistics_of(model, [torch.randn(2, 8)] * 5)
    assert first == len(seen) > 0


def test_the_error_of_a_functionally_used_layer_is_measured():
    model = Net(Functional(called=False)).eval()
    batches = [torch.randn(6, 8)]
    changed = copy.deepcopy(model.body.linear)
    with torch.no_grad():
        changed.weight.mul_(0.5)
        changed.bias.mul_(0.5)
    walk = Walk(model, {"": model}, batches, batches[0][:1], model, progress=False)
    errors = layer_errors(walk, {"half": {"body.linear": changed, "body.plain": copy.deepcopy(model.body.plain)}})
    assert errors["body.linear"]["half"] == pytest.approx(0.25)
    assert errors["body.plain"]["half"] == 0.0


def test_a_run_with_left_out_layers_resumes_and_reports_them(tmp_path):
    module = Net(EncoderBody())
    fit(tmp_path, module, ActivationQuantization(4), GPTQ(4))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["status"] == "finished"
    loaded = load(tmp_path, module=Net(EncoderBody()))
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), module.eval()(x))
    assert torch.equal(
        weight_matrix(loaded.body.encoder.layers[0].self_attn.out_proj),
        weight_matrix(module.body.encoder.layers[0].self_attn.out_proj),
    )


RANKS = """
import sys
import torch
from torch import distributed, nn

from pqqp_lightning.calibration.collect import Collector
from pqqp_lightning.calibration.statistics import Hessian

rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(0)
layers = {name: nn.Linear(4, 4) for name in ("all", "first", "second", "never")}
collector = Collector(layers, Hessian)
with collector.watching(), collector.forward_pass():
    for name in (("second", "all"), ("all", "first"))[rank]:
        layers[name](torch.ones(3, 4))
missed = collector.uncalled_on_all_ranks()
for reading in collector.readings:
    reading.statistic.reduce()
rows = {name: int(reading.statistic.rows) for reading in collector.readings for name in reading.layers}
print(missed, rows)
"""


def test_an_expert_that_only_one_rank_reached_is_reached(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    other = start(["ranks.py", "1", str(tmp_path / "meet")], tmp_path, tmp_path / "other.txt")
    done = run_forked(["ranks.py", "0", str(tmp_path / "meet")], tmp_path)
    other.join(30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("['never'] {'second': 3, 'all': 6, 'first': 3}")
    assert (tmp_path / "other.txt").read_text() == done.stdout
