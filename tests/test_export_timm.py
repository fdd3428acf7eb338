"""--to timm and --to torchvision: a network that the library builds by name."""

import json
import shutil

import pytest
import tiny
import torch
from exports import checks_here, run_of  # noqa: F401  # a fixture

import pqqp_lightning.callbacks as c
from pqqp_lightning import load
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.export.export_run import export_run
from pqqp_lightning.models import ImageClassifier

timm = pytest.importorskip("timm")


@pytest.mark.parametrize("kind", ["resnet", "deit"])
def test_timm_loads_the_folder_by_itself(kind, tmp_path, checks_here):  # noqa: F811
    done = export_run(run_of("rtn4-rows", kind), to="timm", out=tmp_path / "a model")
    assert done.agreement.largest_difference < 1e-5
    own = load(run_of("rtn4-rows", kind)).model
    model = timm.create_model(f"local-dir:{tmp_path / 'a model'}", pretrained=True).eval()
    for name, tensor in own.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    config = json.loads((tmp_path / "a model" / "config.json").read_text())
    assert config["num_classes"] == 10
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["pretrained_cfg"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert any("holds no codes" in remark for remark in done.remarks)


def test_weights_are_rounded_once_to_the_dtype(tmp_path, checks_here):  # noqa: F811
    done = export_run(run_of("sparse", "resnet"), to="timm", out=tmp_path / "model", dtype="float16")
    assert 0 < done.agreement.relative_difference < 1e-2


@pytest.mark.parametrize(("name", "kind"), [("narrow-channels", "resnet"), ("channels", "deit")])
def test_zeros_in_place_of_removed_channels_and_heads_change_nothing(name, kind, tmp_path, checks_here):  # noqa: F811
    with pytest.raises(RecipeError, match=r"other widths than the library's network.*Set --pad true"):
        export_run(run_of(name, kind), to="timm", out=tmp_path / "model")
    done = export_run(run_of(name, kind), to="timm", out=tmp_path / "model", pad=True)
    assert done.agreement.relative_difference < 1e-5
    assert any("Zeros fill what was removed" in remark for remark in done.remarks)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("basis", "deit", "has a structure that the library does not build"),
        ("rounded", "deit", "round their inputs while the model runs"),
        ("rtn8", "convolutions", "whose network was not built by timm"),
    ],
)
def test_another_structure_is_refused_with_the_way_out(name, kind, message, tmp_path):
    with pytest.raises(RecipeError, match=rf"{message}.*--to onnx"):
        export_run(run_of(name, kind), to="timm", out=tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_earlier_run_folder_needs_an_example(tmp_path, checks_here):  # noqa: F811
    shutil.copytree(run_of("sparse", "resnet"), tmp_path / "run")
    (tmp_path / "run" / "inputs.safetensors").unlink()
    (tmp_path / "run" / "model" / "probe.safetensors").unlink()
    with pytest.raises(RecipeError, match="keeps no samples of its inputs"):
        export_run(tmp_path / "run", to="timm", out=tmp_path / "model")
    done = export_run(tmp_path / "run", to="timm", out=tmp_path / "model", example="3x32x32")
    assert any("does not say how its images are normalised" in remark for remark in done.remarks)


def test_torchvision_builds_its_own_networks(tmp_path, checks_here):  # noqa: F811
    torch.manual_seed(0)
    module = ImageClassifier("torchvision/squeezenet1_1", pretrained=False, num_classes=10)
    tiny.trainer(tmp_path / "run", c.RTN(8)).fit(module, datamodule=tiny.make_data("resnet", tmp_path))
    with pytest.raises(RecipeError, match=r"holds a network of torchvision\. Use --to torchvision"):
        export_run(tmp_path / "run", to="timm", out=tmp_path / "model")
    done = export_run(tmp_path / "run", to="torchvision", out=tmp_path / "model")
    assert done.agreement.largest_difference < 1e-5
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["architecture"], config["model_args"]["num_classes"]) == ("squeezenet1_1", 10)
