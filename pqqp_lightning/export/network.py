"""A run's network as a function of tensors, for formats that are not bound to an architecture."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pqqp_lightning.algorithms.grid import Grid
from pqqp_lightning.errors import Problem, RecipeError, shorten
from pqqp_lightning.export.runtime_check import OutputAgreement, compare_arrays
from pqqp_lightning.export.samples import Samples
from pqqp_lightning.export.source import FinishedRun, is_language_model
from pqqp_lightning.export.target import DType, Exported, Runtime
from pqqp_lightning.network.activation_hooks import QuantizeInput, transforms_of, without_transforms
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.layers import is_packed, layout_of, stored_weights
from pqqp_lightning.network.layouts import Layout

AT_ONCE = 16
"""Samples of a batch when outputs are compared."""
LAYOUTS = ("rows", "channels_last")
"""Of weights whose codes can be written: those of Linear layers and convolutions."""


@dataclass(frozen=True)
class CodedWeight:
    """A weight that is stored as codes.

    Attributes:
        grid: which its matrix [O, I] lies on.
        layout: how the weight holds the matrix.
    """

    grid: Grid
    layout: Layout


@dataclass(frozen=True)
class ExportedNetwork(Exported):
    """A network with inputs to try it on.

    Attributes:
        network: takes the inputs by position.
        samples: the inputs.
        coded: the weights on grids, by name.
        changes: what was changed, in whole sentences.
        largest_relative: difference of the outputs that counts as agreement, relative to their norm.
        at_once: samples that it takes in a batch when outputs are compared.
    """

    network: nn.Module
    samples: Samples
    coded: dict[str, CodedWeight]
    changes: list[str]
    largest_relative: float
    at_once: int = AT_ONCE

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

    def stored(self) -> dict[str, Tensor]:
        return self.weights

    @property
    def compressible(self) -> list[str]:
        return list(stored_weights(self.network))

    @property
    def described(self) -> str:
        return f"a {type(self.network).__name__}"

    @property
    def rewritten(self) -> list[str]:
        return self.changes

    @property
    def problems(self) -> list[Problem]:
        packed = [name for name, (_, layer, _) in stored_weights(self.network).items() if is_packed(layer)]
        if not packed:
            return []
        text = f"has {shorten(packed)} whose weights only their own kernels read"
        return [Problem("run", str(self.source.folder), text, "Use pqqp_lightning.load(RUN) for it.")]

    @property
    def input_names(self) -> list[str]:
        """The names of the inputs, as the network's ``forward`` has them."""
        names = list(inspect.signature(self.network.forward).parameters)
        count = len(self.samples.inputs)
        return names[:count] if len(names) >= count else [f"input_{i}" for i in range(count)]

    def rounding_layers(self) -> dict[str, QuantizeInput]:
        """The layers that round their inputs while the network runs."""
        found = {}
        for name, module in self.network.named_modules():
            for transform in transforms_of(module):
                if isinstance(transform, QuantizeInput):
                    found[name] = transform
        return found

    @contextmanager
    def without_rounding(self) -> Iterator[None]:
        """Inside, no layer rounds its input."""
        with ExitStack() as stack:
            for name in self.rounding_layers():
                stack.enter_context(without_transforms(self.network.get_submodule(name)))
            yield

    def compare(self, runtime: Runtime, folder: Path) -> OutputAgreement:
        return compare_samples(self, runtime, folder)


def compare_samples(model: ExportedNetwork, runtime: Runtime, written: Path) -> OutputAgreement:
    """Run ``written`` in another process, and compare its outputs with the network's own."""
    samples = model.samples
    found, own, version = compare_arrays(runtime, written, model.network, samples.inputs, model.at_once)
    difference = found.double() - own.double() if found.shape == own.shape else own.double() * float("nan")
    same_top = top1 = own_top1 = None
    if own.dim() == 2 and own.shape[1] > 1 and found.shape == own.shape:
        top = found.argmax(-1)
        own_top = own.argmax(-1)
        same_top = _share(top, own_top)
        if samples.labels is not None:
            top1 = _share(top, samples.labels)
            own_top1 = _share(own_top, samples.labels)
    return OutputAgreement(
        largest_difference=float(difference.abs().max()),
        version=version,
        relative_difference=float(difference.norm() / own.double().norm().clamp(min=1e-12)),
        largest_relative=model.largest_relative,
        same_top=same_top,
        top1=top1,
        own_top1=own_top1,
        samples=len(own),
        kind=samples.kind,
    )


def _share(a: Tensor, b: Tensor) -> float:
    """The fraction of equal entries."""
    return float((a == b).float().mean())


def network_of_run(
    run: FinishedRun, samples: Samples, *, dtype: DType, widen: bool, largest_relative: float
) -> ExportedNetwork:
    """The network that takes the samples, with the codes of its weights.

    Raises:
        RecipeError: it returns something else than one tensor, or refuses the samples.
    """
    network = run.module.get_submodule(samples.called)
    wide = {name for name, tensor in network.state_dict().items() if tensor.dtype == torch.float32}
    network = network.float()
    _try(network, samples, run)
    coded = {}
    other = []
    for name, (_, layer, hidden) in stored_weights(network).items():
        grid = constraints_of(layer).grid
        if grid is None:
            continue
        if grid.codebook is not None or hidden or layout_of(layer) not in LAYOUTS or name not in wide:
            other.append(name)
        else:
            coded[name] = CodedWeight(grid, layout_of(layer))
    changes = []
    if other:
        text = "with levels, a layout or a dtype that the format has no codes for, are written as values."
        changes.append(f"The codes of {shorten(other, what='weight')} {text}")
    return ExportedNetwork(run, dtype, widen, network, samples, coded, changes, largest_relative)


def refuse_language_model(run: FinishedRun, to: str) -> None:
    """Raise the problem if the run holds a language model."""
    if is_language_model(getattr(run.module, "model", None)):
        text = f"holds a language model, which --to {to} does not write"
        raise RecipeError(Problem("run", str(run.folder), text, "Use --to hf, compressed-tensors or gguf."))


def _try(network: nn.Module, samples: Samples, run: FinishedRun) -> None:
    """Run two samples."""
    try:
        with torch.no_grad():
            output = network(*[tensor[:2] for tensor in samples.inputs])
    except Exception as error:  # the network is the user's
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        shapes = ", ".join("x".join(map(str, tensor.shape[1:])) for tensor in samples.inputs)
        text = f"does not take inputs of {shapes} ({first})"
        raise RecipeError(Problem("run", str(run.folder), text, "Give --example another shape.")) from error
    if not isinstance(output, Tensor) or output.shape[:1] != samples.inputs[0][:2].shape[:1]:
        text = f"returns {type(output).__name__}, not one tensor [B, ...]"
        way_out = "Let forward return one tensor with a row for each sample."
        raise RecipeError(Problem("run", str(run.folder), text, way_out))
