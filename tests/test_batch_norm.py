"""BatchNorm statistics are estimated again after a stage: exactly, over any batches, and only where it makes sense."""

import copy

import pytest
import timm
import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from timm.layers import BatchNormAct2d
from tiny import Regressor, blamed, make_data, make_model, regression_loader, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from pqqp_lightning import load
from pqqp_lightning.calibration.batch_norm import batch_norms, recalibrate_batch_norms
from pqqp_lightning.calibration.walk import Walk
from pqqp_lightning.callbacks.channel_pruning import ChannelPruning
from pqqp_lightning.callbacks.finetune import Finetune
from pqqp_lightning.callbacks.gptq import GPTQ
from pqqp_lightning.callbacks.gradual_pruning import GradualPruning
from pqqp_lightning.callbacks.lora import LoRA
from pqqp_lightning.callbacks.magnitude import Magnitude
from pqqp_lightning.callbacks.qat import QAT
from pqqp_lightning.callbacks.qlora import QLoRA
from pqqp_lightning.callbacks.quarot import QuaRot
from pqqp_lightning.callbacks.rtn import RTN
from pqqp_lightning.callbacks.sparsegpt import SparseGPT
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.blocks import find_blocks
from pqqp_lightning.storage.records import read_records


class Network(LightningModule):
    """A user's convolutional network with three kinds of BatchNorm, the last one after a layer without positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), BatchNormAct2d(8)
        )
        self.head = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))
        self.mse = MeanSquaredError()

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.mse(self(batch[0]), batch[1])
        self.log("mse", self.mse, on_step=False, on_epoch=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def images(count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(count, 3, 6, 6, generator=generator) + torch.randn(count, 3, 1, 1, generator=generator) + 1


def loader(count=12, seed=0, batch_size=5):
    x = images(count, seed)
    return DataLoader(TensorDataset(x, x.mean((2, 3))[:, :2]), batch_size=batch_size)


def walk_of(model, batches, blocks=None):
    return Walk(model, blocks or {"": model}, list(batches), batches[0][:1], model, progress=False)


def statistics(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name}


def slow_statistics(model, name, samples):
    """Mean and unbiased variance of each channel of a module's inputs, from samples that run one by one."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for sample in samples:
            model.eval()(sample[None])
    handle.remove()
    means, variances = [], []
    for channel in range(seen[0].shape[1]):
        values = [value for inputs in seen for value in inputs[:, channel].flatten().tolist()]
        mean = sum(values) / len(values)
        means.append(mean)
        variances.append(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return torch.tensor(means), torch.tensor(variances)


@pytest.mark.parametrize("sizes", [[12], [7, 4, 1]], ids=["one batch", "unequal batches"])
def test_statistics_are_those_of_a_slow_loop(sizes):
    model, samples = Network(), images()
    assert recalibrate_batch_norms(walk_of(model, samples.split(sizes))).values()  # 12 values of the BatchNorm1d
    assert list(batch_norms(model)) == ["features.1", "features.4", "head.1"]
    for name, norm in batch_norms(model).items():  # each on what the new statistics of the earlier ones let through
        mean, variance = slow_statistics(model, name, samples)
        assert torch.allclose(norm.running_mean, mean, atol=1e-6), name
        assert torch.allclose(norm.running_var, variance, rtol=1e-5), name


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_block_by_block_gives_what_whole_passes_give(name):
    small = {"stem_width": 8, "channels": (8, 16, 16, 16)} if name == "resnet18" else {"num_classes": 3}
    torch.manual_seed(0)
    whole = timm.create_model(name, **small)
    blockwise = copy.deepcopy(whole)
    batches = torch.randn(6, 3, 32, 32).split(4)
    recalibrate_batch_norms(walk_of(blockwise, batches, find_blocks(blockwise)))
    recalibrate_batch_norms(walk_of(whole, batches))
    for name, value in statistics(whole).items():
        assert torch.equal(value, blockwise.state_dict()[name]), name


def test_one_pass_in_training_mode_with_all_samples_in_a_batch_agrees():
    """PyTorch's own way, where it is exact: it normalizes with the biased variance, we with the one that it stores."""
    ours, theirs = Network(), Network()
    recalibrate_batch_norms(walk_of(ours, [images(400)]))
    for norm in batch_norms(theirs).values():
        norm.momentum = 1.0
        norm.train()
    theirs.head[3].eval()
    theirs(images(400))
    for name, value in statistics(ours).items():
        assert torch.allclose(value, theirs.state_dict()[name], rtol=5e-3, atol=5e-3), name


def test_volumes_and_a_layer_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm3d(2)

        def forward(self, pair):
            return self.norm(pair[:, 0]) - self.norm(pair[:, 1])

    model, pairs = Twice(), torch.randn(4, 2, 2, 3, 3, 3)
    assert recalibrate_batch_norms(walk_of(model, pairs.split([3, 1]))) == {}
    values = pairs.transpose(0, 2).flatten(1)  # [C, everything else]
    assert torch.allclose(model.norm.running_mean, values.mean(1), atol=1e-6)
    assert torch.allclose(model.norm.running_var, values.var(1), rtol=1e-5)


def test_modes_random_state_and_everything_else_stay():
    model = Network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    recalibrate_batch_norms(walk_of(model, [images()]))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == ("running" not in name), name


def test_what_cannot_be_estimated_is_kept_and_said():
    class Unusual(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.single, self.unused = nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x):
            return self.single(self.norm(x).mean(2).sum(0, keepdim=True))

    model = Unusual()
    values = torch.randn(1, 2, 100)
    values[:, 1] = 3.0  # a channel without variance
    found = recalibrate_batch_norms(walk_of(model, [values]))
    assert sorted(found.values()) == [["single"], ["unused"]]
    assert model.norm.running_mean.tolist() == pytest.approx([float(values[:, 0].mean()), 3.0])
    assert model.norm.running_var.tolist() == pytest.approx([float(values[:, 0].var()), 1.0])
    assert torch.equal(model.single.running_mean, torch.zeros(2))
    values[0, 0, 0] = float("nan")
    before = statistics(model)
    found = recalibrate_batch_norms(walk_of(model, [values]))
    assert any("NaN" in what and "norm" in layers for what, layers in found.items())
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())


def fit(folder, *stages, train=True, ckpt_path=None):
    module = Network()
    engine = trainer(folder, *stages, num_sanity_val_steps=0)
    engine.fit(module, loader() if train else None, loader(seed=1), ckpt_path=ckpt_path)
    return module, read_records(folder)


def test_a_stage_estimates_them_before_it_is_measured(tmp_path):
    """After pruning, without data for itself; the next stage sees the new ones; the checkpoint has them."""
    module, records = fit(tmp_path / "new", Magnitude(0.5, targets=["features.*"]))
    assert any("3 layers estimated again" in note for note in records[1]["notes"])
    for name, norm in batch_norms(module).items():
        mean, variance = slow_statistics(module, name, images())
        assert torch.allclose(norm.running_mean, mean, atol=1e-6)
        assert torch.allclose(norm.running_var, variance, rtol=1e-5)
    loaded = load(tmp_path / "new", Network())
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.state_dict().items())
    kept, old_records = fit(tmp_path / "old", Magnitude(0.5, targets=["features.*"], batch_norm="keep"))
    assert all(torch.equal(value, statistics(Network())[name]) for name, value in statistics(kept).items())
    assert all(torch.equal(value, dict(kept.named_parameters())[name]) for name, value in module.named_parameters())
    assert not any("BatchNorm" in note for note in old_records[1]["notes"])
    assert records[1]["options"]["batch_norm"] == "recalibrate"
    assert records[1]["metrics"] != old_records[1]["metrics"]
    both, _ = fit(tmp_path / "both", Magnitude(0.5, targets=["features.*"]), GPTQ(4, targets=["features.3"]))
    other, _ = fit(
        tmp_path / "other",
        Magnitude(0.5, targets=["features.*"], batch_norm="keep"),
        GPTQ(4, targets=["features.3"]),
    )
    assert not torch.equal(both.features[3].weight, other.features[3].weight)  # its inputs have other scales


def test_without_calibration_data_they_are_kept_and_the_record_says_so(tmp_path):
    module, records = fit(tmp_path / "run", RTN(4, targets=["features.*"]), train=False)
    assert records[1]["notes"] == ["BatchNorm statistics kept: there is no calibration data"]
    assert all(torch.equal(value, statistics(Network())[name]) for name, value in statistics(module).items())


def test_training_data_that_cannot_be_drawn_from_does_not_stop_a_stage_that_needs_none(tmp_path):
    engine = trainer(tmp_path / "run", RTN(4, targets=["features.*"]))
    engine.fit(Network(), {"a": loader(), "b": loader()}, loader(seed=1))
    notes = read_records(tmp_path / "run")[1]["notes"]
    assert any(note.startswith("BatchNorm statistics kept:") and "several loaders" in note for note in notes)


def test_a_text_model_has_no_such_step(tmp_path):
    engine = trainer(tmp_path / "run", RTN(4))
    engine.fit(make_model("llama"), datamodule=make_data("llama", tmp_path))
    assert read_records(tmp_path / "run")[1]["notes"] == []


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (Magnitude(0.5), True),
        (ChannelPruning(0.5, epochs=1), True),
        (QAT(4), True),
        (QLoRA(), True),
        (GradualPruning(0.5, initial_sparsity=0.2), True),
        (GradualPruning(0.5), False),
        (LoRA(), False),
        (Finetune(1), False),
        (QuaRot(), False),
        (Magnitude(0.5, batch_norm="keep"), False),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_only_stages_that_change_what_the_network_computes_do(stage, expected):
    assert stage.recalibrates_batch_norm == expected


def test_another_word_is_refused():
    assert blamed(RecipeError(Magnitude(0.5, batch_norm="reset").check_arguments())) == [("batch_norm", "reset")]


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    stages = [Magnitude(0.5, targets=["features.*"], epochs=1), GPTQ(4, targets=["features.*"])]
    module, records = fit(tmp_path / "run", *stages)

    class KilledError(Exception):
        pass

    def die(*args, **kwargs):
        raise KilledError

    monkeypatch.setattr(GPTQ, "compress", die)
    with pytest.raises(KilledError):
        fit(tmp_path / "killed", *stages)
    monkeypatch.undo()
    resumed, again = fit(tmp_path / "killed", *stages, ckpt_path="last")
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in resumed.state_dict().items())
    assert [record["metrics"] for record in again] == [record["metrics"] for record in records]


def test_a_trained_network_keeps_more_of_its_accuracy():
    """What the step is for: digits, a small trained network, 70% of the weights pruned by magnitude."""
    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    images = images.float()[:, None].view(-1, 1, 8, 8) / 8 - 1
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for chosen in torch.randperm(1280).view(-1, 64).repeat(4, 1):
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()

    @torch.no_grad()
    def accuracy():
        return float((model.eval()(images[1280:]).argmax(1) == labels[1280:]).float().mean())

    dense = accuracy()
    for layer in layers[::3]:
        layer.weight.data[layer.weight.abs() < layer.weight.abs().flatten().quantile(0.7)] = 0
    kept = accuracy()
    recalibrate_batch_norms(walk_of(model, images[:128].split(50)))
    assert dense > 0.8
    assert accuracy() > kept + 0.1


def test_a_norm_without_running_statistics_does_not_stop_a_calibrated_stage(tmp_path):
    """It refuses the probe of one sample in evaluation mode too."""

    class Untracked(Regressor):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8, track_running_stats=False)

        def forward(self, x):
            return super().forward(self.norm(x))

    engine = trainer(tmp_path / "run", SparseGPT(0.5))
    engine.fit(Untracked(), regression_loader(), regression_loader(16, seed=1))
    assert read_records(tmp_path / "run")[1]["sparsity"] == 0.5
