"""The contract of a format that other programs load. A file in ``targets/`` defines a :class:`Target`."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pqqp_lightning.errors import Problem
from pqqp_lightning.export.source import Source
from pqqp_lightning.export.stock import StockModel

DType = Literal["float16", "bfloat16", "float32"]
EXTRA = "pip install 'pqqp-lightning[export]'"
"""What installs the libraries of all targets."""


@dataclass(frozen=True)
class Runtime:
    """A program that loads the format, to compare its outputs with the run's.

    Attributes:
        name: as people know it.
        package: what pip installs.
        modules: what must be importable to run the script.
        script: a file in ``runtimes/``: reads a folder and token ids, writes logits, without this package.
        largest_divergence: the largest mean KL divergence (nats per token) that counts as agreement, by dtype.
        needs_tokenizer: whether it loads no model without a tokenizer.
    """

    name: str
    package: str
    modules: tuple[str, ...]
    script: str
    largest_divergence: dict[str, float]
    needs_tokenizer: bool = False

    def missing(self) -> bool:
        """Whether a module is not installed."""
        return any(importlib.util.find_spec(module) is None for module in self.modules)


@dataclass(frozen=True)
class ExportedModel:
    """What a target writes.

    Attributes:
        source: the run.
        stock: its network as an ordinary transformers model.
        dtype: of everything that is not stored as codes.
        widen: whether codes may be stored in more bits than they need.
    """

    source: Source
    stock: StockModel
    dtype: DType
    widen: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch names it."""
        return getattr(torch, self.dtype)

    def in_dtype(self, tensor: Tensor) -> Tensor:
        """A tensor in the exported dtype; integers stay as they are."""
        return tensor.to(self.torch_dtype) if tensor.is_floating_point() else tensor


class Target(ABC):
    """A format. Subclasses are found by their ``name``, and none of their methods changes the model.

    Attributes:
        name: the value of ``--to``.
        summary: what it is, in a few words.
        loading: how to load the result, by program: one line of code or a command each; ``{out}`` stands for the path.
        requires: the modules that writing and decoding need besides this package's own dependencies.
        file: the one file that the format consists of; ``--out`` may name it. Empty for a folder.
        library: which the hub names for the folder.
        runtime: the program that the check loads the result with, or None.
        keeps_adapters: whether adapters that a run kept apart stay apart; else they are added to the weights.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    loading: ClassVar[dict[str, str]] = {}
    requires: ClassVar[tuple[str, ...]] = ()
    file: ClassVar[str] = ""
    runtime: Runtime | None = None
    library: ClassVar[str] = "transformers"
    keeps_adapters: ClassVar[bool] = False

    def check_installed(self) -> list[Problem]:
        """The problem if a library is missing."""
        missing = [module for module in self.requires if importlib.util.find_spec(module) is None]
        if not missing:
            return []
        text = f"needs {', '.join(missing).replace('_', '-')}, which is not installed"
        return [Problem("to", self.name, text, f"Install it: {EXTRA}.")]

    def is_file(self, out: Path) -> bool:
        """Whether ``out`` names the format's one file, not a folder to put it into."""
        return bool(self.file) and out.suffix.lower() == Path(self.file).suffix

    def loading_words(self, out: Path) -> dict[str, str]:
        """:attr:`loading` for an export at ``out``."""
        path = out if self.is_file(out) or not self.file else out / self.file
        return {program: words.format(out=path) for program, words in self.loading.items()}

    def uneven_shapes(self, stock: StockModel, expected: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The shapes to store where the blocks of a model have different widths.

        Args:
            stock: the model with its own widths.
            expected: the tensors that its configuration describes, which has one width for all blocks.

        Returns:
            Tensors on the meta device, or None where the format needs one width, as most do.
        """
        return None

    @abstractmethod
    def problems(self, model: ExportedModel) -> list[Problem]:
        """Everything that this format cannot hold, with the way out, before anything is written."""

    @abstractmethod
    def write(self, model: ExportedModel, folder: Path) -> None:
        """Write the model into ``folder``, which is empty."""

    @abstractmethod
    def decoded(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """Read the written files with the format's own library: each tensor by name, decoded."""

    def expected(self, model: ExportedModel) -> Iterator[tuple[str, Tensor]]:
        """What :meth:`decoded` must return bit for bit: by default every stored weight in the exported dtype."""
        for name, tensor in model.stock.stored().items():
            yield name, model.in_dtype(tensor)

    def remarks(self, model: ExportedModel) -> list[str]:
        """What the format loses or makes larger, in whole sentences; said after the export and in the model card."""
        return []
