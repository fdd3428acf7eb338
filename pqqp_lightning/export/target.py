"""The contract of a format that other programs load. A file in ``targets/`` defines a :class:`Target`."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor

from pqqp_lightning.errors import Problem
from pqqp_lightning.export.runtime_check import Agreement, compare_outputs
from pqqp_lightning.export.source import FinishedRun, Source, language_model_of
from pqqp_lightning.export.stock import StockModel, stock_model

DType = Literal["float16", "bfloat16", "float32"]
DTYPES: tuple[DType, ...] = ("float16", "bfloat16", "float32")
EXTRA = "pip install 'pqqp-lightning[export]'"
"""What installs the libraries of all targets."""


@dataclass(frozen=True)
class Runtime:
    """A program that loads the format, to compare its outputs with the run's.

    Attributes:
        name: as people know it.
        package: what pip installs.
        modules: what must be importable to run the script.
        script: a file in ``runtimes/``: reads the written model and inputs, writes outputs, without this package.
        largest_divergence: of a language model: the largest mean KL divergence (nats per token) that counts as
            agreement, by dtype.
        rounding_divergence: the same where inputs of layers are rounded, in any dtype.
        needs_tokenizer: whether it loads no model without a tokenizer.
    """

    name: str
    package: str
    modules: tuple[str, ...]
    script: str
    largest_divergence: dict[str, float] = field(default_factory=dict)
    rounding_divergence: float = 0.0
    needs_tokenizer: bool = False

    def missing(self) -> bool:
        """Whether a module is not installed."""
        return any(importlib.util.find_spec(module) is None for module in self.modules)


@dataclass(frozen=True)
class Exported(ABC):
    """What a target writes: a model of any kind.

    Attributes:
        source: the run.
        dtype: of everything that is not stored as codes.
        widen: whether codes may be stored in more bits than they need.
    """

    source: FinishedRun
    dtype: DType
    widen: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch names it."""
        return getattr(torch, self.dtype)

    def in_dtype(self, tensor: Tensor) -> Tensor:
        """A tensor in the exported dtype; integers stay as they are."""
        return tensor.to(self.torch_dtype) if tensor.is_floating_point() else tensor

    @property
    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Every tensor by name, in the dtype of the run."""

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """Those that files hold: a tied weight once."""

    @property
    @abstractmethod
    def problems(self) -> list[Problem]:
        """Why no program could build such a model."""

    @abstractmethod
    def compare(self, runtime: Runtime, folder: Path) -> Agreement:
        """Load what was written in ``runtime``, in another process, and compare its outputs with the run's own.

        Raises:
            RuntimeFailed: it does not load, or does not run.
        """

    @property
    @abstractmethod
    def compressible(self) -> list[str]:
        """The names of the weights that stages compress."""

    @property
    @abstractmethod
    def described(self) -> str:
        """The dense model where no recipe names it: "a llama model"."""

    @property
    @abstractmethod
    def rewritten(self) -> list[str]:
        """What was changed so that the format can hold it, in whole sentences."""

    @property
    def incomplete(self) -> list[str]:
        """What the run does not have and users need, in whole sentences."""
        return []

    def missing_for(self, runtime: Runtime) -> str:
        """What ``runtime`` needs to load the model and the run does not have; empty if nothing."""
        return ""


@dataclass(frozen=True)
class ExportedModel(Exported):
    """A language model.

    Attributes:
        source: the run.
        stock: its network as an ordinary transformers model.
    """

    source: Source
    stock: StockModel

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.stock.weights

    def stored(self) -> dict[str, Tensor]:
        return self.stock.stored()

    @property
    def problems(self) -> list[Problem]:
        return [replace(problem, value=str(self.source.folder)) for problem in self.stock.problems]

    def compare(self, runtime: Runtime, folder: Path) -> Agreement:
        return compare_outputs(self, runtime, folder)

    @property
    def compressible(self) -> list[str]:
        return [name for name in self.weights if name.endswith("proj.weight")]

    @property
    def described(self) -> str:
        return f"a {self.stock.config.model_type} model"

    @property
    def rewritten(self) -> list[str]:
        return self.stock.rewritten

    @property
    def incomplete(self) -> list[str]:
        return ["The run has no tokenizer; copy one into the folder."] if self.source.tokenizer is None else []

    def missing_for(self, runtime: Runtime) -> str:
        return "a tokenizer" if runtime.needs_tokenizer and self.source.tokenizer is None else ""


Model = TypeVar("Model", bound=Exported)


class Target(ABC, Generic[Model]):
    """A format. Subclasses are found by their ``name``, and none of their methods changes the model.

    It is a format for language models unless :meth:`prepare` makes something else of the run.

    Attributes:
        name: the value of ``--to``.
        summary: what it is, in a few words.
        loading: how to load the result, by program: one line of code or a command each; ``{out}`` stands for the path.
        requires: the modules that writing and decoding need besides this package's own dependencies.
        file: the one file that the format consists of; ``--out`` may name it. Empty for a folder.
        runtime: the program that the check loads the result with, or None.
        keeps_adapters: whether adapters that a run kept apart stay apart; else they are added to the weights.
        keeps_rounding: whether it can say that inputs of layers are rounded.
        dtypes: those that it can hold, the default one first.
        card: the fields of the model card's head.
        writes: which models, in words.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    loading: ClassVar[dict[str, str]] = {}
    requires: ClassVar[tuple[str, ...]] = ()
    file: ClassVar[str] = ""
    runtime: Runtime | None = None
    keeps_adapters: ClassVar[bool] = False
    keeps_rounding: ClassVar[bool] = False
    dtypes: ClassVar[tuple[DType, ...]] = DTYPES
    writes: ClassVar[str] = "language models"
    card: ClassVar[dict[str, str]] = {"library_name": "transformers", "pipeline_tag": "text-generation"}

    @property
    def runtimes(self) -> tuple[Runtime, ...]:
        """The programs that the check loads the result with."""
        return (self.runtime,) if self.runtime else ()

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

    def prepare(self, run: FinishedRun, *, dtype: DType, widen: bool, pad: bool) -> Model:
        """What the target writes of a run.

        Raises:
            RecipeError: it does not write this kind of model.
        """
        source = language_model_of(run)
        stock = stock_model(
            source.network,
            source.dense_config,
            pad=pad,
            uneven_shapes=self.uneven_shapes,
            keep_adapters=self.keeps_adapters,
            keep_rounding=self.keeps_rounding,
        )
        model: Any = ExportedModel(source, dtype, widen, stock)
        return model

    @abstractmethod
    def problems(self, model: Model) -> list[Problem]:
        """Everything that this format cannot hold, with the way out, before anything is written."""

    @abstractmethod
    def write(self, model: Model, folder: Path) -> None:
        """Write the model into ``folder``, which is empty."""

    @abstractmethod
    def decoded(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """Read the written files with the format's own library: each tensor by name, decoded."""

    def expected(self, model: Model) -> Iterator[tuple[str, Tensor]]:
        """What :meth:`decoded` must return bit for bit: by default every stored weight in the exported dtype."""
        for name, tensor in model.stored().items():
            yield name, model.in_dtype(tensor)

    def remarks(self, model: Model) -> list[str]:
        """What the format loses or makes larger, in whole sentences; said after the export and in the model card."""
        return []
