"""Image transforms by the names that torchvision.transforms.v2 gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pqqp_lightning.errors import Problem, RecipeError, near_miss

Spec = str | dict[str, Any]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NOT_FOR_ONE_IMAGE = {"MixUp", "CutMix", "Compose", "RandomApply", "RandomChoice", "RandomOrder", "Lambda", "Transform"}


def build_pipeline(
    specs: Sequence[Spec], knob: str, image_size: int | None, mean: Sequence[float], std: Sequence[float]
) -> nn.Module:
    """uint8 [C, H, W] to float [C, H, W]: resized if a size is given, then ``specs`` in order, then normalised.

    Raises:
        RecipeError: every spec that is unknown or that torchvision refuses.
    """
    from torchvision.transforms import v2

    steps: list[nn.Module] = []
    if image_size is not None:
        steps += [v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)]
    problems = []
    for position, spec in enumerate(specs):
        try:
            steps.append(_build(spec, f"{knob}[{position}]"))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])


def normalization(
    channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """Mean and deviation per channel; ImageNet's by default, averaged for any but three channels."""
    found = []
    for given, default in ((mean, IMAGENET[0]), (std, IMAGENET[1])):
        if given is not None:
            found.append(list(given) * (channels if len(given) == 1 else 1))
        else:
            found.append(list(default) if channels == 3 else [sum(default) / 3] * channels)
    return found[0], found[1]


def _build(spec: Spec, argument: str) -> nn.Module:
    from torchvision.transforms import v2

    name, arguments = _split(spec, argument)
    known = {
        key
        for key, value in vars(v2).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and key not in NOT_FOR_ONE_IMAGE
    }
    if name not in known:
        way_out = near_miss(name, known).strip() or "See torchvision.transforms.v2 for what there is."
        raise RecipeError(Problem(argument, name, "is not a transform of single images", way_out).within("data"))
    try:
        return getattr(v2, name)(**arguments)
    except (TypeError, ValueError) as error:
        problem = Problem(argument, spec, f"is not accepted: {error}")
        raise RecipeError(problem.within("data")) from error


def _split(spec: Any, argument: str) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, dict) and len(spec) == 1:
        name, arguments = next(iter(spec.items()))
        if arguments is None or isinstance(arguments, dict):
            return str(name), dict(arguments or {})
    text = "is neither a name nor {Name: {argument: value}}"
    raise RecipeError(Problem(argument, spec, text).within("data"))
