"""The probe of a checkpoint: what the saved model computes on a few samples, to compare with after every load.

Weights do not say what a module computes with them: a slope, a switch or a number of heads may be an argument of its
constructor that the checkpoint does not know. So ``probe.safetensors`` keeps a small batch and the model's outputs in
evaluation mode. Every load runs the batch again and refuses a module with other outputs.

A pass is the module's own ``validation_step``, without a trainer, loggers or autocast, just as a loaded module runs.
Its outputs are those of the outermost module calls in it, and what the step returns. Of a large output, numbers at a
fixed stride are kept. The file does not count as model size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics import Metric

from pqqp_lightning.checkpoint.nested import CannotStore, describe, map_tensors, rebuild, tensors_in
from pqqp_lightning.checkpoint.packed_layers import PackedWeight
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.activation_hooks import QuantizeInput, transformed_layers
from pqqp_lightning.network.single_step import validation_step
from pqqp_lightning.seeding import keep_random_state, seed_from
from pqqp_lightning.storage.run_folder import PROBE

MOST_BATCH_BYTES = 1 << 20
"""A larger batch is not stored; floating-point numbers are stored in 16 bits where that makes it fit."""
LONGEST_SEQUENCE = 64
"""Tokens of a sequence that are kept: a pass of a language model takes time in proportion."""
MOST_NUMBERS = 4096
"""Numbers that are kept of one output."""
MOST_OUTPUTS = 16
"""Outputs that are kept of one pass."""

TOLERANCES = {"same": 1e-3, "other device": 1e-2, "16 bits": 3e-2, "rounded activations": 5e-2}
"""Largest accepted difference, relative to the largest number of an output.

Other kernels of one CPU change a ResNet-50 by 4e-7, DeiT-tiny by 9e-7 and a LLaMA in bfloat16 by 8e-3 (random
weights). The others are estimates: TF32 convolutions of a GPU keep 11 bits of each factor, and a rounded activation
that lies between two values of its grid falls either way.
"""


@dataclass(frozen=True)
class Probe:
    """A batch and what a model computes on it, or why there is none.

    Attributes:
        form: how to run the model, and the batch's structure, as JSON; empty without a batch.
        inputs: the batch's tensors.
        outputs: float32 vectors of at most ``MOST_NUMBERS``.
        device: type of the device on which they were computed.
        missing: why there are no outputs, as the end of a sentence; empty if there are.
    """

    form: dict[str, Any] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    device: str = "cpu"
    missing: str = ""

    def write(self, folder: Path) -> None:
        """Write the probe into a checkpoint folder."""
        tensors = {f"input.{i}": tensor.contiguous() for i, tensor in enumerate(self.inputs)}
        tensors |= {f"output.{i}": tensor for i, tensor in enumerate(self.outputs)}
        described = {"form": self.form, "device": self.device, "missing": self.missing}
        save_file(tensors, folder / PROBE, metadata={"probe": json.dumps(described)})


def read_probe(folder: Path) -> Probe | None:
    """Read the probe of a checkpoint; None in checkpoints of earlier versions.

    Raises:
        RecipeError: the file is damaged.
    """
    path = folder / PROBE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads(file.metadata()["probe"])
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        text = f"{path}: is truncated or altered ({error}). Delete it to load the model without comparing its outputs."
        raise RecipeError(text) from error
    inputs = [tensors[f"input.{i}"] for i in range(sum(name.startswith("input.") for name in tensors))]
    outputs = [tensors[f"output.{i}"] for i in range(len(tensors) - len(inputs))]
    return Probe(described["form"], inputs, outputs, described["device"], described["missing"])


def take_probe(module: LightningModule, batch: Any) -> Probe:
    """Run ``module`` on ``batch`` and keep what it computes; a failure is recorded in the probe, not raised.

    Args:
        module: as it will be saved, on any device.
        batch: of few samples, as its ``validation_step`` takes it, on the module's device.
    """
    failures: list[str] = []
    # A batch, or a step, that works only inside of a run leaves the call of the model in it.
    for make_form in (_step_with_short_sequences, _step, _call):
        try:
            form, inputs = make_form(module, batch)
            first, second = _run(module, form, inputs, seed=1), _run(module, form, inputs, seed=2)
        except Exception as error:  # the step is the user's: anything may be raised, and the run shall go on
            failures.append(f"{type(error).__name__}: {error}")
            continue
        if not first:
            failures.append("the step calls no module and returns no tensor")
        elif not all(bool(output.isfinite().any()) for output in first):
            failures.append("the outputs are not finite")
        elif difference(first, second) > tolerance(module, module.device.type):
            failures.append("it computes something else in every pass, in evaluation mode")
        else:
            return Probe(form, [tensor.cpu() for tensor in inputs], first, module.device.type)
    shown = dict.fromkeys(text.strip().splitlines()[0] for text in failures)
    return Probe(missing="; ".join(shown))


def _step(module: LightningModule, batch: Any, longest: int | None = None) -> tuple[dict[str, Any], list[Tensor]]:
    """The form and the tensors of a pass of the validation step."""
    tensors: list[Tensor] = []
    structure = describe(batch, tensors)
    return {"run": "step", "arguments": structure}, _small(_shortened(tensors, longest) if longest else tensors)


def _step_with_short_sequences(module: LightningModule, batch: Any) -> tuple[dict[str, Any], list[Tensor]]:
    return _step(module, batch, LONGEST_SEQUENCE)


def _call(module: LightningModule, batch: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """The form and the tensors of the first outermost call in the validation step, which runs as in the run."""
    name, arguments = first_call(module, batch)
    tensors: list[Tensor] = []
    structure = describe(arguments, tensors)
    return {"run": "call", "module": name, "arguments": structure}, _small(tensors)


def first_call(module: LightningModule, batch: Any) -> tuple[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The first outermost call of a part of ``module`` in its validation step: the part's name, (args, kwargs).

    Raises:
        CannotStore: the step calls none.
    """
    with torch.no_grad(), outermost_calls(module) as calls:
        validation_step(module, batch)
    if not calls:
        raise CannotStore("the step calls no module")
    name, arguments, _ = calls[0]
    return name, arguments


def _shortened(tensors: list[Tensor], longest: int) -> list[Tensor]:
    """Token ids [B, T] cut to ``longest``, with the other tensors of the same T; T is that of the first token ids."""
    lengths = [t.shape[1] for t in tensors if t.ndim == 2 and not t.is_floating_point() and t.shape[1] > longest]
    return [t[:, :longest] if lengths and t.ndim > 1 and t.shape[1] == lengths[0] else t for t in tensors]


def _small(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors with their own memory; floats rounded to float16 if they would be too large otherwise.

    Raises:
        CannotStore: they are too large all the same.
    """
    if sum(tensor.nbytes for tensor in tensors) > MOST_BATCH_BYTES:
        tensors = [t.half() if t.dtype == torch.float32 and t.abs().max() < 6e4 else t for t in tensors]
    size_bytes = sum(tensor.nbytes for tensor in tensors)
    if size_bytes > MOST_BATCH_BYTES:
        raise CannotStore(f"a sample takes {size_bytes / 1e6:.1f} MB")
    return [tensor.detach().clone() for tensor in tensors]


def _run(module: LightningModule, form: dict[str, Any], inputs: list[Tensor], seed: int) -> list[Tensor]:
    """The outputs of a pass, small and on the CPU; module and random state are afterwards as before."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)

    def placed(tensor: Tensor) -> Tensor:
        # float16 is how large float32 numbers are stored; a model of 16 bits gets its own type
        tensor = tensor.to(module.device)
        return tensor.to(dtype) if tensor.dtype == torch.float16 else tensor.clone()

    arguments = map_tensors(rebuild(form["arguments"], inputs), placed)
    with keep_random_state(), undisturbed(module), outermost_calls(module) as calls, torch.no_grad():
        seed_from(seed)
        if form["run"] == "step":
            calls.append(("", None, validation_step(module, arguments)))
        else:
            module.get_submodule(form["module"])(*arguments[0], **arguments[1])
        found: list[Tensor] = []
        for name, given, output in calls:
            # What a part of the model reads, other parts or the step itself have computed.
            found += [*(tensors_in(given) if name else ()), *tensors_in(output)]
        numbers = [t for t in found if t.numel() and (t.is_floating_point() or t.is_complex())]
        return [_sample(tensor) for tensor in numbers[:MOST_OUTPUTS]]


def _sample(tensor: Tensor) -> Tensor:
    """At most ``MOST_NUMBERS`` of the tensor's numbers, at a stride that meets every column."""
    numbers = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach()
    columns = numbers.shape[-1] if numbers.ndim else 1
    stride = -(-numbers.numel() // MOST_NUMBERS)
    while stride > 1 and gcd(stride, columns) > 1:
        stride += 1
    return numbers.flatten()[::stride].float().cpu().clone()


@contextmanager
def undisturbed(module: LightningModule) -> Iterator[None]:
    """Inside, the module is in evaluation mode and without a trainer; modes and buffers are restored on exit."""
    modes = {part: part.training for part in module.modules()}
    # The parts of packed weights are buffers that no pass changes; a copy would double their memory.
    fixed = {id(part) for weight in module.modules() if isinstance(weight, PackedWeight) for part in weight.buffers()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers() if id(buffer) not in fixed}
    trainers = {m: m._trainer for m in module.modules() if isinstance(m, LightningModule)}
    # Python calls the user's `eval`, which may keep a part in another mode on purpose.
    module.eval()
    for lightning_module in trainers:
        lightning_module._trainer = None
    try:
        yield
    finally:
        for lightning_module, trainer in trainers.items():
            lightning_module._trainer = trainer
        for part, training in modes.items():
            part.training = training
        for name, buffer in module.named_buffers():
            if name in buffers and not torch.equal(buffer, buffers[name]):
                buffer.data.copy_(buffers[name])


@contextmanager
def outermost_calls(module: nn.Module) -> Iterator[list[tuple[str, Any, Any]]]:
    """Collect (name, (args, kwargs), output) of the outermost calls of the module's parts, without its metrics."""
    collected: list[tuple[str, Any, Any]] = []
    metrics = {part for metric in module.modules() if isinstance(metric, Metric) for part in metric.modules()}
    depth = 0

    def enter(part: nn.Module, args: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(name: str) -> Callable[..., None]:
        def hook(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:
                collected.append((name, (args, kwargs), output))

        return hook

    handles = []
    for name, part in module.named_modules():
        if part not in metrics:
            handles.append(part.register_forward_pre_hook(enter, prepend=True))
            handles.append(part.register_forward_hook(leave(name), with_kwargs=True, always_call=True))
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()


def tolerance(module: nn.Module, device: str) -> float:
    """The accepted difference of two passes of ``module``, one of them on a ``device`` of that type."""
    here = next((p.device.type for p in module.parameters()), "cpu")
    kind = "same" if here == device else "other device"
    if any(p.is_floating_point() and p.element_size() < 4 for p in module.parameters()):
        kind = "16 bits"
    if next(transformed_layers(module, QuantizeInput), None) is not None:
        kind = "rounded activations"
    return TOLERANCES[kind]


def difference(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest difference of two lists of outputs, relative to each output's largest number; inf if none match."""
    if [a.shape for a in first] != [b.shape for b in second]:
        return float("inf")
    largest = 0.0
    for a, b in zip(first, second, strict=True):
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return float("inf")
        scale = float(a[finite].abs().max()) if bool(finite.any()) else 0.0
        distance = float((a - b)[finite].abs().max()) if scale else float(b[finite].abs().sum())
        largest = max(largest, distance / (scale or 1.0))
    return largest


def compare(module: LightningModule, probe: Probe) -> tuple[float, str]:
    """Run the probe's batch on a loaded module.

    Returns:
        The relative difference from the saved outputs (inf: outputs of another form), and why it could not be
        computed; empty if it could.
    """
    try:
        return difference(probe.outputs, _run(module, probe.form, probe.inputs, seed=1)), ""
    except Exception as error:  # the step is the user's, and this machine may lack what it needs
        first_line = (str(error).strip().splitlines() or [""])[0]
        return 0.0, f"{type(error).__name__}: {first_line}"
