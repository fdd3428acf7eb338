"""The packed checkpoint: a folder with ``model.safetensors`` and ``manifest.json.gz``.

It is as small as the size report says and rebuilds the model bit for bit. The size report counts tensors only; the
manifest and the header of the weights file add about 100 bytes per tensor.

Codes are packed at their bit width, with scales and zero points. Pruned weights are stored as a bitmask or N:M
positions and the kept values. Everything else is stored unchanged, tied weights once. The manifest says how to build
the module, what each stage changed and how each weight is encoded; its checksums detect a truncated or altered file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from pqqp_lightning.errors import RecipeError
from pqqp_lightning.storage.files import sha256_of
from pqqp_lightning.storage.run_folder import MANIFEST, WEIGHTS, RunFolder

FORMAT = 3
READABLE_FORMATS = (1, 2, 3)
"""Format 1 kept small tensors together in one tensor. Formats before 3 had no weights that hold a matrix in another
layout than a Linear or a convolution."""
ORIGIN = "_pqqp_origin"
"""The attribute of a loaded module that holds its :class:`Origin`."""


@dataclass(frozen=True)
class Applied:
    """A stage that was applied to the checkpoint's model.

    Attributes:
        stage: the stage's class, which has ``restructure``.
        plan: what its ``compress`` returned, from which ``restructure`` rebuilds the structure.
    """

    stage: type[Any]
    plan: dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """How a loaded model was built, so that it can be saved again after further stages.

    Attributes:
        skeleton: how to build its dense module, from
            :func:`~pqqp_lightning.checkpoint.construction.skeleton_of`.
        applied: the stages that gave it its structure.
    """

    skeleton: dict[str, Any] | None
    applied: list[Applied]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint, and verify it and the weights file; raises as :func:`read_manifest_alone`."""
    manifest = read_manifest_alone(folder)
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


def read_manifest_alone(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint, and verify it.

    Raises:
        RecipeError: the checkpoint is missing, truncated, altered or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise RecipeError(f"{folder}: has no checkpoint ({MANIFEST} is missing). Name a run folder or its model/.")
    try:
        manifest = json.loads(gzip.decompress(path.read_bytes()))
        digest = manifest.pop("sha256")
    except (OSError, EOFError, zlib.error, ValueError, KeyError, AttributeError) as error:
        raise RecipeError(f"{path}: is truncated or altered: not a manifest. Run the recipe again.") from error
    if digest != digest_of_manifest(manifest):
        raise RecipeError(f"{path}: is truncated or altered: its checksum differs. Run the recipe again.")
    if manifest["format"] not in READABLE_FORMATS:
        readable = " and ".join(map(str, READABLE_FORMATS))
        raise RecipeError(
            f"{path}: has format {manifest['format']}; this version reads {readable}. Update the package."
        )
    return manifest


def origin_of(module: LightningModule) -> Origin | None:
    """Return how ``module`` was built if it was loaded from a checkpoint, else None."""
    return vars(module).get(ORIGIN)


def model_folder(run: Path) -> Path:
    """The checkpoint folder of a run: ``model/`` in it, or itself."""
    return run if (run / MANIFEST).is_file() else RunFolder(run).model


def digest_of_manifest(manifest: dict[str, Any]) -> str:
    """Compute the checksum of a manifest's content, which the manifest itself carries."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
