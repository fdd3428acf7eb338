"""Reads a packed checkpoint (:mod:`~pqqp_lightning.checkpoint.format`) and rebuilds its model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pqqp_lightning.argument_types import path_problems, refuse_wrong_types
from pqqp_lightning.checkpoint.construction import (
    arguments_for,
    left_on_meta,
    parameters_on_meta,
    unknown_arguments,
)
from pqqp_lightning.checkpoint.format import ORIGIN, Applied, Origin, model_folder, origin_of, read_manifest
from pqqp_lightning.checkpoint.memory import say_memory
from pqqp_lightning.checkpoint.packed_layers import (
    PackedWeight,
    can_pack,
    is_packed_model,
    pack_layer,
    refuse_training,
)
from pqqp_lightning.checkpoint.packing import unpack_weight
from pqqp_lightning.checkpoint.probe import compare, read_probe, tolerance
from pqqp_lightning.checkpoint.stored_tensors import StoredTensors
from pqqp_lightning.errors import RecipeError, shorten
from pqqp_lightning.network.constraints import constrained_layers, set_constraints
from pqqp_lightning.network.free_memory import free_memory
from pqqp_lightning.network.layers import Layer, stored_weights
from pqqp_lightning.network.offload import ROOM, offload_of
from pqqp_lightning.storage.run_folder import WEIGHTS

MOVED = {"pqqp_lightning.trainer.Training": "pqqp_lightning.runs.trainer.Training"}
"""Classes that checkpoints of earlier versions name by a module that has moved."""


def restore(module: LightningModule, folder: Path, doubt: str | None = None, *, packed: bool = False) -> dict[str, Any]:
    """Load the structure, weights and constraints of a checkpoint into ``module``, and compare what it computes.

    Args:
        module: built from the same skeleton, or loaded from an earlier checkpoint of the same run.
        folder: the checkpoint folder.
        doubt: of a module that was built from the checkpoint: what is not known of its construction, or empty. None for
            a module of the user's.
        packed: keep packed weights as they are stored, see :func:`load`. Parameters of ``module`` may be on the meta
            device.

    Returns:
        The manifest; its "applied" lists the stages that had not been applied to ``module`` before.

    Raises:
        RecipeError: the checkpoint cannot be read, or belongs to another model, or ``module`` computes something else
            than the saved model.
    """
    if is_packed_model(module):
        raise RecipeError(f"{folder}: the module has packed weights, which cannot be overwritten. Load the run anew.")
    manifest = read_manifest(folder)
    with safe_open(folder / WEIGHTS, framework="pt") as opened:
        file = StoredTensors(opened, manifest.get("small", []))
        origin = origin_of(module)
        manifest["applied"] = _applied(manifest, file)[len(origin.applied) if origin else 0 :]
        for item in manifest["applied"]:
            item.stage.restructure(module, item.plan)
        own = module.state_dict(keep_vars=True)
        _require_same_tensors(own, manifest, file, folder, doubt)
        # Constraints that the module carries from before are replaced by those of the checkpoint.
        for _, layer, _ in list(constrained_layers(module)):
            set_constraints(layer, None)
        weights = stored_weights(module)
        layers = _layers_to_pack(manifest, weights) if packed else {}
        with torch.no_grad():
            for name, target in offload_of(module).visit(own.items()):
                if name in manifest["aliases"]:
                    continue
                entry = manifest["packed"].get(name)
                if name in layers:
                    pack_layer(layers[name], PackedWeight(entry, file.parts(name), target.requires_grad))
                elif entry is None:
                    _assign(module, target, file.get(name))
                else:
                    value, constraints = unpack_weight(entry, file.parts(name))
                    set_constraints(weights[name][1], constraints)
                    _assign(module, target, value)
            for alias, name in manifest["aliases"].items():
                if own[alias].is_meta and own[alias] is not own[name]:  # not tied by the constructor
                    _assign(module, own[alias], module.get_parameter(name).detach())
    offload_of(module).settle(module)  # the constraints
    _require_same_outputs(module, folder, doubt)
    return manifest


def _require_same_tensors(
    own: dict[str, Any], manifest: dict[str, Any], file: StoredTensors, folder: Path, doubt: str | None
) -> None:
    """Compare names and shapes, before a weight is overwritten.

    Raises:
        RecipeError: a tensor is in only one of module and checkpoint, or has another shape.
    """
    if lazy := [name for name, target in own.items() if is_lazy(target)]:
        text = f"{shorten(lazy)} of the module have no shape before its first batch. Run one through it first."
        raise RecipeError(f"{folder}: {text}")
    way_out = "Use the recipe that made it."
    if doubt is not None:
        way_out = f"{doubt + '. ' if doubt else ''}Pass module=...: load(run, module=...), constructed as in the run."
    names = file.weight_names() | set(manifest["aliases"])
    if names != set(own):
        raise RecipeError(
            f"{folder}: is of another model: {shorten(sorted(names ^ set(own)))} in only one of the two. {way_out}"
        )
    for name, target in own.items():
        if name in manifest["aliases"]:
            continue
        entry = manifest["packed"].get(name)
        shape = file.shape(name) if entry is None else entry["shape"]
        if list(shape) != list(target.shape):
            raise RecipeError(
                f"{folder}: {name} has shape {list(shape)} instead of {list(target.shape)}: "
                f"it is of another model. {way_out}"
            )


def _layers_to_pack(manifest: dict[str, Any], weights: Mapping[str, tuple[str, Layer, bool]]) -> dict[str, Layer]:
    """The layer of each packed weight, by the weight's name; weights that anything else reads are left out."""
    tied = set(manifest["aliases"].values())
    found = {}
    for name in manifest["packed"]:
        _, layer, hidden = weights[name]
        if not hidden and name not in tied and can_pack(layer):
            found[name] = layer
    return found


def _require_same_outputs(module: LightningModule, folder: Path, doubt: str | None) -> None:
    """Compare what a loaded module computes with the checkpoint's probe.

    Warns where nothing can be compared; a checkpoint of earlier versions has no probe.

    Raises:
        RecipeError: the module computes something else.
    """
    probe = read_probe(folder)
    distance, failure = 0.0, ""
    if probe is None:
        failure = f"it has no outputs to compare with. {doubt}" if doubt else ""
    elif probe.missing:
        failure = f"its outputs could not be recorded ({probe.missing})"
    else:
        distance, failure = compare(module, probe)
    if failure:
        rank_zero_warn(f"{folder}: whether the module computes the same as the saved one is not known: {failure}")
    if probe is None or distance <= tolerance(module, probe.device):
        return
    how_far = "other outputs" if distance == float("inf") else f"largest difference {distance:.1%} of the output"
    if doubt is None:
        made = "module that was passed"
        way_out = "Construct it as in the run: the recipe that made it, the same arguments."
    else:
        made = "module that was built"
        way_out = "Pass module=...: load(run, module=...), constructed as in the run."
        if doubt:
            way_out = f"{doubt}. {way_out} A constructor that calls save_hyperparameters() needs none in later runs."
        else:
            way_out = f"Attributes may have been set after construction, or its code has changed. {way_out}"
    raise RecipeError(f"{folder}: the {made} computes something else than the saved one ({how_far}). {way_out}")


def _applied(manifest: dict[str, Any], file: StoredTensors) -> list[Applied]:
    """The stages with their plans, whose tensors are in the weights file."""
    found = []
    for position, entry in enumerate(manifest["plans"]):
        tensors = {k: file.get(f"plan.{position}:{k}") for k in entry["tensors"]}
        found.append(Applied(_stage_class(entry["class_path"]), entry["plan"] | tensors))
    return found


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Return the unpacked state dict of a checkpoint, without building its model."""
    folder = model_folder(folder)
    manifest = read_manifest(folder)
    with safe_open(folder / WEIGHTS, framework="pt") as opened:
        file = StoredTensors(opened, manifest.get("small", []))
        state = {}
        for name in file.weight_names():
            packed = manifest["packed"].get(name)
            if packed is None:
                state[name] = file.get(name)
            else:
                state[name], _ = unpack_weight(packed, file.parts(name))
    state.update({alias: state[name] for alias, name in manifest["aliases"].items()})
    return state


def load(run: str | Path, module: LightningModule | None = None, *, packed: bool = False) -> LightningModule:
    """Rebuild the compressed model of a run from its folder alone, bit-identical to the model that was measured.

    In an interactive session it says how much memory the model takes.

    Args:
        run: a run folder, or the checkpoint folder in it.
        module: the module to load into; needed only if the checkpoint cannot build it (a class of your own that does
            not record all its arguments with ``save_hyperparameters``, or whose attributes are set afterwards).
        packed: keep the weights of layers as the checkpoint stores them, and unpack each while it runs. The model takes
            about as much memory as its checkpoint on disk, also while it is loaded (unless ``module`` is given), and
            computes the same, bit for bit. Every pass unpacks every weight once, whatever its number of tokens: the
            quickstart's model reads 189 instead of 246 tokens a second, 512 in a pass, and writes 2.3 instead of 11.7,
            one in a pass (one CPU core). It can be copied, pickled and moved; ``state_dict`` unpacks all weights. It
            has no constraints, and cannot be trained or compressed. Recurrent weights and embeddings are not packed.
            Run it under ``torch.inference_mode()`` or ``no_grad()``: autograd would keep every unpacked weight.

    Returns:
        The module in evaluation mode, with its constraints.

    Raises:
        RecipeError: the checkpoint is missing, truncated or altered, or cannot build the module, or the module computes
            something else than the saved one.
    """
    refuse_wrong_types(load, {"run": run, "packed": packed})
    if problems := path_problems(run=run):
        raise RecipeError(problems)
    folder = model_folder(Path(run))
    loaded = load_quietly(folder, module, packed=packed)
    say_memory(loaded, Path(run), folder, packed)
    return loaded


def load_quietly(folder: Path, module: LightningModule | None = None, *, packed: bool = False) -> LightningModule:
    """As :func:`load` from a checkpoint folder, for commands: says nothing about memory."""
    manifest = read_manifest(folder)
    if module is not None and not isinstance(module, LightningModule):
        raise RecipeError(f"module={module!r} is not a LightningModule. Pass an instance, as in module=MyModule(...).")
    earlier = None
    if module is None:
        module, applied = _rebuilt(manifest, folder, packed)
    else:
        earlier = origin_of(module)
        applied = restore(module, folder, packed=packed)["applied"]
    vars(module)[ORIGIN] = Origin(manifest["model"], [*(earlier.applied if earlier else []), *applied])
    if is_packed_model(module):
        vars(module)["configure_optimizers"] = refuse_training  # which Lightning calls before it trains
    return module.eval()


def _rebuilt(manifest: dict[str, Any], folder: Path, packed: bool) -> tuple[LightningModule, list[Applied]]:
    """The module that the checkpoint describes, with its weights, and the stages that were applied to it."""
    reason = manifest.get("not_described", "")
    if packed or _is_larger_than_memory(manifest, folder):
        try:
            with parameters_on_meta():
                module = build(manifest["model"], folder, reason)
            if not left_on_meta(module):
                if not packed:
                    offload_of(module).connect(module.device)
                doubt = unknown_arguments(type(module), manifest["model"]["init_args"])
                return module, restore(module, folder, doubt, packed=packed)["applied"]
        except (RecipeError, NotImplementedError, RuntimeError):
            pass  # whatever does not come from the missing values happens again below
    module = build(manifest["model"], folder, reason)
    doubt = unknown_arguments(type(module), manifest["model"]["init_args"])
    applied = restore(module, folder, doubt, packed=packed)["applied"]
    if packed:
        text = f"{type(module).__name__} computes from its weights while it is built"
        rank_zero_warn(f"{folder}: {text}: loading took the memory of the dense model.")
    return module, applied


def _is_larger_than_memory(manifest: dict[str, Any], folder: Path) -> bool:
    """Whether the unpacked weights of a checkpoint leave too little memory for a run."""
    free = free_memory()
    if free is None:
        return False
    size_bytes = 0
    with safe_open(folder / WEIGHTS, framework="pt") as opened:
        file = StoredTensors(opened, manifest.get("small", []))
        for name in file.weight_names():
            entry = manifest["packed"].get(name)
            if entry is None:
                size_bytes += file.get(name).nbytes
            else:
                size_bytes += math.prod(entry["shape"]) * getattr(torch, entry["dtype"]).itemsize
    return ROOM * size_bytes > free


def build(skeleton: dict[str, Any] | None, folder: Path, reason: str = "") -> LightningModule:
    """Build the dense module of a checkpoint, with its initial weights.

    Args:
        skeleton: its class and arguments, if the checkpoint knows them.
        folder: of the checkpoint.
        reason: why it does not know them, a sentence.

    Raises:
        RecipeError: the checkpoint does not describe the module, or its class cannot be imported.
    """
    if skeleton is None:
        text = f"{folder}: does not say how to build its module. Pass one: load(run, module=...). {reason}"
        raise RecipeError(text.rstrip())
    try:
        module_class = _import(skeleton["class_path"])
    except RecipeError as error:
        raise RecipeError(f"{folder}: {error} Or pass a module: load(run, module=...).") from error
    if not (isinstance(module_class, type) and issubclass(module_class, LightningModule)):
        raise RecipeError(
            f"{folder}: {skeleton['class_path']} is not a LightningModule. Pass one: load(run, module=...)."
        )
    try:
        return module_class(**arguments_for(module_class, skeleton["init_args"]))
    except TypeError as error:
        raise RecipeError(
            f"{folder}: {skeleton['class_path']} cannot be built from its arguments ({error}). "
            "Pass one: load(run, module=...)."
        ) from error


def _stage_class(path: str) -> type[Any]:
    stage_class = _import(MOVED.get(path, path))
    if not (isinstance(stage_class, type) and callable(getattr(stage_class, "restructure", None))):
        raise RecipeError(
            f"the checkpoint names {path} as a stage, but it is not one. Install the package that has it."
        )
    return stage_class


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(f"the checkpoint needs {path}, which cannot be imported. Install its package.") from error


def _assign(module: nn.Module, target: Tensor, value: Tensor) -> None:
    """Write ``value`` into ``target``, a tensor of ``module``."""
    if target.is_meta:
        # The file's tensors are not aligned as torch's own are, which may decide between kernels.
        parameter = nn.Parameter(value.clone(), requires_grad=target.requires_grad)
        for owner in module.modules():  # every module that shares it
            keys = [key for key, shared in owner._parameters.items() if shared is target]
            for key in keys:
                setattr(owner, key, parameter)  # not into the dict: an LSTM keeps its parameters in a list as well
            if keys:
                offload_of(module).settle(owner)
        return
    # The stored dtype counts: copy_ alone would convert the value to the dtype of the freshly built module.
    if isinstance(target, Tensor) and target.dtype != value.dtype:
        target.data = target.data.to(value.dtype)
    target.copy_(value)
