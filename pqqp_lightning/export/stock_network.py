"""A run's image network as the one that its library builds by name: timm's or torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pqqp_lightning.errors import Problem, RecipeError, shorten
from pqqp_lightning.export.network import ExportedNetwork, network_of_run, refuse_language_model
from pqqp_lightning.export.samples import samples_of
from pqqp_lightning.export.source import FinishedRun
from pqqp_lightning.export.target import DType

PREFIX = "model."
"""Of the network's tensors in ImageClassifier."""
AGREES: dict[DType, float] = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest accepted difference of the outputs, relative to their norm, by dtype."""
OTHERWISE = "Use --to onnx, which writes any structure."


@dataclass(frozen=True)
class StockNetwork(ExportedNetwork):
    """A network of timm or torchvision.

    Attributes:
        name: of the architecture.
        arguments: which the library's builder gets besides the name.
        reference: built by the library, with the run's weights.
        blocked: why the library could not build it.
    """

    name: str = ""
    arguments: dict[str, Any] | None = None
    reference: nn.Module | None = None
    blocked: tuple[Problem, ...] = ()

    def stored(self) -> dict[str, Tensor]:
        assert self.reference is not None
        return dict(self.reference.state_dict())

    @property
    def problems(self) -> list[Problem]:
        return [*super().problems, *self.blocked]

    @property
    def described(self) -> str:
        return f"a {self.name}"


def stock_network(
    run: FinishedRun,
    library: str,
    build: Callable[[str, dict[str, Any]], nn.Module],
    *,
    example: str | None,
    dtype: DType,
    widen: bool,
    pad: bool,
) -> StockNetwork:
    """The run's network as ``library`` builds it.

    Args:
        run: of an ImageClassifier.
        library: "timm" or "torchvision".
        build: makes the network from its name and arguments.
        example: for a run that keeps no samples: the shape of an image, or a .npy file.
        dtype: of the written weights.
        widen: as for every target.
        pad: whether zeros may take the place of channels and heads that were removed.

    Raises:
        RecipeError: it is another library's network, or none.
    """
    refuse_language_model(run, library)
    name, arguments = _builder_arguments(run, library)
    model = network_of_run(run, samples_of(run, example), dtype=dtype, widen=widen, largest_relative=AGREES[dtype])
    network: Any = run.module.model
    reference = build(name, arguments)
    blocked, changes = _fit(network, reference, model, pad)
    if model.coded:
        changes.append(f"Quantized weights are written as {dtype} values: this format holds no codes.")
    return StockNetwork(
        **{**vars(model), "changes": [*model.changes, *changes]},
        name=name,
        arguments=arguments,
        reference=reference,
        blocked=tuple(Problem("run", str(run.folder), text, way_out) for text, way_out in blocked),
    )


def _builder_arguments(run: FinishedRun, library: str) -> tuple[str, dict[str, Any]]:
    """The architecture's name, and what the builder gets besides."""
    given = run.skeleton
    path = given.get("model")
    found, _, name = path.partition("/") if isinstance(path, str) else ("", "", "")
    if found in ("timm", "torchvision") and found != library:
        text = f"holds a network of {found}"
        raise RecipeError(Problem("run", str(run.folder), text, f"Use --to {found}."))
    if found != library or not isinstance(getattr(run.module, "model", None), nn.Module):
        text = f"holds {type(run.module).__name__}, whose network was not built by {library}"
        raise RecipeError(Problem("run", str(run.folder), text, OTHERWISE))
    arguments = {"num_classes": given["num_classes"], **(given.get("model_args") or {})}
    if library == "timm":
        arguments["in_chans"] = given["in_channels"]
    if given.get("image_size") is not None:
        arguments["img_size" if library == "timm" else "image_size"] = given["image_size"]
    return name, arguments


def _fit(
    network: nn.Module, reference: nn.Module, model: ExportedNetwork, pad: bool
) -> tuple[list[tuple[str, str]], list[str]]:
    """Load the network's weights into ``reference``.

    Returns:
        What stands against it, with the way out; and what was changed.
    """
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    expected = dict(reference.state_dict())
    blocked: list[tuple[str, str]] = []
    if rounding := list(model.rounding_layers()):
        text = f"has {shorten(rounding)} that round their inputs while the model runs"
        return [(text, "Leave ActivationQuantization out, and run it again. Or use --to onnx.")], []
    if foreign := sorted(weights.keys() ^ expected.keys()):
        text = f"has a structure that the library does not build: {shorten(foreign, what='weight')}"
        return [(text, OTHERWISE)], []
    narrow = [name for name, tensor in weights.items() if tensor.shape != expected[name].shape]
    if not narrow:
        reference.load_state_dict(weights)
        if _computes_the_same(network, reference, model):
            return [], []
        return [("computes something else than the library's network with the same weights", OTHERWISE)], []
    padded = {name: _padded(name, tensor, expected[name].shape) for name, tensor in weights.items()}
    fits = all(tensor is not None for tensor in padded.values())
    if fits:
        reference.load_state_dict(padded)
        fits = _computes_the_same(network, reference, model)
    text = f"has layers of other widths than the library's network: {shorten(narrow, what='weight')}"
    if not fits:
        blocked.append((text, OTHERWISE))
    elif not pad:
        blocked.append((text, "Set --pad true: zeros take their place, which is exact, in the dense model's size."))
    return blocked, [f"Zeros fill what was removed from {shorten(narrow, what='weight')}."]


def _padded(name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
    """The tensor with zeros behind it in each dimension; None if it is larger than ``shape``.

    A fused projection of queries, keys and values has zeros behind each of the three. The variance of a new channel is
    1, so that BatchNorm computes 0 of its zeros.
    """
    if tensor.dim() != len(shape) or any(have > want for have, want in zip(tensor.shape, shape, strict=True)):
        return None
    if tensor.shape == shape:
        return tensor
    parts = 3 if "qkv" in name and shape[0] % 3 == 0 and tensor.shape[0] % 3 == 0 else 1
    filled = 1.0 if name.endswith("running_var") else 0.0
    wanted = (shape[0] // parts, *shape[1:])
    pieces = []
    for piece in tensor.chunk(parts):
        larger = tensor.new_full(wanted, filled)
        larger[tuple(slice(size) for size in piece.shape)] = piece
        pieces.append(larger)
    return torch.cat(pieces)


def _computes_the_same(network: nn.Module, reference: nn.Module, model: ExportedNetwork) -> bool:
    """Whether two networks agree on two samples."""
    inputs = [tensor[:2] for tensor in model.samples.inputs]
    reference.eval()
    with torch.no_grad():
        own = network(*inputs)
        other = reference(*inputs)
    return own.shape == other.shape and torch.allclose(own, other, atol=1e-4 * float(own.abs().max()), rtol=1e-3)
