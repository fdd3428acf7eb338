"""Image classifiers by name and of one's own: structure, weights, metrics, and every refusal."""

import json
import subprocess
import sys
import types

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from pqqp_lightning.errors import RecipeError
from pqqp_lightning.models import ImageClassifier

SMALL = {"model": "timm/test_resnet", "pretrained": False, "num_classes": 10}


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def images(size=32, channels=3):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def quiet_trainer(**options):
    silent = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", **silent, **options)


@pytest.mark.parametrize(
    ("arguments", "library", "size"),
    [
        ({"model": "resnet18", "num_classes": 10, "image_size": 64}, "timm", 64),
        ({"model": "resnet18", "in_channels": 1}, "timm", 32),
        ({"model": "torchvision/resnet18", "num_classes": 10, "image_size": 64}, "torchvision", 64),
        ({"model": "torchvision/vit_b_16", "num_classes": 5, "image_size": 32}, "torchvision", 32),
        ({"model": "vgg11", "num_classes": 3}, "timm", 32),
        ({"model": "deit_tiny_patch16_224", "num_classes": 4, "image_size": 32}, "timm", 32),
        ({"model": "test_vit", "num_classes": 4, "image_size": 32, "model_args": {"depth": 1}}, "timm", 32),
    ],
)
def test_a_skeleton_rebuilds_the_network(arguments, library, size):
    model = ImageClassifier(**arguments, pretrained=False).eval()
    skeleton = json.loads(json.dumps(model.skeleton()))
    assert skeleton["init_args"]["model"] == f"{library}/{arguments['model'].rpartition('/')[2]}"
    rebuilt = ImageClassifier(**skeleton["init_args"]).eval()
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    batch = images(size, arguments.get("in_channels", 3))
    assert torch.equal(model(batch), rebuilt(batch))
    assert model(batch).shape == (2, arguments.get("num_classes", 1000))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "resnet81"}, r"'resnet81' is not a network of timm or torchvision\. Did you mean 'resnet18'"),
        ({"model": "torchvision/resnet81"}, r"of torchvision\. Did you mean 'resnet18'"),
        ({"model": "no such thing"}, r"list_models\(\) of the library prints all names"),
        ({"model": "resnet18", "model_args": {"foo": 1}}, r"cannot be built \(.*'foo'.*Change num_classes.*model_args"),
        (
            {"model": "torchvision/resnet18", "in_channels": 1},
            r"in_channels=1 does not fit torchvision/resnet18, which takes 3\. Use a timm network",
        ),
        ({"model": "resnet18", "num_classes": 0, "in_channels": -1}, r"num_classes=0[^\n]*\n.*in_channels=-1"),
        ({"model": nn.Flatten()}, r"not state its number of classes.*Set num_classes"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(RecipeError, match=message):
        ImageClassifier(**{"pretrained": False, **arguments})


@pytest.mark.parametrize("arguments", [{"model": "resnet18"}, {"model": "resnet18.no_such_tag"}])
def test_pretrained_weights_that_cannot_be_had_name_the_ways_out(arguments):
    with pytest.raises(
        RecipeError, match=r"pretrained weights \(.*Set pretrained: false, give weights: FILE, or go on"
    ):
        ImageClassifier(**arguments)


def test_pretrained_torchvision_weights_need_the_network_too(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(RecipeError, match=r"\(no network in tests\)\. Set pretrained: false"):
        ImageClassifier("torchvision/resnet18")


def test_pretrained_torchvision_weights_keep_a_new_head(monkeypatch):
    published = ImageClassifier("torchvision/resnet18", pretrained=False).model.state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(published))
    model = ImageClassifier("torchvision/resnet18", num_classes=10).model
    assert torch.equal(model.conv1.weight, published["conv1.weight"])
    assert model.fc.out_features == 10


@pytest.mark.parametrize("kind", ["safetensors", "bare.safetensors", "ckpt", "pth"])
def test_weights_are_read_from_a_file_instead_of_the_hub(tmp_path, kind):
    model = ImageClassifier(**SMALL).eval()
    path = tmp_path / f"weights.{kind}"
    weights = {"safetensors": model, "bare.safetensors": model.model, "ckpt": model, "pth": model.model}[
        kind
    ].state_dict()
    if kind.endswith("safetensors"):
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights, "epoch": 3} if kind == "ckpt" else weights, path)
    loaded = ImageClassifier("test_resnet", num_classes=10, weights=str(path)).eval()
    assert torch.equal(loaded(images()), model(images()))
    assert loaded.skeleton()["init_args"]["weights"] is None


def test_weights_are_read_from_a_folder_of_this_project(tmp_path, monkeypatch):
    model = ImageClassifier(**SMALL).eval()
    reader = types.ModuleType("pqqp_lightning.checkpoint.load")
    reader.load_weights = lambda path: model.state_dict() if str(path) == str(tmp_path) else None
    monkeypatch.setitem(sys.modules, reader.__name__, reader)
    loaded = ImageClassifier("test_resnet", num_classes=10, weights=str(tmp_path)).eval()
    assert torch.equal(loaded(images()), model(images()))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    weights = ImageClassifier(**SMALL).state_dict()
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    with pytest.raises(
        RecipeError, match=r"do not fit this network: other shapes in .*\[10, .*but \[7, .*Check model, num_"
    ):
        ImageClassifier(**{**SMALL, "num_classes": 7}, weights=str(path))
    weights["model.extra"] = weights.pop(
        "model.conv1.0.weight" if "model.conv1.0.weight" in weights else next(iter(weights))
    )
    save_file(weights, path)
    with pytest.raises(RecipeError, match=r"missing 1 layer \(.*; unexpected 1 layer \(extra\)"):
        ImageClassifier(**SMALL, weights=str(path))


class Boom:
    def __reduce__(self):
        return subprocess.getoutput, ("echo boom",)


def test_weights_that_cannot_be_read_are_refused(tmp_path):
    for name, content in (("a.safetensors", b"junk"), ("a.ckpt", b"junk"), ("a.txt", b"")):
        (tmp_path / name).write_bytes(content)
    torch.save({"state_dict": Boom()}, tmp_path / "pickle.ckpt")
    torch.save({"epoch": 3}, tmp_path / "empty.ckpt")
    for name, message in {
        "nowhere.ckpt": r"does not exist \(looked at /",
        "a.safetensors": r"cannot be read \(.*Save it again",
        "a.ckpt": r"cannot be read",
        "pickle.ckpt": r"cannot be read \(",
        "a.txt": r"is not a checkpoint\. Give a folder, or a file: \.safetensors, \.ckpt",
        "empty.ckpt": r"does not contain a state_dict",
    }.items():
        with pytest.raises(RecipeError, match=message):
            ImageClassifier(**SMALL, weights=str(tmp_path / name))


def test_a_network_of_ones_own():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 6))
    model = ImageClassifier(network)
    assert model.model is network
    assert (model.num_classes, model.skeleton()) == (6, None)
    assert ImageClassifier(nn.Flatten(), num_classes=12).top5 is not None


@pytest.mark.parametrize("classes", [4, 10])
def test_evaluation_logs_accuracy_and_loss(classes):
    torch.manual_seed(0)
    model = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(12, classes)))
    examples = [(torch.randn(3, 2, 2), int(torch.randint(classes, ()))) for _ in range(50)]
    [metrics] = quiet_trainer().validate(model, DataLoader(examples, batch_size=16), verbose=False)
    logits = model(torch.stack([image for image, _ in examples])).detach()
    labels = torch.tensor([label for _, label in examples])
    assert metrics["top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert metrics["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert ("top5" in metrics) == (classes > 5)
    if classes > 5:
        hits = (logits.topk(5).indices == labels[:, None]).any(1)
        assert metrics["top5"] == pytest.approx(hits.float().mean().item())


def test_training_and_calibration_run():
    torch.manual_seed(0)
    model = ImageClassifier(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), optimizer=lambda p: torch.optim.SGD(p, lr=1.0)
    )
    examples = [(torch.randn(3, 2, 2), n % 3) for n in range(12)]
    batch = next(iter(DataLoader(examples, batch_size=12)))
    before = nn.functional.cross_entropy(model.calibration_step(batch, 0), batch[1])
    quiet_trainer(max_epochs=20).fit(model, DataLoader(examples, batch_size=12))
    assert nn.functional.cross_entropy(model(batch[0]), batch[1]) < before / 2


def test_data_with_more_classes_than_the_network_is_refused():
    class Data(LightningDataModule):
        num_classes = 100

        def val_dataloader(self):
            return DataLoader([(torch.randn(3, 2, 2), 99)])

    model = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 10)))
    with pytest.raises(
        RecipeError, match=r"num_classes=10 is fewer than the 100 classes of the data\. Set model\.num_classes"
    ):
        quiet_trainer().validate(model, Data(), verbose=False)
