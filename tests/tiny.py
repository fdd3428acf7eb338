"""Tiny models and data that tests share: a run of the whole engine on one of them takes about a second."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from pqqp_lightning import Stage, Trainer
from pqqp_lightning.data import ImageData, TokenData
from pqqp_lightning.models import CausalLM, ImageClassifier
from pqqp_lightning.stages.arguments import required
from pqqp_lightning.stages.discovery import known_stages
from pqqp_lightning.storage.run_folder import WEIGHTS

ACCELERATOR = os.environ.get("TEST_ACCELERATOR", "cpu")
"""``TEST_ACCELERATOR=gpu`` runs the tests that use :func:`trainer` or the recipe of ``command_line`` on a GPU."""

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 64,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 64,
}
TOKENS = 16


def token_rows(rows: int, seed: int = 0, vocabulary: int = 64) -> Tensor:
    """Random token ids [rows, TOKENS]."""
    return torch.randint(0, vocabulary, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))


def tensor_bytes(folder: Path) -> int:
    """Bytes of the tensors in a checkpoint: the header, which outweighs a toy model's weights, is left out."""
    weights = folder / WEIGHTS
    with weights.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    return weights.stat().st_size - 8 - header_bytes


def write_tokens(folder: Path, calibration: int = 8, evaluation: int = 4, train: int = 8) -> dict[str, str]:
    """The ``init_args`` of a TokenData on files in ``folder``."""
    arguments = {}
    for seed, (name, rows) in enumerate({"calibration": calibration, "evaluation": evaluation, "train": train}.items()):
        arguments[name] = str(folder / f"{name}.npy")
        np.save(arguments[name], token_rows(rows, seed).numpy())
    return arguments


def regression_data(samples: int = 24, seed: int = 0) -> TensorDataset:
    """Inputs [samples, 8] and targets [samples, 2] of a noisy nonlinear map."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 8, generator=generator) @ torch.randn(8, 8, generator=torch.Generator().manual_seed(99))
    return TensorDataset(x, torch.stack([x[:, :4].sum(1).tanh(), x[:, 4:].sum(1).sin()], dim=1))


def regression_loader(samples: int = 24, seed: int = 0, batch_size: int = 8, shuffle: bool = False) -> DataLoader[Any]:
    """A plain DataLoader of :func:`regression_data`."""
    return DataLoader(regression_data(samples, seed), batch_size=batch_size, shuffle=shuffle)


class Block(nn.Module):
    """x + a small network of x."""

    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.dropout(torch.relu(self.up(x))))


class Regressor(LightningModule):
    """An ordinary user's module: no base class of ours, a torchmetrics metric, its own optimizer and schedule.

    Args:
        blocks: residual blocks between embedding and head.
        optimizer: its class.
        schedule: makes a per-epoch learning-rate schedule, if given.
        dropout: in every block.
        options: the optimizer's arguments.
    """

    def __init__(
        self,
        blocks: int = 2,
        optimizer: Any = torch.optim.SGD,
        schedule: Any = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inlet = nn.Linear(8, 8)
        self.blocks = nn.Sequential(*[Block(dropout=dropout) for _ in range(blocks)])
        self.head = nn.Linear(8, 2)
        self.mse = MeanSquaredError()
        self._optimizer, self._schedule, self._options = optimizer, schedule, options or {"lr": 0.05}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.inlet(x)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.mse(self(batch[0]), batch[1])
        self.log("mse", self.mse, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.parameters(), **self._options)
        return optimizer if self._schedule is None else ([optimizer], [self._schedule(optimizer)])


class Lopsided(Regressor):
    """Its first block adds much, its second next to nothing."""

    def __init__(self) -> None:
        super().__init__(blocks=2)
        with torch.no_grad():
            self.blocks[0].down.weight.mul_(8)
            self.blocks[1].down.weight.mul_(0.05)


class RegressionData(LightningDataModule):
    """A user's datamodule as Lightning's own documentation writes them: datasets made in ``setup``, stage by stage."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared = False

    def prepare_data(self) -> None:
        self.prepared = True

    def setup(self, stage: str) -> None:
        assert self.prepared
        if stage == "fit":
            self.train = regression_data(24)
        if stage in ("fit", "validate"):
            self.evaluation = regression_data(16, seed=1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.evaluation, batch_size=8)


def trainer(folder: Path, *stages: Any, **options: Any) -> Trainer:
    """A quiet Trainer with ``stages``; further callbacks come after them."""
    callbacks = [*stages, *options.pop("callbacks", [])]
    quiet = {"accelerator": ACCELERATOR, "devices": 1, "enable_progress_bar": False, "log_every_n_steps": 1}
    return Trainer(callbacks=callbacks, default_root_dir=str(folder), **(quiet | options))


MODELS = ("llama", "opt", "deit", "resnet")


def make_model(kind: str, layers: int = 2) -> LightningModule:
    """One of ``MODELS``, seeded; ``layers`` blocks, except for the ResNet."""
    torch.manual_seed(0)
    if kind in ("llama", "opt"):
        return CausalLM((LLAMA if kind == "llama" else OPT) | {"num_hidden_layers": layers})
    if kind == "resnet":
        network: dict[str, Any] = {"model": "resnet18", "model_args": {"stem_width": 8, "channels": [8, 8, 16, 16]}}
    else:
        network = {"model": "deit_tiny_patch16_224", "image_size": 32}
        network["model_args"] = {"patch_size": 8, "depth": layers, "embed_dim": 48}
    return ImageClassifier(**network, pretrained=False, num_classes=10)


def make_data(kind: str, folder: Path, **options: Any) -> LightningDataModule:
    """Data for :func:`make_model`; token files go to ``folder``, ``options`` to the TokenData."""
    if kind in ("llama", "opt"):
        return TokenData(**write_tokens(folder), **options)
    return ImageData(train_samples=64, calibration_samples=32, evaluation_samples=32, batch_size=32)


def make_stage(cls: type[Stage], name: str | None = None) -> Stage:
    """A stage with its defaults, and with as many arguments of its docstring's example as it cannot do without."""
    example = example_arguments(cls)
    for count in range(len(example) + 1):
        chosen = dict(list(example.items())[:count])
        if set(required(cls)) <= set(chosen) and not cls(**chosen).check_arguments():
            stage = cls(**chosen)
            stage.name = name or stage.name
            return stage
    raise AssertionError(f"{cls.__name__}: the example in its docstring does not pass its own checks: {example}")


def make_stages(cls: type[Stage]) -> list[Stage]:
    """A stage as :func:`make_stage` makes it; before one that repairs, the stages of its docstring's example."""
    earlier: list[Stage] = []
    for name, item in example_stages(cls).items() if make_stage(cls).needs_dense else ():
        if item["class_path"] == cls.__name__:
            break
        stage = known_stages()[item["class_path"]](**item.get("init_args", {}))
        stage.name = f"{name}_first"  # a pair may have another stage of this class
        earlier.append(stage)
    return [*earlier, make_stage(cls)]


def example_arguments(cls: type[Stage]) -> dict[str, Any]:
    """The arguments that the YAML example in the docstring of a stage gives it."""
    own = (item for item in example_stages(cls).values() if item["class_path"] == cls.__name__)
    return next(own, {}).get("init_args", {})


def example_stages(cls: type[Stage]) -> dict[str, dict[str, Any]]:
    """The stages of the YAML example in the docstring of a stage."""
    _, _, indented = (inspect.getdoc(cls) or "").partition("Example::\n")
    text = indented.partition("\nArgs:")[0]
    return yaml.safe_load(text)["stages"] if text.strip() else {}


def blamed(error) -> list[tuple[str, object]]:
    """The argument and the value of every problem of a RecipeError."""
    return [(problem.argument, problem.value) for problem in error.problems]
