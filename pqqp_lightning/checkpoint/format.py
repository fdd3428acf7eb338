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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.structure import class_path
from pqqp_lightning.storage.files import sha256_of
from pqqp_lightning.storage.run_folder import MANIFEST, WEIGHTS, RunFolder

FORMAT = 1
ORIGIN = "_pqqp_origin"
"""The attribute of a loaded module that holds its :class:`Origin`."""


@dataclass(frozen=True)
class Applied:
    """A stage that the checkpoint's model went through, and the plan that rebuilds its structure.

    Attributes:
        stage: its class, which has ``restructure``.
        plan: what it returned.
    """

    stage: type[Any]
    plan: dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """What a loaded model was built from, so that it can be built again after further stages.

    Attributes:
        skeleton: of its dense module, from :func:`skeleton_of`.
        applied: the stages that gave it its structure.
    """

    skeleton: dict[str, Any] | None
    applied: list[Applied]


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
    if digest != digest_of_manifest(manifest):
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


def origin_of(module: LightningModule) -> Origin | None:
    """What ``module`` was loaded from, if it was."""
    return vars(module).get(ORIGIN)


def model_folder(run: Path) -> Path:
    """The checkpoint folder of a run: ``model/`` in it, or itself."""
    return run if (run / MANIFEST).is_file() else RunFolder(run).model


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


def digest_of_manifest(manifest: dict[str, Any]) -> str:
    """The checksum that a manifest carries of its own content."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
