"""What a result depends on, as one digest: the model's content, the data's, the seed, the trainer, and the code.

Two searches that ask for the same stages on the same model and data get the same address, whatever their names and
folders are; a changed weight, sample, knob, or file of code gets another one.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from torch import Tensor, nn

import pqqp_lightning
from pqqp_lightning.checkpoint.format import origin_of, skeleton_of
from pqqp_lightning.data.loaders import undivided_loader
from pqqp_lightning.network.constraints import constrained_layers
from pqqp_lightning.network.structure import class_path
from pqqp_lightning.runs.run_data import DataSource
from pqqp_lightning.seeding import keep_random_state, run_seed, seed_from
from pqqp_lightning.stages.knobs import knobs
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.storage.records import package_versions

PLAIN = (str, bytes, int, float, complex, Path, torch.dtype, torch.device, torch.Size, type(None))

DEEPEST = 12
"""Objects within objects; what lies deeper does not count."""


DECIDING = ("precision", "accumulate_grad_batches", "gradient_clip_val", "limit_train_batches", "limit_val_batches")
"""Options of the trainer that decide the numbers: a run is not resumed with others."""

TRAINING = ("max_steps", "min_steps", "min_epochs", "gradient_clip_algorithm", "overfit_batches")
"""Further ones that decide what finetuning does."""

SAMPLES = 1024
"""So many evaluation samples are read in full; of more, the first ones and the number count."""

TRAINING_SAMPLES = 64
"""Of the training samples so many count, taken at equal distances."""


def base_fingerprint(trainer: Trainer, data: DataSource, targeted: Sequence[str]) -> str:
    """The digest of everything that results depend on besides the stages, and besides what training alone depends on.

    Args:
        trainer: its precision, limits and processes.
        data: the dense model, and data that is set up.
        targeted: the layers that fractions are taken of.
    """
    settings = {name: str(getattr(trainer, name, None)) for name in (*DECIDING, "fast_dev_run")}
    settings |= {"ranks": str(trainer.world_size), "device": trainer.strategy.root_device.type}
    module = data.module
    code = [package_sources(), sources_of([type(m) for m in module.modules()])]
    return digest_of(
        [_model(module), _sampled(_samples(data)), run_seed(), settings, list(targeted), package_versions(), code]
    )


def training_fingerprint(trainer: Trainer, data: DataSource) -> str:
    """The digest of what finetuning depends on besides: optimizer, schedule, training data, and further callbacks."""
    settings = {name: str(getattr(trainer, name, None)) for name in TRAINING}
    bare = vars(LightningModule())
    module = {name: value for name, value in vars(data.module).items() if name not in bare}
    idle = (Stage, Checkpoint, ModelSummary, ProgressBar)
    callbacks = [c for c in getattr(trainer, "callbacks", []) if not isinstance(c, idle)]
    given = getattr(trainer, "recipe", {}).get("model")
    code = sources_of([type(callback) for callback in callbacks])
    return digest_of([settings, module, given, callbacks, code, _sampled(_training_samples(data))])


def stage_fingerprint(stage: Stage) -> str:
    """The digest of a stage that has done nothing yet: its knobs, its name and its code.

    Where it keeps an argument under another name than its constructor's, everything that it holds counts.
    """
    options = stage.options()
    held = {} if options.keys() >= knobs(type(stage)).keys() else vars(stage)
    return digest_of([class_path(stage), stage.name, options, held, sources_of([type(stage)])])


def node_fingerprint(base: str, training: str, stages: Sequence[str]) -> str:
    """The digest of these stages, by their own digests, in this order, on that base; ``training`` if one trains."""
    return digest_of([base, training, list(stages)])


def _model(module: LightningModule) -> str:
    """Weights, their constraints, and what a loaded model was built from."""
    digest = hashlib.sha256(class_path(module).encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(tensor_bytes(value))
    for name, _, constraints in constrained_layers(module):
        grid = constraints.grid
        digest.update(f"{name} {constraints.pattern} {grid and (grid.bits, grid.codebook)}".encode())
        for part in (constraints.mask_bits, *((grid.scale, grid.zero) if grid else ())):
            digest.update(b"-" if part is None else tensor_bytes(part))
    origin = origin_of(module)
    for item in origin.applied if origin else ():
        digest.update(item.stage.__qualname__.encode())
        digest.update(digest_of(item.plan).encode())
    digest.update(str(origin.skeleton if origin else skeleton_of(module)).encode())
    return digest.hexdigest()


def _sampled(parts: Iterable[Any]) -> str:
    """The samples themselves, as they come out of the loaders."""
    with keep_random_state():
        seed_from(run_seed())  # what is drawn anew for every sample is drawn the same
        return digest_of([digest_of(part) for part in parts])


def _samples(data: DataSource) -> Iterator[Any]:
    if data.has_calibration_data():
        batches, _ = data.calibration_batches(0, 1, None)
        yield from batches
    for loader in _loaders(data.evaluation_loaders()):
        yield from _first(undivided_loader(loader))


def _training_samples(data: DataSource) -> Iterator[Any]:
    for loader in _loaders(data.training_loaders()):
        dataset: Any = getattr(loader, "dataset", None)
        yield [getattr(loader, name, None) for name in ("batch_size", "drop_last", "collate_fn")]
        yield own_settings(getattr(loader, "sampler", None))  # not its samples: to draw them may move it on
        if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
            yield len(dataset)
            yield from (dataset[i] for i in range(0, len(dataset), max(1, len(dataset) // TRAINING_SAMPLES)))


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


def digest_of(value: Any) -> str:
    """The digest of tensors, arrays, plain values and objects that hold such, nested in any way.

    A network counts as its class alone: its weights are digested where they are meant.
    """
    digest = hashlib.sha256()
    _update(digest, value, ())
    return digest.hexdigest()


def own_settings(value: Any) -> dict[str, Any]:
    """The class of an object and those of its attributes that are plain values."""
    settings = {name: held for name, held in getattr(value, "__dict__", {}).items() if isinstance(held, PLAIN)}
    return {"class": type(value), **settings}


@cache
def package_sources() -> str:
    """The digest of this package's code, stages included."""
    digest = hashlib.sha256()
    package = Path(pqqp_lightning.__file__).parent  # not this file's folder: all of the package decides the numbers
    for file in sorted([*package.rglob("*.py"), *(package / "callbacks").glob("*.py")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def sources_of(classes: Iterable[type]) -> list[str]:
    """Digests of the files that define ``classes`` and their bases, as far as they can be read.

    A whole file counts, with the functions that stand beside the class; this package's are in :func:`package_sources`.
    """
    ours = __name__.partition(".")[0]
    bases = {base for cls in classes for base in cls.__mro__ if base.__module__.partition(".")[0] != ours}
    return sorted({_source(base) for base in bases} - {""})


@cache
def _source(cls: type) -> str:
    try:
        file = inspect.getsourcefile(cls)
        text = Path(file).read_bytes() if file and Path(file).is_file() else inspect.getsource(cls).encode()
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(text).hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """The tensor's memory, without a copy where it lies on the processor in one piece."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def _update(digest: Any, value: Any, within: tuple[int, ...]) -> None:
    """Add ``value`` with its type in brackets, so that neither borders nor kinds can be mistaken."""
    digest.update(f"({type(value).__module__}.{type(value).__qualname__} ".encode())
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {list(value.shape)} ".encode())
        digest.update(tensor_bytes(value))
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        digest.update(f"{value.dtype} {value.shape} ".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    elif isinstance(value, PLAIN):
        digest.update(repr(value).encode())
    elif isinstance(value, nn.Module):
        pass
    elif isinstance(value, type | BuiltinFunctionType):
        digest.update(f"{value.__module__}.{value.__qualname__}".encode())
    elif id(value) not in within and len(within) < DEEPEST:
        for part in _parts(value):
            _update(digest, part, (*within, id(value)))
    digest.update(b")")


def _parts(value: Any) -> Iterable[Any]:
    """What an object holds."""
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, set | frozenset):
        return sorted(map(digest_of, value))
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__func__, own_settings(value.__self__)]
    if isinstance(value, FunctionType):
        return [value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, *_enclosed(value)]
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, value.co_consts]
    try:
        return [vars(value)]
    except TypeError:
        slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
        return [getattr(value, name, None) for name in slots]


def _enclosed(function: FunctionType) -> Iterable[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            yield None
