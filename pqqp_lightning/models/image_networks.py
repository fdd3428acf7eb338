"""Builds image networks by name, from timm or torchvision, and reads weights for them from a file."""

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
    """Find a network; returns ``library/name``, timm's where both libraries have it.

    Raises:
        RecipeError: neither library has it.
    """
    prefix, _, bare = name.partition("/")
    libraries = [prefix]
    if prefix not in LIBRARIES or not bare:
        libraries = list(LIBRARIES)
        bare = name
    known: list[str] = []
    for library in libraries:
        names = _list_networks(library)
        if bare.partition(".")[0] in names:  # timm's names may carry a tag of their weights: resnet18.a1_in1k
            return f"{library}/{bare}"
        known += names
    # The list of all networks would fill the screen.
    way_out = near_miss(bare, known).strip() or "list_models() of the library prints all names."
    text = f"is not a network of {' or '.join(libraries)}"
    raise RecipeError(Problem("model", name, text, way_out).within("model"))


def build_network(
    name: str, pretrained: bool, num_classes: int | None, in_channels: int, image_size: int | None, options: dict
) -> nn.Module:
    """Build the network ``library/name``.

    Args:
        name: from :func:`find_network`.
        pretrained: download the published weights.
        num_classes: None keeps the network's own number.
        in_channels: channels of the images.
        image_size: pixels; ignored by networks that take any size.
        options: further arguments of the library's builder.

    Raises:
        RecipeError: the library refuses the arguments, or has no weights for them.
    """
    library, _, bare = name.partition("/")
    build = _build_timm if library == "timm" else _build_torchvision
    argument = "img_size" if library == "timm" else "image_size"
    if image_size is None:
        return build(bare, pretrained, num_classes, in_channels, options)
    try:
        return build(bare, pretrained, num_classes, in_channels, {argument: image_size, **options})
    except RecipeError as error:
        # Networks for any size (ResNet) do not know the argument. No list says which: the TypeError does.
        if isinstance(error.__cause__, TypeError) and argument in str(error.__cause__):
            return build(bare, pretrained, num_classes, in_channels, options)
        raise


def read_weights(path: str) -> dict[str, Tensor]:
    """Read the weights of a checkpoint folder of this project, a .safetensors file, or a torch or Lightning checkpoint.

    Raises:
        RecipeError: the file does not exist, cannot be read, or holds no weights.
    """
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
    weights = None
    if isinstance(content, dict):  # Lightning's checkpoints nest the weights, plain ones are the state dict
        weights = content.get("state_dict", content)
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        way_out = "Give a Lightning .ckpt or a .safetensors file."
        raise RecipeError(_of_weights(path, "does not contain a state_dict", way_out))
    return weights


def _of_weights(path: str, text: str, way_out: str = "") -> Problem:
    return Problem("weights", path, text, way_out).within("model")


def load_weights_into(network: nn.Module, weights: dict[str, Tensor], path: str) -> None:
    """Load ``weights`` into ``network``; names and shapes must match exactly.

    Raises:
        RecipeError: with the missing, unexpected and misshapen weights; ``path`` is named.
    """
    expected = network.state_dict()
    if not expected.keys() & weights.keys():  # a LightningModule holds its network as ``model``
        weights = {name.removeprefix("model."): value for name, value in weights.items()}
    missing = expected.keys() - weights.keys()
    unexpected = weights.keys() - expected.keys()
    misshapen = []
    for name, value in expected.items():
        if name in weights and weights[name].shape != value.shape:
            misshapen.append(f"{name} ({list(weights[name].shape)}, but {list(value.shape)} wanted)")
    faults = []
    if missing:
        faults.append(f"missing {shorten(sorted(missing))}")
    if unexpected:
        faults.append(f"unexpected {shorten(sorted(unexpected))}")
    if misshapen:
        faults.append(f"other shapes in {shorten(misshapen)}")
    if faults:
        way_out = "Check model, num_classes, in_channels, image_size and model_args."
        raise RecipeError(_of_weights(path, f"do not fit this network: {'; '.join(faults)}", way_out))
    network.load_state_dict(weights)


def count_classes(network: nn.Module) -> int:
    """The network's number of classes: its ``num_classes``, else the width of its last linear layer.

    Raises:
        RecipeError: the network has neither.
    """
    stated = getattr(network, "num_classes", None)
    if isinstance(stated, int) and stated > 0:  # timm uses 0 for a network without a classifier
        return stated
    widths = [layer.out_features for layer in network.modules() if isinstance(layer, nn.Linear)]
    if not widths:
        text = "is not set, and the network does not state its number of classes"
        raise RecipeError(Problem("num_classes", text=text, way_out="Set num_classes.").within("model"))
    return widths[-1]


def _list_networks(library: str) -> list[str]:
    if library == "timm":
        import timm

        return timm.list_models()
    from torchvision import models

    return models.list_models(module=models)


def _build_timm(name: str, pretrained: bool, num_classes: int | None, in_channels: int, options: dict) -> nn.Module:
    import timm

    classes: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    with _build_errors(f"timm/{name}", pretrained):
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
    with _build_errors(f"torchvision/{name}", pretrained):
        network = models.get_model(name, weights=None, **classes, **options)
        if pretrained:
            weights = models.get_model_weights(name)["DEFAULT"].get_state_dict(progress=False, check_hash=True)
            _load_all_but_head(network, weights)
    return network


def _load_all_but_head(network: nn.Module, weights: dict[str, Any]) -> None:
    """Load pretrained weights, except into a classifier with another number of classes."""
    expected = network.state_dict()
    fitting = {}
    for name, value in weights.items():
        if name in expected and expected[name].shape == value.shape:
            fitting[name] = value
    head = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
    uninitialised = [name for name in expected if name not in fitting and not name.startswith(f"{head}.")]
    if uninitialised:
        text = f"loads weights that do not fit {shorten(uninitialised)}"
        raise RecipeError(Problem("pretrained", True, text, "Set pretrained: false.").within("model"))
    network.load_state_dict(fitting, strict=False)


def _build_errors(name: str, pretrained: bool) -> AbstractContextManager[None]:
    way_out = "Change num_classes, in_channels, image_size or model_args."
    if not pretrained:
        return third_party_errors(Problem("model", name, "cannot be built", way_out).within("model"))
    ways_out = f"Set pretrained: false, give weights: FILE, or go online with HF_HUB_OFFLINE unset. {way_out}"
    text = "cannot be loaded with pretrained weights"
    return third_party_errors(Problem("model", name, text, ways_out).within("model"))
