"""What a result depends on, as one digest: the model's content, the data's, the seed, the trainer, and the code.

Two searches that ask for the same stages on the same model and data get the same address, whatever their names and
folders are; a changed weight, sample, knob, or line of code gets another one.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from pqqp_lightning.checkpoint import class_path, origin_of, skeleton_of
from pqqp_lightning.data.loaders import whole
from pqqp_lightning.data_source import DataSource
from pqqp_lightning.modules.constraints import constrained_layers
from pqqp_lightning.record import package_versions
from pqqp_lightning.seeding import keep_random_state, run_seed, seed_from
from pqqp_lightning.stage import Stage

DECIDING = ("precision", "accumulate_grad_batches", "gradient_clip_val", "limit_train_batches", "limit_val_batches")
"""Options of the trainer that decide the numbers: a run is not resumed with others."""

SAMPLES = 1024
"""So many evaluation samples and training samples are read in full; of more, the first ones and the number count."""


def base_fingerprint(trainer: Trainer, data: DataSource, targeted: Sequence[str]) -> str:
    """The digest of everything that results depend on besides the stages.

    Args:
        trainer: its precision, limits and processes.
        data: the dense model, and data that is set up.
        targeted: the layers that fractions are taken of.
    """
    settings = {name: str(getattr(trainer, name, None)) for name in DECIDING}
    settings |= {"ranks": str(trainer.world_size), "device": trainer.strategy.root_device.type}
    parts = [_model(data.module), _data(data), run_seed(), settings, list(targeted), package_versions(), _sources()]
    return _digest(parts)


def node_fingerprint(base: str, stages: Sequence[Stage]) -> str:
    """The digest of these stages, in this order, on that base."""
    described = [(class_path(s), s.name, s.options(), _source_of(type(s))) for s in stages]
    return _digest([base, described])


def digest_of(value: Any) -> str:
    """The digest of tensors, arrays and plain values, nested in any way."""
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _model(module: LightningModule) -> str:
    """Weights, their constraints, and what a loaded model was built from."""
    digest = hashlib.sha256(class_path(module).encode() + _source_of(type(module)).encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(_bytes(value))
    for name, _, constraints in constrained_layers(module):
        grid = constraints.grid
        digest.update(f"{name} {constraints.pattern} {grid and (grid.bits, grid.codebook)}".encode())
        for part in (constraints.mask_bits, *((grid.scale, grid.zero) if grid else ())):
            digest.update(b"-" if part is None else _bytes(part))
    origin = origin_of(module)
    for item in origin.applied if origin else ():
        digest.update(item.stage.__qualname__.encode())
        _update(digest, item.plan)
    digest.update(str(origin.skeleton if origin else skeleton_of(module)).encode())
    return digest.hexdigest()


def _data(data: DataSource) -> str:
    """The samples themselves, as they come out of the loaders."""
    digest = hashlib.sha256()
    with keep_random_state():
        seed_from(run_seed())  # what is drawn anew for every sample is drawn the same
        for part in _samples(data):
            _update(digest, part)
    return digest.hexdigest()


def _samples(data: DataSource) -> Iterator[Any]:
    if data.has_calibration_data():
        batches, _ = data.calibration_batches(0, 1, None)
        yield from batches
    for loader in _loaders(data.evaluation_loaders()):
        yield from _first(whole(loader))
    if data.has_training_data():
        for loader in _loaders(data.training_loaders()):
            dataset: Any = getattr(loader, "dataset", None)
            if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
                yield len(dataset)
                yield from (dataset[i] for i in range(min(len(dataset), 16)))  # may be augmented: a few will do
            yield getattr(loader, "batch_size", None)


def _first(loader: Any) -> Iterator[Any]:
    """The batches of the first samples, and how many batches there are in all."""
    yield getattr(loader, "batch_size", None)
    seen = 0
    for batch in loader:
        yield batch
        seen += getattr(loader, "batch_size", None) or 1
        if seen >= SAMPLES:
            break
    if hasattr(loader, "__len__"):
        yield len(loader)


def _loaders(given: Any) -> Iterable[Any]:
    if isinstance(given, dict):
        return given.values()
    return given if isinstance(given, list | tuple) else [given]


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {list(value.shape)}".encode() + _bytes(value))
    elif isinstance(value, np.ndarray):
        _update(digest, torch.from_numpy(np.ascontiguousarray(value)))
    elif isinstance(value, dict):
        for key in value:
            digest.update(str(key).encode())
            _update(digest, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _update(digest, item)
    else:
        digest.update(str(value).encode())


def _bytes(tensor: Tensor) -> Any:
    """The tensor's memory, without a copy where it lies on the processor in one piece."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


@cache
def _sources() -> str:
    """The digest of this package's code, stages included."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for file in sorted([*package.rglob("*.py"), *(package / "callbacks").glob("*.py")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _source_of(found: type) -> str:
    """The code of a class that is not ours, as far as it can be read; ours is in :func:`_sources`."""
    if found.__module__.startswith("pqqp_lightning."):
        return ""
    try:
        return inspect.getsource(found)
    except (OSError, TypeError):
        return ""
