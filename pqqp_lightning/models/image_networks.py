"""Image networks by name, from timm or torchvision, and weights for them from a file."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pqqp_lightning.errors import Problem, RecipeError, near_miss, shorten
from pqqp_lightning.models.transformers_bridge import third_party_errors

LIBRARIES = ("timm", "torchvision")
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")


def find_network(name: str) -> str:
    """``library/name`` of a network; timm first where both have it.

    Raises:
        RecipeError: neither library has it.
    """
    library, _, bare = name.partition("/")
    wanted, bare = ([library], bare) if library in LIBRARIES and bare else (list(LIBRARIES), name)
    known: list[str] = []
    for library in wanted:
        names = _list_networks(library)
        if bare.partition(".")[0] in names:  # timm's names may carry a tag of their weights: resnet18.a1_in1k
            return f"{library}/{bare}"
        known += names
    way_out = near_miss(bare, known).strip() or "Their list_models() lists what there is."
    text = f"is not a network of {' or '.join(wanted)}"
    raise RecipeError(Problem("model", name, text, way_out).within("model"))


def build_network(
    name: str, pretrained: bool, num_classes: int | None, in_channels: int, image_size: int | None, options: dict
) -> nn.Module:
    """The network ``library/name``, with the number of classes, channels and the image size asked for."""
    library, _, bare = name.partition("/")
    build = _build_timm if library == "timm" else _build_torchvision
    argument = "img_size" if library == "timm" else "image_size"
    if image_size is None:
        return build(bare, pretrained, num_classes, in_channels, options)
    try:
        return build(bare, pretrained, num_classes, in_channels, {argument: image_size, **options})
    except RecipeError as error:
        if isinstance(error.__cause__, TypeError) and argument in str(error.__cause__):
            return build(bare, pretrained, num_classes, in_channels, options)  # takes images of any size
        raise


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint folder of this project, a safetensors file or a Lightning or plain checkpoint."""
    file = Path(path).expanduser()
    if not file.exists():
        raise RecipeError(_of_weights(path, f"does not exist (looked at {file.absolute()})"))
    if file.is_file() and file.suffix not in SUFFIXES:
        way_out = f"Give a folder, or a file: {', '.join(SUFFIXES)}."
        raise RecipeError(_of_weights(path, "is not a checkpoint", way_out))
    if file.is_dir():
        from pqqp_lightning.checkpoint.load import load_weights

        return load_weights(file)
    with third_party_errors(_of_weights(path, "cannot be read", "Save it again, or name another file.")):
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        way_out = "Give a Lightning .ckpt or a .safetensors file."
        raise RecipeError(_of_weights(path, "does not contain a state_dict", way_out))
    return weights


def _of_weights(path: str, text: str, way_out: str = "") -> Problem:
    return Problem("weights", path, text, way_out).within("model")


def load_into(network: nn.Module, weights: dict[str, Tensor], path: str) -> None:
    """Every weight of the network from ``weights``, of which none may be left over."""
    wanted = network.state_dict()
    if not wanted.keys() & weights.keys():  # those of a LightningModule
        weights = {name.removeprefix("model."): value for name, value in weights.items()}
    shapes = [
        f"{name} ({list(weights[name].shape)}, but {list(value.shape)} wanted)"
        for name, value in wanted.items()
        if name in weights and weights[name].shape != value.shape
    ]
    faults = {"missing": wanted.keys() - weights.keys(), "unexpected": weights.keys() - wanted.keys()}
    found = [f"{kind} {shorten(sorted(names))}" for kind, names in faults.items() if names]
    found += [f"other shapes in {shorten(shapes)}"] if shapes else []
    if found:
        way_out = "Check model, num_classes, in_channels, image_size and model_args."
        raise RecipeError(_of_weights(path, f"do not fit this network: {'; '.join(found)}", way_out))
    network.load_state_dict(weights)


def count_classes(network: nn.Module) -> int:
    """How many classes a network tells apart, from what it says or from its last linear layer."""
    said = getattr(network, "num_classes", None)
    if isinstance(said, int) and said > 0:
        return said
    heads = [layer.out_features for layer in network.modules() if isinstance(layer, nn.Linear)]
    if not heads:
        text = "is not set, and the network does not tell how many classes it has"
        raise RecipeError(Problem("num_classes", text=text, way_out="Set num_classes.").within("model"))
    return heads[-1]


def _list_networks(library: str) -> list[str]:
    if library == "timm":
        import timm

        return timm.list_models()
    from torchvision import models

    return models.list_models(module=models)


def _build_timm(name: str, pretrained: bool, num_classes: int | None, in_channels: int, options: dict) -> nn.Module:
    import timm

    classes: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    with _worded(f"timm/{name}", pretrained):
        return timm.create_model(name, pretrained=pretrained, in_chans=in_channels, **classes, **options)


def _build_torchvision(
    name: str, pretrained: bool, num_classes: int | None, in_channels: int, options: dict
) -> nn.Module:
    from torchvision import models

    if in_channels != 3:
        text = f"does not fit torchvision/{name}, which takes 3"
        problem = Problem("in_channels", in_channels, text, "Use a timm network, or 3 channels.")
        raise RecipeError(problem.within("model"))
    classes: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    with _worded(f"torchvision/{name}", pretrained):
        network = models.get_model(name, weights=None, **classes, **options)
        if pretrained:
            weights = models.get_model_weights(name)["DEFAULT"].get_state_dict(progress=False, check_hash=True)
            _load_all_but_head(network, weights)
    return network


def _load_all_but_head(network: nn.Module, weights: dict[str, Any]) -> None:
    """Pretrained weights, except for a classifier that was asked for with another number of classes."""
    wanted = network.state_dict()
    kept = {name: value for name, value in weights.items() if name in wanted and wanted[name].shape == value.shape}
    head = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
    left = [name for name in wanted if name not in kept and not name.startswith(f"{head}.")]
    if left:
        text = f"loads weights that do not fit {shorten(left)}"
        raise RecipeError(Problem("pretrained", True, text, "Set pretrained: false.").within("model"))
    network.load_state_dict(kept, strict=False)


def _worded(name: str, pretrained: bool) -> AbstractContextManager[None]:
    way_out = "Change num_classes, in_channels, image_size or model_args."
    if not pretrained:
        return third_party_errors(Problem("model", name, "cannot be built", way_out).within("model"))
    ways_out = f"Set pretrained: false, give weights: FILE, or go online with HF_HUB_OFFLINE unset. {way_out}"
    text = "cannot be loaded with pretrained weights"
    return third_party_errors(Problem("model", name, text, ways_out).within("model"))
