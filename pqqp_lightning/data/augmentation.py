"""Image transforms by the names that torchvision.transforms.v2 gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pqqp_lightning.errors import Problem, RecipeError, near_miss

Spec = str | dict[str, Any]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# These transforms take a batch, other transforms or a function: a name and plain arguments cannot describe them.
NOT_FOR_ONE_IMAGE = {"MixUp", "CutMix", "Compose", "RandomApply", "RandomChoice", "RandomOrder", "Lambda", "Transform"}


@dataclass(frozen=True)
class Preprocessing:
    """How images become a model's inputs, as a run keeps it: plain data.

    Attributes:
        channels: 3 for colour, 1 for grey.
        mean: per channel, for values in 0..1.
        std: as ``mean``.
        image_size: see :func:`build_pipeline`.
        transforms: of evaluation, see :func:`build_pipeline`.
        input_size: height and width of the inputs that the run evaluated; empty if unknown.
        classes: the names of the classes; empty if they have none.
    """

    channels: int
    mean: list[float]
    std: list[float]
    image_size: int | None = None
    transforms: list[Spec] = field(default_factory=list)
    input_size: list[int] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)

    def pipeline(self) -> nn.Module:
        """The module that turns a uint8 image [C, H, W] into an input [C, H, W]."""
        return build_pipeline(self.transforms, "evaluation_transforms", self.image_size, self.mean, self.std)


def build_pipeline(
    specs: Sequence[Spec], argument: str, image_size: int | None, mean: Sequence[float], std: Sequence[float]
) -> nn.Module:
    """Build the module that turns a uint8 image [C, H, W] into a normalised float image [C, H, W].

    It resizes and crops the image if ``image_size`` is given, applies ``specs`` in order, then normalises.

    Args:
        specs: each a transform's name, or ``{Name: {argument: value}}``.
        argument: the argument that holds ``specs``, for messages.
        image_size: pixels of the shorter side and of the square crop.
        mean: per channel, for values in 0..1.
        std: as ``mean``.

    Raises:
        RecipeError: with every spec that is unknown or that torchvision refuses.
    """
    from torchvision.transforms import v2

    steps: list[nn.Module] = []
    if image_size is not None:
        steps += [v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)]
    problems = []
    for position, spec in enumerate(specs):
        try:
            steps.append(_build_transform(spec, f"{argument}[{position}]"))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])


def normalization(
    channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, ImageNet's by default.

    One given number serves every channel. Without three channels, ImageNet's numbers are averaged over the colours.
    """
    return _per_channel(mean, IMAGENET_MEAN, channels), _per_channel(std, IMAGENET_STD, channels)


def _per_channel(given: Sequence[float] | None, default: Sequence[float], channels: int) -> list[float]:
    if given is None:
        return list(default) if channels == 3 else [sum(default) / 3] * channels
    return list(given) * channels if len(given) == 1 else list(given)


def _build_transform(spec: Spec, argument: str) -> nn.Module:
    from torchvision.transforms import v2

    name, arguments = _parse_spec(spec, argument)
    known = set()
    for key, value in vars(v2).items():
        if isinstance(value, type) and issubclass(value, nn.Module) and key not in NOT_FOR_ONE_IMAGE:
            known.add(key)
    if name not in known:
        # The list of all transforms would fill the screen.
        way_out = near_miss(name, known).strip() or "See torchvision.transforms.v2 for the list."
        raise RecipeError(Problem(argument, name, "is not a transform of single images", way_out).within("data"))
    try:
        return getattr(v2, name)(**arguments)
    except (TypeError, ValueError) as error:
        problem = Problem(argument, spec, f"is not accepted: {error}")
        raise RecipeError(problem.within("data")) from error


def _parse_spec(spec: Any, argument: str) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, dict) and len(spec) == 1:
        name, arguments = next(iter(spec.items()))
        if arguments is None or isinstance(arguments, dict):
            return str(name), dict(arguments or {})
    text = "is neither a name nor {Name: {argument: value}}"
    raise RecipeError(Problem(argument, spec, text).within("data"))
