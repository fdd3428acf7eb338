"""Channel and head pruning: smaller tensors that compute what the dense network does with those channels at zero."""

import copy
import json
import math
import sys

import kinds
import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pqqp_lightning import load
from pqqp_lightning.algorithms.channels import choose_units
from pqqp_lightning.algorithms.packing import unpack_mask
from pqqp_lightning.calibration.walk import Walk
from pqqp_lightning.callbacks import GPTQ, NF4, RTN, ChannelPruning, Magnitude, QuaRot, channel_pruning
from pqqp_lightning.data import ImageData, TokenData
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.models import CausalLM, ImageClassifier
from pqqp_lightning.network.constraints import broken_constraints, collect_constraints
from pqqp_lightning.network.layers import mark_adapter
from pqqp_lightning.network.structure import weightless_copy
from pqqp_lightning.runs.forecast import Forecast
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.stages.stage import Context
from pqqp_lightning.surgery import dependency
from pqqp_lightning.surgery.coupling import built_groups
from pqqp_lightning.surgery.dependency import traced_groups

RESNET = {"model": "resnet18", "model_args": {"stem_width": 8, "channels": [8, 8, 16, 16]}}
BOTTLENECK = {"model": "torchvision/resnet50", "model_args": {"width_per_group": 16}}
PLAIN = {"model": "torchvision/resnet18"}
DEIT = {"model": "deit_tiny_patch16_224", "image_size": 32}
DEIT["model_args"] = {"patch_size": 8, "depth": 2, "embed_dim": 48}
GQA = tiny.LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
TRANSFORMERS = ["llama", "opt", "deit"]
IMPORTANCES = ["norm", "activation", "taylor"]


def make(kind, seed=0):
    """A network with random norms and biases."""
    torch.manual_seed(seed)
    if kind in ("llama", "opt"):
        settings = GQA | {"attention_bias": True, "mlp_bias": True} if kind == "llama" else tiny.OPT
        module = CausalLM(settings)
    else:
        network = {"resnet": RESNET, "bottleneck": BOTTLENECK, "plain": PLAIN, "deit": DEIT}[kind]
        module = ImageClassifier(**network, pretrained=False, num_classes=10)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.dim() == 1 and tensor.is_floating_point() and "inv_freq" not in name:
                tensor.uniform_(0.5, 1.5) if "var" in name or "weight" in name else tensor.normal_(0, 0.3)
            elif tensor.dim() == 2 and kind in ("llama", "opt"):
                tensor.mul_(8)
    return module.eval()


def inputs(kind, seed=5, samples=4):
    generator = torch.Generator().manual_seed(seed)
    if kind in ("llama", "opt"):
        return torch.randint(0, 64, (samples, 16), generator=generator)
    return torch.randn(samples, 3, 32, 32, generator=generator)


def batches(kind, count=2):
    if kind in ("llama", "opt"):
        return [{"input_ids": inputs(kind, seed)} for seed in range(count)]
    labels = torch.arange(4)
    return [(inputs(kind, seed), labels) for seed in range(count)]


def compress(module, stage, data=()):
    """(the stage's plan, its context), without a trainer."""

    def run(batch):
        return module.calibration_step(batch, 0) if hasattr(module, "calibration_step") else module(batch[0])

    def loss(batch):
        return module.training_step(batch, 0)

    context = Context(lambda blocks: Walk(module, blocks, list(data), next(iter(data)), run, loss=loss, progress=False))
    return stage.compress(module, context), context


def removed_units(plan):
    """Group name to the removed units."""
    found = {}
    for key, bits in plan.items():
        if key.endswith(":kept"):
            mask = unpack_mask(bits, (1, 8 * len(bits)))[0]
            found[key.removesuffix(":kept")] = [i for i in range(len(mask)) if not mask[i]]
    return found


def gone(plan, name, width):
    """The removed units of a group of ``width`` units."""
    return [unit for unit in removed_units(plan)[name] if unit < width]


def blocks_of(module, kind):
    if kind == "deit":
        return [(f"model.blocks.{i}", b) for i, b in enumerate(module.model.blocks)]
    base = "model.model.layers" if kind == "llama" else "model.model.decoder.layers"
    return [(f"{base}.{i}", b) for i, b in enumerate(module.get_submodule(base))]


@torch.no_grad()
def zero_units(module, kind, plan):
    """The dense network with the columns that read the removed channels and heads at zero: written by hand."""
    for path, block in blocks_of(module, kind):
        if kind == "llama":
            mlp, reader, units = f"{path}.mlp.gate_proj", block.mlp.down_proj, 64
            heads, output, width, each = f"{path}.self_attn.q_proj", block.self_attn.o_proj, 4, 16  # 2 queries a key
        elif kind == "opt":
            mlp, reader, units = f"{path}.fc1", block.fc2, 64
            heads, output, width, each = f"{path}.self_attn.q_proj", block.self_attn.out_proj, 4, 8
        else:
            mlp, reader, units = f"{path}.mlp.fc1", block.mlp.fc2, 192
            heads, output, width, each = f"{path}.attn.qkv", block.attn.proj, 3, 16
        for unit in gone(plan, mlp, units):
            reader.weight[:, unit] = 0
        for unit in gone(plan, heads, width):
            output.weight[:, unit * each : (unit + 1) * each] = 0


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_narrower_transformer_is_the_dense_one_with_those_units_at_zero(kind, importance):
    dense, small = make(kind), make(kind)
    plan, _ = compress(small, ChannelPruning(0.4, importance, head_ratio=0.5), batches(kind))
    zero_units(dense, kind, plan)
    x = inputs(kind)
    with torch.no_grad():
        torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())


def resnet_streams(network):
    """What a ResNet's channels are shared by, written by hand: norms that carry the same channels."""
    bottleneck = hasattr(network.layer1[0], "conv3")
    groups = []
    stream = ["bn1"]
    for stage in range(1, 5):
        for i, block in enumerate(getattr(network, f"layer{stage}")):
            path = f"layer{stage}.{i}"
            groups += [[f"{path}.bn1"], [f"{path}.bn2"]] if bottleneck else [[f"{path}.bn1"]]
            if block.downsample is not None:
                groups.append(stream)
                stream = [f"{path}.downsample.1"]
            stream.append(f"{path}.bn3" if bottleneck else f"{path}.bn2")
    return [*groups, stream]


@pytest.mark.parametrize("kind", ["resnet", "plain", "bottleneck"])
def test_a_narrower_resnet_is_the_dense_one_with_coupled_channels_at_zero(kind):
    dense, small = make(kind), make(kind)
    plan, _ = compress(small, ChannelPruning(0.5))
    convs = {f"model.{n}": c for n, c in dense.model.named_modules() if isinstance(c, nn.Conv2d)}
    norm_of = {n: n.replace("conv", "bn").replace("downsample.0", "downsample.1").removeprefix("model.") for n in convs}
    streams = {norm: i for i, norms in enumerate(resnet_streams(dense.model)) for norm in norms}
    found = {streams[norm_of[name]]: name for name in removed_units(plan)}
    assert sorted(found) == list(range(len(resnet_streams(dense.model))))  # one group for each, none besides
    with torch.no_grad():
        for norm, i in streams.items():
            layer = dense.model.get_submodule(norm)
            channels = gone(plan, found[i], len(layer.weight))
            assert len(channels) == round(0.5 * len(layer.weight))
            layer.weight[channels], layer.bias[channels] = 0, 0
            assert small.model.get_submodule(norm).num_features == len(layer.weight) - len(channels)
        torch.testing.assert_close(small(inputs(kind)), dense(inputs(kind)), rtol=1e-4, atol=1e-4)
    assert small.model.conv1.in_channels == 3
    assert small.model.fc.out_features == 10


class Odd(nn.Module):
    """Concatenation, a depthwise convolution, a flattened map, a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10, bias=False)
        self.norm = nn.BatchNorm2d(10)
        self.c = nn.Conv2d(10, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.d = nn.Conv2d(8, 5, 1)
        self.fc = nn.Linear(5 * 16, 7)
        self.example_input_array = torch.zeros(2, 3, 4, 4)

    def forward(self, x):
        x = torch.cat([self.a(x), self.b(x)], dim=1).relu()
        x = self.norm(self.depthwise(x)).relu()
        x = self.grouped(self.c(x).relu()).relu()
        return self.fc(self.d(x).relu().flatten(1))


def test_concatenated_depthwise_and_flattened_channels_are_followed():
    torch.manual_seed(0)
    dense = Odd().eval()
    with torch.no_grad():
        dense.norm.running_mean.normal_()
        dense.norm.weight.uniform_(0.5, 1.5)
        dense.norm.bias.normal_()
    small = copy.deepcopy(dense)
    plan, context = compress(small, ChannelPruning(0.5))
    widths = {"a": 6, "b": 4, "d": 5}
    assert set(removed_units(plan)) == set(widths)
    parts = {name: gone(plan, name, width) for name, width in widths.items()}
    with torch.no_grad():
        for unit in parts["a"] + [6 + unit for unit in parts["b"]]:
            dense.norm.weight[unit], dense.norm.bias[unit] = 0, 0
        dense.d.weight[parts["d"]], dense.d.bias[parts["d"]] = 0, 0
        x = torch.randn(3, 3, 4, 4)
        torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-5)
    assert (small.depthwise.groups, small.c.in_channels, small.grouped.groups) == (5, 5, 2)
    assert small.fc.in_features == 3 * 16
    assert any("grouped convolution" in note for note in context.all_notes())


def test_a_network_is_traced_once_for_each_structure(monkeypatch):
    traced = []
    trace = dependency._trace
    monkeypatch.setattr(dependency, "_trace", lambda model: traced.append(model) or trace(model))
    module = ImageClassifier(**RESNET, num_classes=4, pretrained=False)
    stage = ChannelPruning(0.5)
    assert stage.check(module, None, []) == []
    plan = stage.expected_plan(module)
    assert traced == [module]
    stage.restructure(module, plan)
    widths = [group.width for group in traced_groups(module).groups]
    assert traced == [module] * 2
    assert widths == [
        group.width // 2 for group in trace(ImageClassifier(**RESNET, num_classes=4, pretrained=False)).groups
    ]


def test_a_search_traces_each_structure_once_whichever_prefix_leaves_it(monkeypatch, tmp_path):
    traced, ran = [], []
    trace, run_example = dependency._trace, channel_pruning.run_example
    monkeypatch.setattr(dependency, "_trace", lambda model: traced.append(model) or trace(model))
    monkeypatch.setattr(channel_pruning, "run_example", lambda *given: ran.append(given) or run_example(*given))
    module = ImageClassifier(**RESNET, num_classes=4, pretrained=False)
    half, quarter = ChannelPruning(0.5), ChannelPruning(0.25)
    others = [Magnitude(0.5), RTN(8), Magnitude(0.7), RTN(4)]
    forecast = Forecast(RunData(module, datamodule=tiny.make_data("resnet", tmp_path)), [half, quarter, *others])
    sizes = set()
    for narrow in (half, quarter):
        for other in others:
            for stages in ([narrow, other], [other, narrow]):
                turn = forecast.after(stages)
                assert not turn.problems
                sizes.add(turn.size.size_bytes)
                assert turn.model.model.fc.in_features == narrow._kept_count(traced_groups(module).groups[-1])
    assert len(sizes) > len(others)
    assert len(traced) == 1  # the dense one, which every prefix here leaves
    assert len(ran) == 2


def test_groups_of_mlps_are_those_that_torch_pruning_finds():
    import torch_pruning as tp

    for kind in TRANSFORMERS:
        model = make(kind).model
        for block in getattr(model, "blocks", []):
            block.attn.fused_attn = False
        x = inputs(kind, samples=1)
        graph = tp.DependencyGraph().build_dependency(
            model, x, verbose=False, output_transform=lambda out: getattr(out, "logits", out)
        )
        for group in built_groups(model).groups:
            root = model.get_submodule(group.name)
            if group.kind == "heads" and kind != "deit":
                continue  # it does not come back from the group of q_proj
            pruner = graph.get_pruner_of_module(root)
            unit = group.width - 1
            rows = group.members[0].index[unit].tolist()
            theirs = set()
            for item in graph.get_pruning_group(root, pruner.prune_out_channels, rows):
                layer = item.dep.target
                if isinstance(layer.module, nn.Linear):
                    side = "out" if item.dep.handler == pruner.prune_out_channels else "in"
                    theirs.add((layer.name.split(" ")[0], side, tuple(sorted(item.idxs))))
            ours = {(m.name, m.side, tuple(sorted(m.index[unit].tolist()))) for m in group.members}
            assert ours == theirs, group.name


def reference_scores(module, kind, importance, data):
    """Importance of the MLP channels and heads of the first block, by loops from the papers' sums."""
    path, block = blocks_of(module, kind)[0]
    if kind == "llama":
        a = block.self_attn
        layers = [(block.mlp.gate_proj, 0), (block.mlp.up_proj, 0), (block.mlp.down_proj, 1)]
        heads = [(a.q_proj, 0, 16), (a.k_proj, 0, 8), (a.v_proj, 0, 8), (a.o_proj, 1, 16)]
        names, units = (f"{path}.mlp.gate_proj", f"{path}.self_attn.q_proj"), (64, 4)
    else:
        a = block.self_attn
        layers = [(block.fc1, 0), (block.fc2, 1)]
        heads = [(a.q_proj, 0, 8), (a.k_proj, 0, 8), (a.v_proj, 0, 8), (a.out_proj, 1, 8)]
        names, units = (f"{path}.fc1", f"{path}.self_attn.q_proj"), (64, 4)
    scores = []
    for members, width in (([(m, d, 1) for m, d in layers], units[0]), (heads, units[1])):
        if importance == "activation":
            values = watch_input(module, members[-1][0], data)  # [T, I]
            each = members[-1][2]
            scores.append([np.mean(values[:, u * each : (u + 1) * each] ** 2) for u in range(width)])
            continue
        total = np.zeros(width)
        terms = gradient_terms(module, members, data) if importance == "taylor" else None
        for i, (layer, dim, each) in enumerate(members):
            weight = layer.weight.detach().double().numpy()
            entries = weight**2 if terms is None else terms[i]
            entries = entries if dim == 0 else entries.T
            for unit in range(width):
                for row in range(unit * each, (unit + 1) * each):
                    total[unit] += entries[row].sum()
        scores.append(np.sqrt(total) if terms is None else total)
    return dict(zip(names, scores, strict=True))


def watch_input(module, layer, data):
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for batch in data:
            module(batch["input_ids"])
    handle.remove()
    return torch.cat(seen).double().numpy()


def gradient_terms(module, members, data):
    weights, terms = [layer.weight for layer, _, _ in members], [0.0] * len(members)
    for batch in data:
        ids = batch["input_ids"]
        loss = F.cross_entropy(module(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for i, gradient in enumerate(torch.autograd.grad(loss, weights)):
            terms[i] += (weights[i].detach() * gradient).abs().double().numpy() / len(data)
    return terms


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_the_least_important_units_go_as_a_slow_reference_ranks_them(kind, importance):
    module, data = make(kind, seed=2), batches(kind, 3)
    expected = reference_scores(module, kind, importance, data)
    plan, _ = compress(module, ChannelPruning(0.3, importance, head_ratio=0.25), data)
    for name, scores in expected.items():
        count = round((0.3 if len(scores) > 4 else 0.25) * len(scores))
        assert gone(plan, name, len(scores)) == sorted(np.argsort(scores, kind="stable")[:count]), name


def test_a_coupled_group_of_a_resnet_is_ranked_by_all_its_weights():
    module = make("resnet")
    block, network = module.model.layer2[0], module.model
    readers = [network.layer2[1].conv1, network.layer3[0].conv1, network.layer3[0].downsample[0]]
    makers = [block.conv2, block.downsample[0], network.layer2[1].conv2]
    norms = [block.bn2, block.downsample[1], network.layer2[1].bn2]
    scores = []
    for c in range(8):
        total = sum(float((m.weight[c] ** 2).sum()) for m in (*makers, *norms))
        scores.append(math.sqrt(total + sum(float((r.weight[:, c] ** 2).sum()) for r in readers)))
    plan, _ = compress(module, ChannelPruning(0.5))
    name = next(n for n in removed_units(plan) if n in ("model.layer2.0.conv2", "model.layer2.0.downsample.0"))
    assert gone(plan, name, 8) == sorted(np.argsort(scores)[:4])


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_exactly_the_asked_for_number_stays(ratio, width):
    kept = choose_units(torch.rand(width), ratio)
    assert len(kept) == max(1, width - round(ratio * width))
    assert len(choose_units(torch.zeros(width), ratio)) == len(kept)  # under ties too


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ArithmeticError, match="NaN or infinite"):
        choose_units(torch.tensor([1.0, float("nan")]), 0.5)


def test_heads_go_with_their_keys_and_the_model_still_generates():
    module = make("llama")
    compress(module, ChannelPruning(0.5, head_ratio=0.5))
    attention, config = module.model.model.layers[0].self_attn, module.model.config
    assert (attention.q_proj.out_features, attention.k_proj.out_features, attention.o_proj.in_features) == (32, 16, 32)
    assert (attention.num_key_value_groups, attention.head_dim) == (2, 8)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert (config.intermediate_size, config.hidden_size) == (32, 64)
    start = inputs("llama", samples=1)[:, :4]
    for use_cache in (True, False):
        out = module.model.generate(start, max_new_tokens=8, do_sample=False, use_cache=use_cache)
        assert out.shape == (1, 12)
    with torch.no_grad():
        greedy = [int(module(out[:, :i])[0, -1].argmax()) for i in range(4, 12)]
    assert out[0, 4:].tolist() == greedy


def test_attributes_of_other_attentions_follow():
    opt, deit = make("opt"), make("deit")
    compress(opt, ChannelPruning(0.5, head_ratio=0.5))
    compress(deit, ChannelPruning(0.5, head_ratio=0.5))
    attention = opt.model.model.decoder.layers[0].self_attn
    assert (attention.num_heads, attention.embed_dim, attention.head_dim) == (2, 16, 8)
    assert (opt.model.config.ffn_dim, opt.model.config.num_attention_heads) == (32, 2)
    assert opt.model.generate(inputs("opt", samples=1)[:, :4], max_new_tokens=4, do_sample=False).shape == (1, 8)
    attention = deit.model.blocks[0].attn
    assert (attention.num_heads, attention.attn_dim, attention.head_dim) == (1, 16, 16)
    assert attention.qkv.bias.shape == (48,)


def test_layers_that_differ_leave_the_configuration_and_the_record_says_so():
    module = make("llama")
    _, context = compress(module, ChannelPruning(0.5, targets=["layers.0"]))
    assert module.model.config.intermediate_size == 64
    assert any("layers differ in intermediate_size" in note for note in context.all_notes())
    module(inputs("llama"))


def data_of(kind, folder):
    if kind in ("llama", "opt"):
        return TokenData(**tiny.write_tokens(folder))
    return ImageData(train_samples=64, calibration_samples=32, evaluation_samples=32, batch_size=32)


def fit(tmp_path, kind, *stages, module=None):
    module = module or make(kind)
    tiny.trainer(tmp_path / "run", *stages).fit(module, datamodule=data_of(kind, tmp_path))
    return module


@pytest.mark.parametrize("kind", [*TRANSFORMERS, "resnet"])
def test_a_checkpoint_loads_bit_for_bit_without_torch_pruning(tmp_path, kind, monkeypatch):
    heads = None if kind == "resnet" else 0.5
    module = fit(tmp_path, kind, ChannelPruning(0.5, "activation", head_ratio=heads, epochs=1)).eval()
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    loaded = load(tmp_path / "run")
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in module.named_parameters()}
    with torch.no_grad():
        assert torch.equal(loaded(inputs(kind)), module(inputs(kind)))


@pytest.mark.parametrize("kind", [*TRANSFORMERS, "resnet"])
def test_the_expected_plan_has_the_structure_of_the_real_one(kind):
    module = make(kind)
    stage = ChannelPruning(0.3, "activation", head_ratio=None if kind == "resnet" else 0.5)
    ahead = weightless_copy(module)
    expected = stage.expected_plan(ahead)
    plan, _ = compress(module, stage, batches(kind))
    assert {k: v for k, v in expected.items() if k in ("sizes", "numbers")} == {
        k: plan[k] for k in ("sizes", "numbers")
    }
    assert set(expected) == set(plan)
    ChannelPruning.restructure(ahead, expected)
    assert all(p.is_meta for p in ahead.parameters())
    assert {n: p.shape for n, p in ahead.named_parameters()} == {n: p.shape for n, p in module.named_parameters()}


def test_device_dtype_and_gradients_of_the_dense_model_stay():
    module = make("llama").bfloat16()
    module.model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    compress(module, ChannelPruning(0.5, head_ratio=0.5))
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())
    frozen = [n for n, p in module.named_parameters() if not p.requires_grad]
    assert frozen == ["model.model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("kind", ["llama", "resnet"])
def test_choosing_leaves_nothing_behind(kind, importance):
    module = make(kind)
    module.train()
    untouched = [p for n, p in module.named_parameters() if "embed" in n or n.endswith("fc.bias")]
    untouched[0].grad = torch.ones_like(untouched[0])
    running = {n: b.clone() for n, b in module.named_buffers() if "num_batches" in n}
    compress(module, ChannelPruning(0.5, importance), batches(kind))
    assert all(m.training for m in module.modules())
    assert all(p.requires_grad for p in module.parameters())
    assert torch.equal(untouched[0].grad, torch.ones_like(untouched[0]))
    assert all(p.grad is None for p in module.parameters() if p is not untouched[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert all(torch.equal(count, module.get_buffer(name)) for name, count in running.items())
    assert getattr(getattr(module.model, "config", None), "use_cache", True)


def test_a_stage_can_be_used_again():
    stage = ChannelPruning(0.5)
    first, second = make("resnet"), make("resnet")
    compress(first, stage)
    compress(second, stage)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    compress(first, stage)
    assert first.model.layer4[1].conv1.out_channels == 4


@pytest.fixture(scope="module")
def trained():
    """A small network of a user's own with a residual stream, trained with weight decay: norms mean something."""
    module = tiny.Regressor(optimizer=torch.optim.AdamW, lr=0.01, weight_decay=0.3)
    optimizer = module.configure_optimizers()
    x, y = tiny.regression_data(256).tensors
    for _ in range(400):
        optimizer.zero_grad()
        F.mse_loss(module(x), y).backward()
        optimizer.step()
    return module.eval()


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_the_important_channels_are_worth_more_than_the_others(trained, importance, monkeypatch):
    x, y = tiny.regression_data(256).tensors
    data = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 256, 64)]
    errors = []
    for sign in (1, -1):
        module = copy.deepcopy(trained)
        monkeypatch.setattr(
            "pqqp_lightning.callbacks.channel_pruning.choose_units", lambda s, *a, sign=sign: choose_units(sign * s, *a)
        )
        compress(module, ChannelPruning(0.25, importance), data)
        with torch.no_grad():
            errors.append(float(F.mse_loss(module(x), y)))
    with torch.no_grad():
        dense = float(F.mse_loss(trained(x), y))
    assert errors[0] - dense < 0.8 * (errors[1] - dense)


def test_the_residual_stream_of_a_users_network_goes_as_one(trained):
    module = copy.deepcopy(trained)
    compress(module, ChannelPruning(0.5))
    assert (module.inlet.out_features, module.blocks[1].down.out_features, module.head.in_features) == (4, 4, 4)
    assert (module.inlet.in_features, module.head.out_features, module.blocks[0].up.out_features) == (8, 2, 8)


def test_targets_choose_groups_all_of_whose_makers_they_name():
    module = make("resnet")
    compress(module, ChannelPruning(0.5, targets=["layer1", "layer2.0.conv2"], ignore=["layer1.1.conv1"]))
    network = module.model
    assert network.conv1.out_channels == 64
    assert (network.layer1[0].conv1.out_channels, network.layer1[1].conv1.out_channels) == (4, 8)
    assert network.layer1[1].conv2.out_channels == 4  # all of its stream is chosen
    assert network.layer2[0].conv2.out_channels == 8  # the rest of its stream is not
    module = make("llama")
    compress(module, ChannelPruning(0.5, head_ratio=0.5, targets=["self_attn"], ignore=["layers.1"]))
    first, second = module.model.model.layers
    assert (first.self_attn.k_proj.out_features, first.mlp.up_proj.out_features) == (16, 64)
    assert second.self_attn.k_proj.out_features == 32


def test_the_stages_layers_are_those_that_shrink():
    for kind in ("resnet", "llama"):
        module = make(kind)
        stage = ChannelPruning(0.5, head_ratio=None if kind == "resnet" else 0.5)
        before = {n: m.weight.numel() for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        layers = set(stage.find_layers(module))
        compress(module, stage)
        assert layers == {n for n, count in before.items() if module.get_submodule(n).weight.numel() < count}


@pytest.mark.parametrize("kind", ["resnet", "bottleneck", "deit", "llama", "opt"])
def test_parameters_and_operations_really_fall(kind):
    def cost(module):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(inputs(kind))
        return counter.get_total_flops()

    module = make(kind)
    parameters, flops = sum(p.numel() for p in module.parameters()), cost(module)
    compress(module, ChannelPruning(0.5, head_ratio=0.5 if kind in TRANSFORMERS else None))
    assert sum(p.numel() for p in module.parameters()) < 0.75 * parameters
    assert cost(module) < 0.7 * flops
    assert all(p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes for p in module.parameters())


@pytest.mark.parametrize("kind", ["resnet", "llama", "deit"])
@pytest.mark.parametrize("first", [Magnitude(0.5), RTN(4), RTN(4, "tensor", symmetric=False)])
def test_a_mask_and_a_grid_are_kept_on_what_remains(tmp_path, kind, first):
    stage = ChannelPruning(0.5, head_ratio=None if kind == "resnet" else 0.5)
    module = fit(tmp_path, kind, first, stage)
    constraints = collect_constraints(module)
    assert constraints
    for name, found in constraints.items():
        layer = module.get_submodule(name)
        assert found.shape == (layer.weight.shape[0], layer.weight[0].numel())
        assert (found.mask_bits is not None) == isinstance(first, Magnitude)
        assert (found.grid is not None) == isinstance(first, RTN)
    assert not broken_constraints(module, constraints)
    loaded = load(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["resnet", "llama", "opt", "deit"])
@pytest.mark.parametrize("second", [GPTQ(8), RTN(4), Magnitude(0.5)])
def test_other_stages_act_on_the_smaller_network(tmp_path, kind, second):
    module = fit(tmp_path, kind, ChannelPruning(0.5, head_ratio=None if kind == "resnet" else 0.5), second)
    constraints = collect_constraints(module)
    assert set(constraints) == set(second.find_layers(module))
    assert not broken_constraints(module, constraints)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (
            Magnitude(pattern="2:4"),
            r"cut the N:M pattern of stage 'magnitude' in the inputs of .*Put ChannelPruning fi",
        ),
        (RTN(4, 16), r"cut the quantization groups of stage 'rtn' in the inputs of .*group_size: channel"),
        (NF4(), r"cut the quantization groups of stage 'nf4'"),
        (QuaRot(online=True), r"are rotated while the model runs. Put this stage first"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_way_out(tmp_path, first, message):
    with pytest.raises(RecipeError, match=rf"stages.channelpruning \(ChannelPruning\): .*{message}"):
        fit(tmp_path, "llama", first, ChannelPruning(0.5), module=CausalLM(tiny.LLAMA))
    assert not (tmp_path / "run").exists()


def test_a_pattern_along_kept_inputs_is_no_reason_to_refuse(tmp_path):
    stage = ChannelPruning(0.5)
    first = Magnitude(pattern="2:4", targets=["gate_proj", "up_proj"])  # they lose rows alone
    module = fit(tmp_path, "llama", first, stage)
    assert {c.pattern for c in collect_constraints(module).values()} == {(2, 4)}


@pytest.mark.parametrize(("first", "word"), [(Magnitude(pattern="2:4"), "2:4"), (RTN(4, 16), "groups of 16 columns")])
def test_allow_undo_runs_and_the_record_says_what_was_lost(tmp_path, first, word):
    module = make("llama")
    trainer = tiny.trainer(tmp_path / "run", first, ChannelPruning(0.5, allow_undo=True))
    trainer.fit(module, datamodule=data_of("llama", tmp_path))
    record = json.loads((tmp_path / "run" / "report.json").read_text())["stages"][-1]
    assert record["undone"]
    assert word in " ".join(record["notes"])
    down = collect_constraints(module)["model.model.layers.0.mlp.down_proj"]
    assert down.pattern is None
    assert down.grid is None
    assert not broken_constraints(module, collect_constraints(module))
    load(tmp_path / "run")


def test_adapters_kept_apart_must_be_merged_first():
    module = make("llama")
    mark_adapter(module.model.model.layers[0].mlp.up_proj)
    assert any("Merge them first" in problem.way_out for problem in ChannelPruning(0.5).check(module, None, []))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"ratio": 1.0}, r"ratio=1.0 is not in \[0, 1\)"),
        ("llama", {"ratio": -0.1}, r"ratio=-0.1 is not in \[0, 1\)"),
        ("llama", {"ratio": 0.0}, r"ratio=0.0 without head_ratio removes nothing"),
        ("llama", {"head_ratio": 1.5}, r"head_ratio=1.5 is not in \(0, 1\)"),
        ("llama", {"importance": "taylr"}, r"importance='taylr' is not one of .*Did you mean 'taylor'"),
        ("llama", {"head_ratio": 0.01}, r"head_ratio=0.01 removes none of the 4 \(key and value\) heads of 2 layers"),
        (
            "llama",
            {"targets": ["q_prj"]},
            r"targets='q_prj' matches no layer .* Did you mean 'q_proj'",
        ),
        ("llama", {"ignore": ["*"]}, r"leave no layer whose channels can be removed"),
        (
            "llama",
            {"targets": ["self_attn"]},
            r"leave no layer whose channels can be removed with ratio=0.5 and head_ratio=N",
        ),
        ("llama", {"ratio": 0.001}, r"leave no layer whose channels can be removed"),
        (
            "resnet",
            {"head_ratio": 0.5},
            r"has no effect: the model has no attention of a supported kind",
        ),
        ("resnet", {"epochs": -1}, r"epochs=-1 is negative"),
    ],
)
def test_bad_arguments_give_worded_errors(tmp_path, kind, options, message):
    with pytest.raises(RecipeError, match=message):
        fit(tmp_path, kind, ChannelPruning(**options))
    assert not (tmp_path / "run").exists()


class NoStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.two(self.one(x[:, 0]).relu())  # its input is not what the first layer's width suggests


def test_a_network_that_cannot_be_traced_is_refused_with_the_way_out():
    problems = ChannelPruning(0.5).check(NoStep(), None, [])
    assert any("cannot trace NoStep" in p.text and "example_input_array" in p.way_out for p in problems)
    assert ChannelPruning(0.5).find_layers(NoStep()) == {}
    module = NoStep()
    module.example_input_array = torch.zeros(1, 3, 4)
    assert [group.name for group in traced_groups(module).groups] == ["one"]
    assert not ChannelPruning(0.5).check(module, None, [])


def test_taylor_needs_a_loss():
    module = NoStep()
    module.example_input_array = torch.zeros(1, 3, 4)
    problems = ChannelPruning(0.5, "taylor").check(module, None, [])
    assert ("importance", "taylor") in [(problem.key, problem.value) for problem in problems]


def test_channels_are_not_split_where_a_view_needs_their_number():
    class Views(NoStep):
        def forward(self, x):
            return self.two(self.one(x).view(-1, 2, 4).flatten(1))

    problems = ChannelPruning(0.5).check(Views(), None, [])
    assert any("does not run with fewer channels" in p.text and "ignore" in p.way_out for p in problems)


def test_calibration_data_is_asked_for_where_it_is_needed():
    assert not ChannelPruning(0.5).needs_calibration
    assert ChannelPruning(0.5, "activation").needs_calibration
    assert ChannelPruning(0.5, "taylor").needs_calibration


@pytest.mark.parametrize("kind", ["experts", "transposed experts"])
def test_fused_experts_are_refused_before_their_graph_is_traced(kind):
    (problem,) = ChannelPruning(0.25).check(kinds.KindModule(kind), None, [])
    assert "cannot trace the channels of fused experts" in problem.text
    assert "SLEB" in problem.way_out
