"""The packed checkpoint: a folder with ``model.safetensors`` and ``manifest.json.gz`` that is as small as the size
report says, and rebuilds the model bit for bit.

Codes are packed at their bit width with scales and zero points; pruned weights keep a bitmask or N:M positions and
the kept values only; everything else is stored as it is, tied weights once. The manifest holds how to build the
module, every stage's plan, how each weight is encoded, and checksums: a truncated or altered file is refused.
"""

from __future__ import annotations

import gzip
import hashlib
import inspect
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pqqp_lightning.bundle import BundleReader, bundle_small
from pqqp_lightning.errors import RecipeError, shorten
from pqqp_lightning.modules.constraints import constrained_layers, set_constraints
from pqqp_lightning.modules.encoding import stored_constraints, stored_tensors, weight_owner
from pqqp_lightning.packed import pack_weight, unpack_weight
from pqqp_lightning.spill import Spill
from pqqp_lightning.stage import Plan, Stage
from pqqp_lightning.storage import new_folder, sha256_of

FORMAT = 1
WEIGHTS, MANIFEST = "model.safetensors", "manifest.json.gz"
ORIGIN = "_pqqp_origin"
"""The attribute of a loaded module that holds its :class:`Origin`."""


@dataclass(frozen=True)
class Applied:
    """A stage that the checkpoint's model went through, and the plan that rebuilds its structure.

    Attributes:
        stage: its class.
        plan: what it returned.
    """

    stage: type[Stage]
    plan: Plan


@dataclass(frozen=True)
class Origin:
    """What a loaded model was built from, so that it can be built again after further stages.

    Attributes:
        skeleton: of its dense module, from :func:`skeleton_of`.
        applied: the stages that gave it its structure.
    """

    skeleton: dict[str, Any] | None
    applied: list[Applied]


def save_checkpoint(
    module: LightningModule,
    folder: Path,
    applied: Sequence[Applied] = (),
    extra: dict[str, Any] | None = None,
    skeleton: dict[str, Any] | None = None,
) -> int:
    """Write the packed checkpoint of ``module`` into ``folder``, whole or not at all, and return its bytes.

    Args:
        module: the model as measured.
        folder: replaced if it exists.
        applied: the stages that made it, in order; those that made a loaded model come before them by themselves.
        extra: plain data to keep in the manifest (records).
        skeleton: how to build the dense module, from :func:`skeleton_of`; as the module is now by default.
    """
    if origin := origin_of(module):
        applied, skeleton = [*origin.applied, *applied], origin.skeleton
    elif skeleton is None:
        skeleton = skeleton_of(module)
    with new_folder(folder) as temporary, Spill(temporary) as spill:
        weights = temporary / WEIGHTS
        stored, described = _contents(module, applied, spill)
        try:
            save_file(stored, weights)
        except SafetensorError as error:  # the library's word for a full disk
            raise OSError(None, str(error)) from error
        manifest = {"format": FORMAT, "model": skeleton, **described, **(extra or {})}
        manifest["weights"] = {"bytes": weights.stat().st_size, "sha256": sha256_of(weights)}
        manifest["sha256"] = _digest(manifest)
        (temporary / MANIFEST).write_bytes(gzip.compress(json.dumps(manifest).encode(), mtime=0))
    return checkpoint_bytes(folder)


def _contents(
    module: LightningModule, applied: Sequence[Applied], spill: Spill
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors to store, how the manifest describes them)."""
    tensors, aliases = stored_tensors(module)
    constraints = {name: c for name, _, c in constrained_layers(module)}
    stored: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for name, tensor in tensors.items():
        owner, hidden = weight_owner(name)
        if owner != name and owner in constraints:
            parts, entries[name] = pack_weight(tensor, stored_constraints(constraints[owner], hidden))
            stored.update({f"{name}:{part}": spill.put(value) for part, value in parts.items()})
        else:
            stored[name] = tensor
    plans = []
    for position, item in enumerate(applied):
        plain = {k: v for k, v in item.plan.items() if not isinstance(v, Tensor)}
        tensors_of_plan = {k: v for k, v in item.plan.items() if isinstance(v, Tensor)}
        stored.update({f"plan.{position}:{k}": v for k, v in tensors_of_plan.items()})
        plans.append({"class_path": dotted_name(item.stage), "plan": plain, "tensors": sorted(tensors_of_plan)})
    stored, small = bundle_small(stored)
    return stored, {"plans": plans, "packed": entries, "aliases": aliases, "small": small}


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's files."""
    return sum(file.stat().st_size for file in folder.iterdir())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, verified with its weights file.

    Raises:
        RecipeError: no checkpoint, another format, or a truncated or altered file.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise RecipeError(f"{folder}: holds no checkpoint ({MANIFEST} is missing). Name a run folder or its model/.")
    try:
        manifest = json.loads(gzip.decompress(path.read_bytes()))
        digest = manifest.pop("sha256")
    except (OSError, EOFError, zlib.error, ValueError, KeyError, AttributeError) as error:
        raise RecipeError(f"{path}: is truncated or altered: not a manifest. Run the recipe again.") from error
    if digest != _digest(manifest):
        raise RecipeError(f"{path}: is truncated or altered: its checksum differs. Run the recipe again.")
    if manifest["format"] != FORMAT:
        raise RecipeError(f"{path}: has format {manifest['format']}; this version reads {FORMAT}. Update the package.")
    weights = folder / WEIGHTS
    size = weights.stat().st_size if weights.is_file() else 0
    if size != manifest["weights"]["bytes"]:
        raise RecipeError(
            f"{weights}: has {size} bytes instead of {manifest['weights']['bytes']}: truncated or altered. "
            "Run the recipe again."
        )
    if sha256_of(weights) != manifest["weights"]["sha256"]:
        raise RecipeError(f"{weights}: its checksum differs: altered. Run the recipe again.")
    return manifest


def restore(module: LightningModule, folder: Path) -> dict[str, Any]:
    """Load a checkpoint into ``module``: structure, weights, constraints. Returns the manifest, with "applied" the
    stages that ``module``, which is of the same skeleton or loaded from an earlier run, had not gone through yet.

    Raises:
        RecipeError: the checkpoint cannot be read, or is of another model.
    """
    manifest = read_manifest(folder)
    with safe_open(folder / WEIGHTS, framework="pt") as opened:
        file = BundleReader(opened, manifest["small"])
        origin = origin_of(module)
        manifest["applied"] = _applied(manifest, file)[len(origin.applied) if origin else 0 :]
        for item in manifest["applied"]:
            item.stage.restructure(item.stage.__new__(item.stage), module, item.plan)
        own = module.state_dict(keep_vars=True)
        names = _weight_names(file.names()) | set(manifest["aliases"])
        if names != set(own):
            raise RecipeError(
                f"{folder}: is of another model: {shorten(sorted(names ^ set(own)))} in only one of the two. "
                "Use the recipe that made it."
            )
        for _, layer, _ in list(constrained_layers(module)):
            set_constraints(layer, None)
        modules = dict(module.named_modules())
        with torch.no_grad():
            for name, target in own.items():
                if name in manifest["aliases"]:
                    continue
                if name in manifest["packed"]:
                    value, constraints = unpack_weight(manifest["packed"][name], _parts(file, name))
                    set_constraints(modules[weight_owner(name)[0]], constraints)
                else:
                    value = file.get(name)
                if value.shape != target.shape:
                    raise RecipeError(
                        f"{folder}: {name} has shape {list(value.shape)} instead of {list(target.shape)}: "
                        "it is of another model. Use the recipe that made it."
                    )
                _assign(target, value)
    return manifest


def _applied(manifest: dict[str, Any], file: BundleReader) -> list[Applied]:
    """The stages with their whole plans."""
    found = []
    for position, entry in enumerate(manifest["plans"]):
        tensors = {k: file.get(f"plan.{position}:{k}") for k in entry["tensors"]}
        found.append(Applied(_stage_class(entry["class_path"]), entry["plan"] | tensors))
    return found


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint, unpacked."""
    folder = model_folder(folder)
    manifest = read_manifest(folder)
    with safe_open(folder / WEIGHTS, framework="pt") as opened:
        file = BundleReader(opened, manifest["small"])
        state = {}
        for name in _weight_names(file.names()):
            packed = manifest["packed"].get(name)
            state[name] = file.get(name) if packed is None else unpack_weight(packed, _parts(file, name))[0]
    state.update({alias: state[name] for alias, name in manifest["aliases"].items()})
    return state


def load(run: str | Path, module: LightningModule | None = None) -> LightningModule:
    """Rebuild the compressed model of a run from its folder alone, bit-identical to the model that was measured.

    Args:
        run: a run folder, or the checkpoint folder in it.
        module: the module to load into; needed only where the checkpoint cannot build it (a class of your own that
            does not call ``save_hyperparameters``).

    Returns:
        The module in evaluation mode, with its constraints.

    Raises:
        RecipeError: no checkpoint, a truncated or altered file, or a module is needed.
    """
    folder = model_folder(Path(run))
    manifest = read_manifest(folder)
    if module is None:
        module = build(manifest["model"], folder)
    earlier = origin_of(module)
    applied = [*(earlier.applied if earlier else []), *restore(module, folder)["applied"]]
    vars(module)[ORIGIN] = Origin(manifest["model"], applied)
    return module.eval()


def origin_of(module: LightningModule) -> Origin | None:
    """What ``module`` was loaded from, if it was."""
    return vars(module).get(ORIGIN)


def model_folder(run: Path) -> Path:
    """The checkpoint folder of a run: ``model/`` in it, or itself."""
    return run if (run / MANIFEST).is_file() else run / "model"


def build(skeleton: dict[str, Any] | None, folder: Path) -> LightningModule:
    """A module of the right structure, values irrelevant."""
    if skeleton is None:
        raise RecipeError(f"{folder}: does not say how to build its module. Pass one: load(run, module=...).")
    found = _import(skeleton["class_path"])
    if not (isinstance(found, type) and issubclass(found, LightningModule)):
        raise RecipeError(f"{folder}: {skeleton['class_path']} is no LightningModule. Pass one: load(run, module=...).")
    return found(**skeleton["init_args"])


def class_path(instance: object) -> str:
    """The dotted path of an object's class."""
    return dotted_name(type(instance))


def dotted_name(found: type) -> str:
    """The dotted path of a class."""
    return f"{found.__module__}.{found.__qualname__}"


def skeleton_of(module: LightningModule) -> dict[str, Any] | None:
    """How to build a module of this structure, weights aside; None if that cannot be said."""
    described = getattr(module, "skeleton", None)
    if callable(described):
        return described()
    if not module.hparams and _required_arguments(module):
        return None
    arguments = dict(module.hparams)
    try:
        json.dumps(arguments)
    except TypeError:
        return None
    return {"class_path": class_path(module), "init_args": arguments}


def _required_arguments(module: LightningModule) -> bool:
    parameters = inspect.signature(type(module).__init__).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return sum(p.default is p.empty and p.kind not in kinds for p in parameters) > 1  # besides self


def _stage_class(path: str) -> type[Stage]:
    found = _import(path)
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise RecipeError(f"the checkpoint names {path} as a stage, which is none. Install the package that has it.")
    return found


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(f"the checkpoint needs {path}, which cannot be imported. Install its package.") from error


def _parts(file: BundleReader, name: str) -> dict[str, Tensor]:
    prefix = f"{name}:"
    return {key.removeprefix(prefix): file.get(key) for key in file.names() if key.startswith(prefix)}


def _weight_names(keys: Sequence[str]) -> set[str]:
    return {key.partition(":")[0] for key in keys if not key.startswith("plan.")}


def _assign(target: Tensor, value: Tensor) -> None:
    if isinstance(target, Tensor) and target.dtype != value.dtype:
        target.data = target.data.to(value.dtype)
    target.copy_(value)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
