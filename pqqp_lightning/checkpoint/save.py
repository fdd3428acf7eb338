"""Writing a packed checkpoint (:mod:`~pqqp_lightning.checkpoint.format`)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pqqp_lightning.checkpoint.construction import skeleton_of, why_not_described
from pqqp_lightning.checkpoint.encoding import stored_constraints, stored_tensors
from pqqp_lightning.checkpoint.format import FORMAT, Applied, digest_of_manifest, origin_of, read_manifest_alone
from pqqp_lightning.checkpoint.packing import pack_weight
from pqqp_lightning.checkpoint.probe import Probe
from pqqp_lightning.network.constraints import constraints_of, is_constrained
from pqqp_lightning.network.layers import layout_of, stored_weights
from pqqp_lightning.network.offload import offload_of
from pqqp_lightning.network.structure import dotted_name
from pqqp_lightning.storage.disk_tensors import DiskTensors
from pqqp_lightning.storage.files import new_folder, sha256_of, write_bytes
from pqqp_lightning.storage.run_folder import MANIFEST, WEIGHTS, checkpoint_bytes


def save_checkpoint(
    module: LightningModule,
    folder: Path,
    applied: Sequence[Applied] = (),
    extra: dict[str, Any] | None = None,
    skeleton: dict[str, Any] | None = None,
    probe: Probe | None = None,
) -> int:
    """Write the packed checkpoint of ``module`` into ``folder`` atomically, and return its bytes.

    Args:
        module: the model as measured.
        folder: replaced if it exists.
        applied: the stages that made it, in order. If ``module`` was loaded from a checkpoint, the stages of that
            checkpoint are added in front.
        extra: plain data to add to the manifest (records).
        skeleton: how to build the dense module, from
            :func:`~pqqp_lightning.checkpoint.construction.skeleton_of`; by default that of ``module`` itself.
        probe: what ``module`` computes, from :func:`~pqqp_lightning.checkpoint.probe.take_probe`; without one,
            nothing is compared after loading.
    """
    origin = origin_of(module)
    if origin is not None:
        applied = [*origin.applied, *applied]
        skeleton = origin.skeleton
    elif skeleton is None:
        skeleton = skeleton_of(module)
    with new_folder(folder) as temporary, DiskTensors(temporary) as disk:
        weights = temporary / WEIGHTS
        stored, described = _contents(module, applied, disk)
        try:
            save_file(stored, weights)
        except SafetensorError as error:  # safetensors reports a full disk this way
            raise OSError(None, str(error)) from error
        # The manifest comes after the weights, whose checksum it holds; then its own checksum covers both.
        manifest = {"format": FORMAT, "model": skeleton, **described, **(extra or {})}
        if skeleton is None:
            manifest["not_described"] = why_not_described(module)
        manifest["weights"] = {"bytes": weights.stat().st_size, "sha256": sha256_of(weights)}
        _write_manifest(temporary / MANIFEST, manifest)
        if probe is not None:
            probe.write(temporary)
    return checkpoint_bytes(folder)


def replace_extra(folder: Path, extra: dict[str, Any], outdated: str) -> None:
    """Add ``extra`` to the manifest of a checkpoint in place of its entry ``outdated``, atomically."""
    manifest = read_manifest_alone(folder)
    del manifest[outdated]
    _write_manifest(folder / MANIFEST, manifest | extra)


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with its own checksum, atomically."""
    whole = manifest | {"sha256": digest_of_manifest(manifest)}
    write_bytes(path, gzip.compress(json.dumps(whole).encode(), mtime=0))


def _contents(
    module: LightningModule, applied: Sequence[Applied], disk: DiskTensors
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors to store by name, and the manifest entries that describe them."""
    tensors, aliases = stored_tensors(module)
    weights = stored_weights(module)
    stored: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}  # of packed weights
    for name, tensor in offload_of(module).visit(tensors.items()):
        _, layer, hidden = weights.get(name, ("", None, False))
        if layer is not None and is_constrained(layer):
            constraints = stored_constraints(constraints_of(layer), hidden)
            parts, entries[name] = pack_weight(tensor, constraints, layout_of(layer))
            # On disk: the packed weights of a large model do not fit into memory next to the model.
            stored.update({f"{name}:{part}": disk.put(value) for part, value in parts.items()})
        else:
            stored[name] = tensor
    plans = []
    for position, item in enumerate(applied):
        # JSON cannot hold a plan's tensors: they go to the weights file.
        plain = {k: v for k, v in item.plan.items() if not isinstance(v, Tensor)}
        tensors_of_plan = {k: v for k, v in item.plan.items() if isinstance(v, Tensor)}
        stored.update({f"plan.{position}:{k}": v for k, v in tensors_of_plan.items()})
        plans.append({"class_path": dotted_name(item.stage), "plan": plain, "tensors": sorted(tensors_of_plan)})
    whole = {name: own_memory(tensor) for name, tensor in stored.items()}
    return whole, {"plans": plans, "packed": entries, "aliases": aliases}


def own_memory(tensor: Tensor) -> Tensor:
    """``tensor``, copied if it is not contiguous or shares its memory, which safetensors refuses."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.detach().clone(memory_format=torch.contiguous_format)
