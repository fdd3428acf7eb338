"""Digests of content: of tensors and plain values, of objects by what they hold, and of the code behind a class."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (str, bytes, int, float, complex, Path, torch.dtype, torch.device, torch.Size, type(None))
DEEPEST = 12
"""Objects within objects; what lies deeper does not count."""


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
    package = Path(__file__).parent
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
