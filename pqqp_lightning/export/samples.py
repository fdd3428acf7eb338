"""Inputs of a model that is not a language model: what the run keeps, or an example that the user gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pqqp_lightning.checkpoint.format import model_folder
from pqqp_lightning.checkpoint.nested import rebuild
from pqqp_lightning.checkpoint.probe import first_call, read_probe, undisturbed
from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.export.source import FinishedRun
from pqqp_lightning.storage.files import read_json
from pqqp_lightning.storage.run_folder import RunFolder

RANDOM = 8
"""Random samples of an example that is given by its shape."""
EXAMPLE = "Run it again, or describe one input: --example 3x224x224, or --example FILE.npy with several of them."


@dataclass(frozen=True)
class Samples:
    """Inputs of one part of a module, most often of the module itself.

    Attributes:
        called: the name of that part; empty for the module itself.
        inputs: its positional arguments [B, ...].
        labels: the class of each sample [B], where the run kept them.
        calibration: inputs from the calibration data; without any, those of ``inputs``.
        kind: "evaluation", "given" or "random".
        preprocessing: "mean" and "std" of images, where the run kept them.
    """

    called: str
    inputs: tuple[Tensor, ...]
    labels: Tensor | None = None
    calibration: tuple[Tensor, ...] = ()
    kind: str = "evaluation"
    preprocessing: dict[str, list[float]] = field(default_factory=dict)


def samples_of(run: FinishedRun, example: str | None = None) -> Samples:
    """The samples of a run.

    They are, in this order, the user's example; those in the run folder; Lightning's ``example_input_array``; those in
    the checkpoint of an earlier version, which it compares outputs on.

    Args:
        run: of another model than a language model.
        example: the shape of one input, as in 3x224x224; or a .npy file with several.

    Raises:
        RecipeError: there are none, or the example cannot be read.
    """
    kept = _kept(run)
    if example is not None:
        inputs, kind = _read_example(example)
        return Samples(kept.called if kept else "", (inputs,), None, (), kind, kept.preprocessing if kept else {})
    if kept is not None:
        return kept
    array = run.module.example_input_array
    if isinstance(array, Tensor):
        return Samples("", (array,), kind="given")
    if isinstance(array, list | tuple) and array and all(isinstance(value, Tensor) for value in array):
        return Samples("", tuple(array), kind="given")
    if (probed := _of_probe(run)) is not None:
        return probed
    raise RecipeError(Problem("run", str(run.folder), "keeps no samples of its inputs", EXAMPLE))


def _kept(run: FinishedRun) -> Samples | None:
    """Those in the run folder."""
    file = RunFolder(run.folder).inputs
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in list(opened.keys())}
    except (SafetensorError, OSError) as error:
        way_out = "Delete the file, and describe one input: --example 3x224x224."
        raise RecipeError(Problem("run", str(run.folder), f"has a damaged {file.name}", way_out)) from error
    inputs = _numbered(tensors, "input")
    if not inputs:
        return None
    preprocessing = RunFolder(run.folder).preprocessing
    how = read_json(preprocessing, "mean", "std") if preprocessing.is_file() else {}
    return Samples(
        called=about.get("called", ""),
        inputs=inputs,
        labels=tensors.get("labels"),
        calibration=_numbered(tensors, "calibration.input"),
        preprocessing={name: how[name] for name in ("mean", "std")} if how else {},
    )


def _numbered(tensors: dict[str, Tensor], prefix: str) -> tuple[Tensor, ...]:
    names = [name for name in tensors if name.rpartition(".")[0] == prefix]
    return tuple(tensors[f"{prefix}.{i}"] for i in range(len(names)))


def _read_example(example: str) -> tuple[Tensor, str]:
    """Inputs [B, ...] from a shape or a file, and their kind."""
    sizes = example.lower().replace("×", "x").split("x")
    if all(size.isdecimal() and int(size) > 0 for size in sizes):
        shape = [RANDOM, *map(int, sizes)]
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)), "random"
    way_out = "Give the shape of one input, as in 3x224x224, or a .npy file with several inputs."
    file = Path(example).expanduser()
    if not file.is_file():
        raise RecipeError(Problem("example", example, "is neither a shape nor a file", way_out))
    try:
        inputs = torch.from_numpy(np.load(file, allow_pickle=False))
    except (ValueError, OSError, TypeError) as error:
        raise RecipeError(Problem("example", example, "cannot be read as .npy", way_out)) from error
    if inputs.dim() < 2 or len(inputs) < 2:
        text = f"holds an array of shape {list(inputs.shape)}, not several inputs"
        raise RecipeError(Problem("example", example, text, way_out))
    return inputs.float() if inputs.is_floating_point() else inputs, "given"


def _of_probe(run: FinishedRun) -> Samples | None:
    """The inputs in a checkpoint's probe; None if it has none."""
    probe = read_probe(model_folder(run.folder))
    if probe is None or probe.missing:
        return None
    given: Any = rebuild(probe.form["arguments"], [_plain(tensor) for tensor in probe.inputs])
    called = probe.form.get("module", "")
    try:
        if probe.form["run"] == "step":
            with undisturbed(run.module):
                called, (arguments, named) = first_call(run.module, given)
        else:
            arguments, named = given
    except Exception:  # the step is the user's
        return None
    if named or not arguments or not all(isinstance(value, Tensor) for value in arguments):
        return None
    return Samples(called, tuple(arguments))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor
