"""Digests of everything that a result depends on: model, data, seed, trainer, stages and code.

Two searches for the same stages on the same model and data find the same result, under any names and in any folders. A
changed weight, sample, argument or source file changes the digest.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from torch import Tensor, nn

import pqqp_lightning
from pqqp_lightning.checkpoint.construction import skeleton_of
from pqqp_lightning.checkpoint.format import origin_of
from pqqp_lightning.data.loaders import undivided_loader
from pqqp_lightning.network.constraints import constrained_layers
from pqqp_lightning.network.offload import offload_of
from pqqp_lightning.network.structure import class_path
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.trainer import Trainer
from pqqp_lightning.seeding import keep_random_state, run_seed, seed_from
from pqqp_lightning.stages.arguments import arguments_of
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.storage.records import package_versions

# Values whose repr says everything about them.
PLAIN = (str, bytes, int, float, complex, Path, torch.dtype, torch.device, torch.Size, type(None))

MAX_DEPTH = 12
"""Levels of objects within objects that are digested; deeper ones are ignored."""

RESULT_OPTIONS = (
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "limit_train_batches",
    "limit_val_batches",
)
"""Trainer options that change the numbers: a run is not resumed with other values."""

SWITCHES = ("fast_dev_run", "calibration_precision")
"""Trainer options that change the numbers as well; a resumed run compares the latter apart, which older runs lack."""

TRAINING_OPTIONS = ("max_steps", "min_steps", "min_epochs", "gradient_clip_algorithm", "overfit_batches")
"""Trainer options that change finetuning only."""

EVALUATION_SAMPLES = 1024
"""Evaluation samples to digest, from the first on; of a larger set, its size is digested as well."""

TRAINING_SAMPLES = 64
"""Training samples to digest, at equal distances: reading all of a large set takes longer than the search."""


def base_fingerprint(trainer: Trainer, data: RunData, targeted: Sequence[str]) -> str:
    """The digest of everything that all results of a search depend on, without stages and training.

    Args:
        trainer: for its precision, limits and number of processes.
        data: the dense model, and its data, set up.
        targeted: names of the layers that sparsity and bits are counted over.
    """
    settings = {name: str(getattr(trainer, name, None)) for name in (*RESULT_OPTIONS, *SWITCHES)}
    settings["ranks"] = str(trainer.world_size)
    settings["device"] = trainer.strategy.root_device.type
    module = data.module
    samples = _digest_samples(_evaluation_samples(data))
    code = [package_sources(), sources_of([type(part) for part in module.modules()])]
    return digest_of([_digest_model(module), samples, run_seed(), settings, list(targeted), package_versions(), code])


def training_fingerprint(trainer: Trainer, data: RunData) -> str:
    """The digest of what only finetuning depends on: optimizer, schedule, training data and the user's callbacks."""
    settings = {name: str(getattr(trainer, name, None)) for name in TRAINING_OPTIONS}
    # The module's own attributes, such as its optimizer: those of every LightningModule say nothing about training.
    bare = vars(LightningModule())
    module = {name: value for name, value in vars(data.module).items() if name not in bare}
    without_effect = (Stage, Checkpoint, ModelSummary, ProgressBar)  # stages are digested one by one
    callbacks = [c for c in getattr(trainer, "callbacks", []) if not isinstance(c, without_effect)]
    given = trainer.recipe.get("model")
    code = sources_of([type(callback) for callback in callbacks])
    return digest_of([settings, module, given, callbacks, code, _digest_samples(_training_samples(data))])


def stage_fingerprint(stage: Stage) -> str:
    """The digest of a stage that has not run yet: its arguments, its name and its code."""
    options = stage.arguments()
    # A stage that stores an argument under another name has incomplete options: all of its attributes count then.
    held = {} if options.keys() >= arguments_of(type(stage)).keys() else vars(stage)
    return digest_of([class_path(stage), stage.name, options, held, sources_of([type(stage)])])


def node_fingerprint(base: str, training: str, stages: Sequence[str]) -> str:
    """The digest of a sequence of stages.

    Args:
        base: from :func:`base_fingerprint`.
        training: from :func:`training_fingerprint` if a stage of the sequence trains, else empty.
        stages: the stages' digests, in order.
    """
    return digest_of([base, training, list(stages)])


def _digest_model(module: LightningModule) -> str:
    """The digest of the weights, their constraints, and the stages that a loaded model went through."""
    digest = hashlib.sha256(class_path(module).encode())
    for name, value in offload_of(module).visit(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(tensor_bytes(value))
    for name, _, constraints in constrained_layers(module):
        grid = constraints.grid
        digest.update(f"{name} {constraints.pattern} {grid and (grid.bits, grid.codebook)}".encode())
        tensors = [constraints.mask_bits]
        if grid:
            tensors += [grid.scale, grid.zero]
        for tensor in tensors:
            digest.update(b"-" if tensor is None else tensor_bytes(tensor))
    origin = origin_of(module)
    applied = origin.applied if origin else ()
    for item in applied:
        digest.update(item.stage.__qualname__.encode())
        digest.update(digest_of(item.plan).encode())
    digest.update(str(origin.skeleton if origin else skeleton_of(module)).encode())
    digest.update(digest_of(_plain_attributes(module)).encode())
    return digest.hexdigest()


def _plain_attributes(model: nn.Module) -> dict[str, Any]:
    """The numbers, flags and words that the modules of ``model`` hold.

    They may decide what it computes (a slope, a residual connection), and hyperparameters record only some of them. A
    word that is a path says where something lies on this machine; it must not tell machines apart.
    """
    plain: dict[str, Any] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            parts = value if isinstance(value, tuple | list) else [value]
            is_plain = all(part is None or isinstance(part, bool | int | float | str) for part in parts)
            is_path = any(isinstance(part, str) and ("/" in part or "\\" in part) for part in parts)
            if is_plain and not is_path and attribute != "training" and not attribute.startswith("_"):
                plain[f"{name}.{attribute}"] = value
    return plain


def _digest_samples(parts: Iterable[Any]) -> str:
    """The digest of samples as the loaders yield them."""
    with keep_random_state():
        seed_from(run_seed())  # random augmentation must give the same samples in every search
        return digest_of([digest_of(part) for part in parts])


def _evaluation_samples(data: RunData) -> Iterator[Any]:
    """The calibration batches and the first evaluation batches."""
    if data.has_calibration_data():
        batches, _ = data.calibration_batches(0, 1, None)
        yield from batches
    for loader in _loaders(data.evaluation_loaders()):
        yield from _first_batches(undivided_loader(loader))


def _training_samples(data: RunData) -> Iterator[Any]:
    """The settings of the training loaders and samples at equal distances."""
    for loader in _loaders(data.training_loaders()):
        dataset: Any = getattr(loader, "dataset", None)
        yield [getattr(loader, name, None) for name in ("batch_size", "drop_last", "collate_fn")]
        yield plain_settings(getattr(loader, "sampler", None))  # not its order: drawing it may change its state
        if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
            yield len(dataset)
            step = max(1, len(dataset) // TRAINING_SAMPLES)
            for index in range(0, len(dataset), step):
                yield dataset[index]


def _first_batches(loader: Any) -> Iterator[Any]:
    """The batches of the first samples, and the number of all batches."""
    batch_size = getattr(loader, "batch_size", None)
    yield batch_size
    samples = 0
    for batch in loader:
        yield batch
        samples += batch_size or 1
        if samples >= EVALUATION_SAMPLES:
            break
    if hasattr(loader, "__len__"):
        yield len(loader)


def _loaders(given: Any) -> Iterable[Any]:
    """The loaders in any of the forms that Lightning accepts: one, a list or a dict."""
    if isinstance(given, dict):
        return given.values()
    return given if isinstance(given, list | tuple) else [given]


def digest_of(value: Any) -> str:
    """The digest of tensors, arrays, plain values, and objects that hold them at any depth.

    Of a network only its class counts; :func:`base_fingerprint` digests the model's weights.
    """
    digest = hashlib.sha256()
    _update(digest, value, ())
    return digest.hexdigest()


def plain_settings(value: Any) -> dict[str, Any]:
    """The class of an object, and its attributes that are plain values."""
    attributes = getattr(value, "__dict__", {})
    settings = {name: held for name, held in attributes.items() if isinstance(held, PLAIN)}
    return {"class": type(value), **settings}


@cache
def package_sources() -> str:
    """The digest of this package's code, built-in stages included."""
    digest = hashlib.sha256()
    package = Path(pqqp_lightning.__file__).parent  # the whole package: every room can change the numbers
    # callbacks/ is a symlink in a checkout, and rglob does not follow it in every version of Python.
    for file in sorted([*package.rglob("*.py"), *(package / "callbacks").glob("*.py")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def sources_of(classes: Iterable[type]) -> list[str]:
    """Digests of the source files that define ``classes`` and their bases; unreadable ones are left out.

    This package's files are left out, too: :func:`package_sources` has them.
    """
    this_package = __name__.partition(".")[0]
    digests = set()
    for cls in classes:
        for base in cls.__mro__:
            if base.__module__.partition(".")[0] != this_package:
                digests.add(_source_digest(base))
    return sorted(digests - {""})


@cache
def _source_digest(cls: type) -> str:
    """The digest of the file of ``cls``, since the class may call functions beside it; empty if unreadable."""
    try:
        file = inspect.getsourcefile(cls)
        if file and Path(file).is_file():
            return hashlib.sha256(Path(file).read_bytes()).hexdigest()
        return hashlib.sha256(inspect.getsource(cls).encode()).hexdigest()  # a class from a notebook
    except (OSError, TypeError):
        return ""


def tensor_bytes(tensor: Tensor) -> Any:
    """The tensor's bytes; a contiguous CPU tensor is not copied."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def _update(digest: Any, value: Any, within: tuple[int, ...]) -> None:
    """Add ``value`` to ``digest``; ``within`` holds the ids of the objects around it, to stop at cycles.

    The type and the brackets keep ``["ab"]`` apart from ``["a", "b"]``, and ``1`` from ``"1"``.
    """
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
        pass  # its class alone counts
    elif isinstance(value, type | BuiltinFunctionType):
        digest.update(f"{value.__module__}.{value.__qualname__}".encode())
    elif id(value) not in within and len(within) < MAX_DEPTH:
        for part in _parts(value):
            _update(digest, part, (*within, id(value)))
    digest.update(b")")


def _parts(value: Any) -> Iterable[Any]:
    """The contents of an object, in an order that does not depend on the process."""
    if isinstance(value, Mapping):
        return chain.from_iterable(value.items())
    if isinstance(value, set | frozenset):
        return sorted(map(digest_of, value))
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__func__, plain_settings(value.__self__)]
    if isinstance(value, FunctionType):  # by its code: an optimizer may be given as a lambda
        return [value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, *_enclosed(value)]
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, value.co_consts]
    try:
        return [vars(value)]
    except TypeError:
        slots = chain.from_iterable(getattr(cls, "__slots__", ()) for cls in type(value).__mro__)
        return [getattr(value, name, None) for name in slots]


def _enclosed(function: FunctionType) -> Iterable[Any]:
    """The values of the variables that a function takes from the functions around it."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # the variable has no value yet
            yield None
