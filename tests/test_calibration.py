"""Block-by-block calibration: blocks found by structure, and statistics equal to those of plain full forward passes."""

import copy
from collections import defaultdict
from contextlib import suppress

import pytest
import timm
import torch
import torchvision
from lightning.pytorch import LightningModule
from tiny import LLAMA, OPT, Block, Regressor, regression_loader, token_rows, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError, MetricCollection

from pqqp_lightning.calibration.statistics import Hessian, SquaredNorm
from pqqp_lightning.calibration.walk import Walk
from pqqp_lightning.callbacks import GPTQ, SparseGPT, Wanda
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.models import CausalLM
from pqqp_lightning.network.blocks import find_blocks, find_layers
from pqqp_lightning.network.layers import groups_of, input_rows, row_groups, weight_matrix
from pqqp_lightning.storage.records import read_records


def vit(depth=2):
    options = {"depth": depth, "embed_dim": 32, "num_heads": 4, "img_size": 16, "patch_size": 8, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **options)


def shallow_resnet():
    """Torchvision's ResNet-18 without its two widest stages."""
    model = torchvision.models.resnet18(num_classes=4)
    model.layer3, model.layer4, model.fc = nn.Sequential(), nn.Sequential(), nn.Linear(128, 4)
    return model


def narrow_resnet():
    return timm.create_model("resnet18", num_classes=4, channels=(8, 16, 16, 32))


def images(seed=0, count=3, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def batches_of(kind):
    if kind in ("llama", "opt", "llama with a cache"):
        return [token_rows(2, seed) for seed in range(3)]
    return [images(seed, size=32 if "resnet" in kind else 16) for seed in range(3)]


def randomize_norms(model):
    """Give the norms random running statistics."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model


def build(kind):
    """(model, how to run it on a batch)."""
    torch.manual_seed(0)
    if kind in ("llama", "opt"):
        module = CausalLM(LLAMA if kind == "llama" else OPT)
        return module, lambda batch: module.calibration_step({"input_ids": batch}, 0)
    if kind == "llama with a cache":  # as a user calls it: transformers keeps keys and values by default
        module = CausalLM(LLAMA)
        return module, lambda batch: module.model(batch)
    model = randomize_norms({"vit": vit, "torchvision resnet": shallow_resnet, "timm resnet": narrow_resnet}[kind]())
    return model, model


KINDS = ["llama", "llama with a cache", "opt", "vit", "torchvision resnet", "timm resnet"]
RESIDUAL_BLOCKS = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
BLOCKS = {
    "llama": ["model.model.layers.0", "model.model.layers.1"],
    "opt": ["model.model.decoder.layers.0", "model.model.decoder.layers.1"],
    "vit": ["blocks.0", "blocks.1"],
    "torchvision resnet": RESIDUAL_BLOCKS[:4],
    "timm resnet": RESIDUAL_BLOCKS,
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_found_by_structure(kind):
    model, run = build(kind)
    assert list(find_blocks(model)) == BLOCKS[kind]
    walk = walk_of(model, run, batches_of(kind))
    walk.over(find_layers(model, None, None, walk.blocks), SquaredNorm, lambda reading: None)
    assert walk.notes == []


@pytest.mark.parametrize(
    ("maker", "blocks"),
    [
        (lambda: torchvision.models.resnet18(), RESIDUAL_BLOCKS),
        (lambda: timm.create_model("resnet18"), RESIDUAL_BLOCKS),
        (lambda: timm.create_model("deit_tiny_patch16_224"), [f"blocks.{i}" for i in range(12)]),
    ],
    ids=["torchvision resnet18", "timm resnet18", "timm deit"],
)
def test_blocks_of_networks_as_published_are_found(maker, blocks):
    with torch.device("meta"):
        assert list(find_blocks(maker())) == blocks


def test_the_users_own_list_of_blocks_is_taken():
    model = Regressor(blocks=3)
    assert list(find_blocks(model, ["inlet", "blocks"])) == ["inlet", "blocks"]
    with pytest.raises(RecipeError, match="blocks='layers' is not a module of the model"):
        find_blocks(model, ["layers"])


def test_a_model_may_name_its_blocks(tmp_path):
    class Named(Regressor):
        compression_blocks = ("inlet", "blocks.0", "blocks.1", "head")

    seen = []

    class Looking(Wanda):
        def find_blocks(self, model):
            seen.append(list(super().find_blocks(model)))
            return super().find_blocks(model)

    module = Named()
    trainer(tmp_path, Looking(0.5)).fit(module, regression_loader(), regression_loader(16))
    assert seen[-1] == ["inlet", "blocks.0", "blocks.1", "head"]
    assert read_records(tmp_path)[-1]["notes"] == []
    assert float((module.head.weight == 0).float().mean()) == 0.5


def test_a_model_without_blocks_is_one_block():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert list(find_blocks(model)) == [""]
    walk, seen = walk_of(model, model, [torch.randn(3, 4)]), []
    walk.over(find_layers(model, None, None, walk.blocks), Hessian, lambda r: seen.extend(r.layers))
    assert seen == ["0", "2"]
    assert walk.notes == []


def walk_of(model, run, batches, blocks=None):
    def step(batch):
        run(batch)

    return Walk(model, blocks or find_blocks(model), batches, batches[0][:1], step, progress=False)


def halve(reading):
    """A crude compression, so that the inputs of later blocks differ from those of the dense model."""
    for layer in reading.layers.values():
        with torch.no_grad():
            layer.weight.mul_((layer.weight.abs() > layer.weight.abs().median()).float())


def statistics_of_walk(model, run, batches, kind=Hessian, blocks=None):
    """(name to (statistic, rows) as the walk hands them out, its notes)."""
    found = {}
    walk = walk_of(model, run, batches, blocks)

    def compress(reading):
        value = reading.statistic.value().clone()
        found.update({name: (value, int(reading.statistic.rows)) for name in reading.layers})
        halve(reading)

    walk.over(find_layers(model, None, None, walk.blocks), kind, compress)
    return found, walk.notes


def statistics_of_full_passes(model, run, batches, blocks):
    """The slow way: for each block the whole model, with a hook on each of its layers, then the block is compressed."""
    found, rows = {}, defaultdict(list)
    layers = find_layers(model, None, None, blocks)
    model.eval()
    for block in blocks:
        inside = {n: layer for n, layer in layers.items() if not block or n.startswith(f"{block}.")}
        handles = [
            layer.register_forward_pre_hook(
                lambda m, args, name=name: rows[name].append(input_rows(m, args[0]).double())
            )
            for name, layer in inside.items()
        ]
        with torch.no_grad():
            for batch in batches:
                run(batch)
        for handle in handles:
            handle.remove()
        for name, layer in inside.items():
            x = torch.cat(rows[name], dim=1)  # [groups, T, I]
            found[name] = (x.mT @ x, x.shape[1])
            halve(type("Reading", (), {"layers": {name: layer}}))
    return found


def assert_same_statistics(ours, theirs):
    assert list(ours) == list(theirs) or sorted(ours) == sorted(theirs)
    for name, (value, rows) in theirs.items():
        assert ours[name][1] == rows, name
        torch.testing.assert_close(
            ours[name][0].double(), value, rtol=1e-4, atol=1e-4 * float(value.abs().max()), msg=name
        )


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_equal_those_of_full_passes_with_earlier_blocks_compressed(kind):
    model, run = build(kind)
    ours, notes = statistics_of_walk(model, run, batches_of(kind))
    reference, run = build(kind)
    theirs = statistics_of_full_passes(reference, run, batches_of(kind), find_blocks(reference))
    assert_same_statistics(ours, theirs)
    assert notes == []
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    dense, run = build(kind)
    last = list(find_blocks(dense))[-1]
    early, _ = statistics_of_walk(dense, run, batches_of(kind), blocks={last: find_blocks(dense)[last]})
    name = next(n for n in theirs if n.startswith(last))
    assert not torch.allclose(early[name][0], ours[name][0], rtol=1e-2)  # it does matter what came before


class Chain(nn.Module):
    """Blocks whose wiring a subclass spoils."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inlet = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x):
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x)
        return x


class SkipAround(Chain):
    def forward(self, x):
        x = self.inlet(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class WriteBetween(Chain):
    def forward(self, x):
        x = self.inlet(x)
        for block in self.blocks:
            x = block(x)
            x.mul_(0.5)
        return x


class OneTwice(Chain):
    def forward(self, x):
        x = self.inlet(x)
        for block in (self.blocks[0], self.blocks[1], self.blocks[0], self.blocks[2]):
            x = block(x)
        return x


class OtherOrder(Chain):
    def forward(self, x):
        x = self.inlet(x)
        for i in (1, 0, 2):
            x = self.blocks[i](x)
        return x


class InPlace(Block):
    """Writes to its own input."""

    def forward(self, x):
        return super().forward(F.leaky_relu_(x, 0.5))


class WriteInside(Chain):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([InPlace() for _ in range(3)])


class TwoStreams(Block):
    """Gets the hidden state and a result that an earlier block computed from it."""

    def forward(self, x, other):
        return super().forward(x + other)


class DependentArgument(Chain):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([TwoStreams() for _ in range(3)])

    def forward(self, x):
        x = other = self.inlet(x)
        for block in self.blocks:
            x, other = block(x, other), x.tanh()
        return x


class Remembering(Block):
    """Appends its inputs to a memory that the caller passes, and depends on how many there are."""

    def forward(self, x, memory):
        memory.seen.append(x)
        return super().forward(x + len(memory.seen))


class Memory:
    def __init__(self):
        self.seen = []


class SharedMemory(Chain):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Remembering() for _ in range(3)])

    def forward(self, x):
        x, memory = self.inlet(x), Memory()
        for block in self.blocks:
            x = block(x, memory)
        return x


@pytest.mark.parametrize(
    "network", [SkipAround, WriteBetween, OneTwice, OtherOrder, WriteInside, DependentArgument, SharedMemory]
)
def test_blocks_that_do_not_simply_feed_one_another_are_calibrated_as_one(network):
    batches = [torch.randn(5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    model = network()
    ours, notes = statistics_of_walk(model, model, batches)
    assert notes == ["the blocks do not feed one another directly: calibrated as one block"]
    reference = network()
    everything = {"": reference}
    layers = find_layers(reference, None, None, find_blocks(reference))
    theirs = statistics_of_full_passes(reference, reference, batches, everything)
    assert_same_statistics(ours, {name: theirs[name] for name in layers})


class OwnArguments(Chain):
    """Each block gets a mask of its own, which no other block made."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([TwoStreams() for _ in range(3)])

    def forward(self, x):
        x, origin = self.inlet(x), x
        for i, block in enumerate(self.blocks):
            x = block(x, other=(origin * i).sin())
        return x


@pytest.mark.parametrize("network", [Chain, OwnArguments])
def test_blocks_in_a_chain_are_calibrated_one_by_one(network):
    batches = [torch.randn(5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    model, reference = network(), network()
    ours, notes = statistics_of_walk(model, model, batches)
    assert notes == []
    assert_same_statistics(ours, statistics_of_full_passes(reference, reference, batches, find_blocks(reference)))


def test_layers_outside_the_blocks_are_calibrated_when_they_are_targeted():
    model = CausalLM(LLAMA)
    walk, seen = walk_of(model, lambda b: model(b), batches_of("llama")), []
    walk.over(find_layers(model, ["lm_head", "q_proj"], None, walk.blocks), Hessian, lambda r: seen.extend(r.layers))
    assert seen == [*(f"model.model.layers.{i}.self_attn.q_proj" for i in (0, 1)), "model.lm_head"]


def readings_of(model, run, batches, kind=Hessian):
    walk, readings = walk_of(model, run, batches), []
    walk.over(find_layers(model, None, None, walk.blocks), kind, readings.append)
    return readings


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_layers_that_read_the_same_input_share_a_reading(kind):
    model, run = build(kind)
    first = readings_of(model, run, batches_of(kind))[:3]
    tails = [sorted(name.rsplit(".", 1)[-1] for name in reading.layers) for reading in first]
    assert tails[0] == ["k_proj", "q_proj", "v_proj"]
    assert tails[1] in (["o_proj"], ["out_proj"])
    assert tails[2] == (["gate_proj", "up_proj"] if kind == "llama" else ["fc1"])


def test_convolutions_of_different_geometry_do_not_share_a_reading():
    model, run = build("torchvision resnet")
    names = [sorted(r.layers) for r in readings_of(model, run, batches_of("torchvision resnet"))]
    assert ["layer2.0.conv1"] in names
    assert ["layer2.0.downsample.0"] in names


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "one by one": {"kernel_size": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "uneven": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (1, 2)},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "grouped": {"kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": "same"},
    "same, even kernel": {"kernel_size": (4, 3), "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular, same": {"kernel_size": 5, "padding": "same", "padding_mode": "circular", "dilation": 1},
    "replicate, strided": {"kernel_size": 3, "padding": (1, 2), "stride": 3, "padding_mode": "replicate"},
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_rows_times_the_weight_matrix_is_the_convolution(name, batched):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, bias=False, **CONVOLUTIONS[name])
    inputs = torch.randn((3, 4, 9, 11) if batched else (4, 9, 11))
    expected = layer(inputs).reshape(-1, 8, layer(inputs).shape[-2] * layer(inputs).shape[-1])  # [B, O, L]
    rows = input_rows(layer, inputs)
    matrices = [w for (w,) in row_groups(weight_matrix(layer), groups=groups_of(layer))]
    parts = [x @ w.T for x, w in zip(rows, matrices, strict=True)]
    found = torch.cat(parts, dim=1).view(expected.shape[0], -1, 8).mT
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_stopping_a_pass_early_does_not_change_the_statistics():
    batches = batches_of("vit")
    model, run = build("vit")
    together, _ = statistics_of_walk(model, run, batches)
    calls = []
    model, run = build("vit")
    for layer in find_layers(model, None, None, find_blocks(model)).values():
        layer.register_forward_hook(lambda *_: calls.append(1))
    one_by_one = {}
    walk = walk_of(model, run, batches)

    def compress(reading):
        for name in reading.layers:
            one_by_one[name] = (reading.statistic.value().clone(), int(reading.statistic.rows))
        halve(reading)

    walk.over(find_layers(model, None, None, walk.blocks), Hessian, compress)
    assert_same_statistics(one_by_one, {n: (v.double(), r) for n, (v, r) in together.items()})
    layers, passes = 4, len(batches)
    replayed = passes * layers  # the last block is only collected, the first also passed on
    full, stopped = 1, passes - 1
    collected = full * layers + stopped * (layers - 1)
    probes = 2 * 2 * layers  # both blocks: how they follow one another, and whether a call has a token mask
    assert len(calls) == probes + 2 * collected + replayed


class Died(Exception):
    pass


def state_of(model):
    return {
        "modes": [m.training for m in model.modules()],
        "hooks": [
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_with_kwargs)
            for m in model.modules()
        ],
        "gradients": [p.requires_grad for p in model.parameters()],
        "dtypes": [p.dtype for p in model.parameters()],
        "caches": [getattr(getattr(m, "config", None), "use_cache", None) for m in model.modules()],
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("kind", ["llama with a cache", "vit", "torchvision resnet"])
@pytest.mark.parametrize("dies_at", [None, 1, 4])
def test_everything_is_put_back_even_when_the_stage_raises(kind, dies_at):
    model, run = build(kind)
    layers = list(find_layers(model, None, None, find_blocks(model)).values())
    layers[0].eval()
    layers[1].weight.requires_grad_(False)
    buffers = [b.clone() for b in model.buffers()]
    before, calls = state_of(model), []

    def compress(reading):
        torch.rand(3)
        calls.append(reading)
        if len(calls) == dies_at:
            raise Died

    walk = walk_of(model, run, batches_of(kind))
    with suppress(Died):
        walk.over(find_layers(model, None, None, walk.blocks), Hessian, compress)
    assert dies_at is None or len(calls) == dies_at
    assert state_of(model) == before
    assert torch.is_grad_enabled()
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))  # running statistics too


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_end_the_run_with_the_layer_named(tmp_path, bad):
    class Poisoned(Regressor):
        def forward(self, x):
            x = self.inlet(x)
            x = self.blocks[0](x)
            if not self.trainer.validating:
                x = x + bad
            return self.head(self.blocks[1](x))

    engine = trainer(tmp_path, SparseGPT(0.5))
    message = r"1 layer \(blocks.1.up\) cannot be calibrated: its calibration inputs hold NaN or infinite values"
    with pytest.raises(RecipeError, match=message):
        engine.fit(Poisoned(), regression_loader(), regression_loader(16))
    assert [record["name"] for record in read_records(tmp_path)] == ["dense"]


def test_a_layer_that_no_token_reaches_is_named():
    class Idle(Block):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(8, 8)

    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Idle(), Idle()))
    walk = walk_of(model, model, [torch.randn(4, 8)])
    with pytest.raises(RecipeError, match=r"calibration never reached 1 layer \(1.0.idle\).*add them to ignore"):
        walk.over(find_layers(model, None, None, walk.blocks), Hessian, lambda reading: None)
    walk.over(find_layers(model, None, ["idle"], walk.blocks), Hessian, lambda reading: None)


def test_a_layer_that_gets_no_rows_is_named():
    class Routed(Block):
        def forward(self, x):
            return x + self.down(torch.relu(self.up(x[:0]))).sum(0)

    model = nn.Sequential(Routed(), Routed())
    walk = walk_of(model, model, [torch.randn(4, 8)])
    with pytest.raises(RecipeError, match=r"calibration never reached 2 layers \(0.up, 0.down\)"):
        walk.over(find_layers(model, None, None, walk.blocks), Hessian, lambda reading: None)


class OnlyValidation(LightningModule):
    """A user's module with a ``validation_step`` and metrics, and nothing else that calibration could use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*[Block() for _ in range(2)])
        self.mse = MeanSquaredError()
        self.ever = MetricCollection({"mse": MeanSquaredError(), "rmse": MeanSquaredError(squared=False)})
        self.steps = 0

    def validation_step(self, batch, batch_idx):
        prediction = self.net(batch[0])[:, :2].contiguous()
        self.mse.update(prediction, batch[1])
        self.ever.update(prediction, batch[1])  # never reset, never logged
        self.log("mse", self.mse)
        self.log_dict({"largest": prediction.max()})


def test_calibration_with_a_validation_step_leaves_metrics_and_logs_alone(tmp_path):
    class Looking(GPTQ):
        def compress(self, model, context):
            before = {n: copy.deepcopy(m._copy_state_dict()) for n, m in metrics(model)}
            logged = dict(model.trainer.logged_metrics)
            plan = super().compress(model, context)
            for name, metric in metrics(model):
                assert {k: v.tolist() for k, v in metric._copy_state_dict().items()} == {
                    k: v.tolist() for k, v in before[name].items()
                }
            assert model.trainer.logged_metrics == logged
            assert "log" not in vars(model)
            return plan

    def metrics(model):
        return [(n, m) for n, m in model.named_modules() if hasattr(m, "_copy_state_dict")]

    module = OnlyValidation()
    loader = regression_loader(16, seed=1)
    trainer(tmp_path, Looking(4, epochs=0)).fit(module, regression_loader(24), loader)
    assert int(module.ever["mse"].total) == 2 * 2 * 16  # two evaluations of two targets each
    record = read_records(tmp_path)[-1]
    assert record["constraints_verified"]
    assert record["metrics"]["mse"] > 0


def test_calibration_takes_plain_dataloaders_in_their_batches_and_order(tmp_path):
    seen = []

    class Watching(Regressor):
        def calibration_step(self, batch, batch_idx):
            seen.append(batch[0])
            return self(batch[0])

    loader = regression_loader(24, batch_size=8, shuffle=True)
    trainer(tmp_path, Wanda(0.5)).fit(Watching(), loader, regression_loader(16))
    # the probes: of the layers and of the blocks, and after the first block's inputs of a token mask among the calls
    assert [len(batch) for batch in seen] == [1, 1, 8, 8, 8, 1]
    assert torch.equal(torch.cat(seen[2:5]), torch.stack([x for x, _ in loader.dataset]))


def test_calibration_needs_one_dataloader(tmp_path):
    loaders = {"a": regression_loader(), "b": regression_loader()}
    with pytest.raises(RecipeError, match="is several loaders, not one loader"):
        trainer(tmp_path, Wanda(0.5)).fit(Regressor(), loaders, regression_loader(16))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_calibration_runs_in_the_trainers_precision(tmp_path, precision):
    class Vision(LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = narrow_resnet()

        def validation_step(self, batch, batch_idx):
            logits = self.net(batch[0])
            assert logits.dtype is torch.bfloat16
            self.log("loss", F.cross_entropy(logits.float(), batch[1]))

    loader = DataLoader([(image, i % 4) for i, image in enumerate(images(count=8, size=32))], batch_size=4)
    module = Vision()
    trainer(tmp_path, SparseGPT(0.5), GPTQ(8), precision=precision).fit(module, loader, loader)
    assert module.net.layer1[0].conv1.weight.dtype is (torch.bfloat16 if "true" in precision else torch.float32)
    assert read_records(tmp_path)[-1]["sparsity"] >= 0.5


def test_calibration_sees_what_transfer_hooks_make_of_a_batch(tmp_path):
    seen = []

    class Normalizing(Regressor):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 0 + 7, batch[1]

        def calibration_step(self, batch, batch_idx):
            seen.append(batch[0])
            return self(batch[0])

    trainer(tmp_path, Wanda(0.5)).fit(Normalizing(), regression_loader(), regression_loader(16))
    assert len(seen) == 6
    assert all(bool((x == 7).all()) for x in seen)
