"""What an export reads: the run folder, and nothing outside of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from torch import Tensor

from pqqp_lightning.checkpoint.format import model_folder, origin_of
from pqqp_lightning.checkpoint.load import load_quietly
from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.storage.files import read_json
from pqqp_lightning.storage.run_folder import RunFolder, check_finished, checkpoint_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SAMPLES = 4
"""Evaluation samples on which outputs are compared."""
TOKENS = 256
"""Tokens of each."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of any model.

    Attributes:
        folder: the run folder, or the checkpoint folder in it.
        module: with the run's weights, structure and constraints.
        checkpoint_bytes: of the run's own checkpoint.
        report: ``report.json``, or an empty dict.
        recipe: the text of the recipe; empty for a run that was started from Python.
    """

    folder: Path
    module: LightningModule
    checkpoint_bytes: int
    report: dict[str, Any]
    recipe: str

    @property
    def base_model(self) -> str | None:
        """The hub id, path or name of the model that the run started from, if its recipe names one."""
        model = (self.report.get("recipe") or {}).get("model") or {}
        name = (model.get("init_args") or {}).get("model") if isinstance(model, dict) else None
        return name if isinstance(name, str) else None

    @property
    def skeleton(self) -> dict[str, Any]:
        """The arguments that build the dense module; empty if the checkpoint does not know them."""
        origin = origin_of(self.module)
        return dict((origin.skeleton or {}).get("init_args") or {}) if origin else {}


@dataclass(frozen=True)
class Source(FinishedRun):
    """A finished run of a language model.

    Attributes:
        network: the transformers model with the run's weights, structure and constraints.
        dense_config: the configuration of the model before any stage.
    """

    network: PreTrainedModel
    dense_config: PretrainedConfig

    @property
    def tokenizer(self) -> Path | None:
        """The folder with the tokenizer and the generation config; None if the run has none."""
        folder = RunFolder(self.folder).tokenizer
        return folder if folder.is_dir() else None

    def samples(self) -> Tensor:
        """Token ids [samples, tokens] to compare outputs on: the run's evaluation samples, else random ones."""
        file = RunFolder(self.folder).samples
        if file.is_file():
            ids = load_file(file)["input_ids"]
        else:
            vocabulary = len(self.network.get_input_embeddings().weight)  # type: ignore[arg-type]
            ids = torch.randint(0, vocabulary, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
        longest = getattr(self.network.config, "max_position_embeddings", None) or TOKENS
        return ids[:SAMPLES, : min(TOKENS, longest)]

    def has_samples(self) -> bool:
        """Whether the run kept evaluation samples."""
        return RunFolder(self.folder).samples.is_file()


def read_run(run: Path) -> FinishedRun:
    """Load a finished run.

    Raises:
        RecipeError: the folder is not a finished run's, or is damaged.
    """
    if problems := check_finished(run):
        raise RecipeError(problems)
    files = RunFolder(run)
    return FinishedRun(
        folder=run,
        module=load_quietly(model_folder(run)),
        checkpoint_bytes=checkpoint_bytes(model_folder(run)),
        report=read_json(files.report) if files.report.is_file() else {},
        recipe=files.recipe.read_text(encoding="utf-8") if files.recipe.is_file() else "",
    )


def language_model_of(run: FinishedRun) -> Source:
    """The run as one of a language model.

    Raises:
        RecipeError: it holds another kind of model.
    """
    network = network_of(run.module, run.folder)
    return Source(**vars(run), network=network, dense_config=_dense_config(run, network))


def network_of(module: LightningModule, run: Path) -> PreTrainedModel:
    """The language model inside a loaded module.

    Raises:
        RecipeError: the module holds none.
    """
    network: Any = getattr(module, "model", None)
    if is_language_model(network):
        return network
    text = f"holds {type(module).__name__}, which is not a language model of transformers"
    way_out = "Use --to onnx, which writes other models."
    raise RecipeError(Problem("run", str(run), text, way_out))


def is_language_model(network: object) -> bool:
    """Whether it is one of transformers."""
    from transformers import PreTrainedModel

    return isinstance(network, PreTrainedModel) and network.can_generate()


def _dense_config(run: FinishedRun, network: PreTrainedModel) -> PretrainedConfig:
    """The configuration in the checkpoint, which describes the model before its stages."""
    settings = run.skeleton.get("model")
    return type(network.config).from_dict(dict(settings)) if isinstance(settings, dict) else network.config
