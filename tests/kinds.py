"""Tiny models with one kind of layer each, between two Linear layers; all train on ``tiny.regression_data``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


class Experts(nn.Module):
    """Experts in two 3-D parameters, as transformers 5 holds them; each token goes to one of them."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.is_transposed = 3, 8, transposed
        shapes = {"gate_up_proj": (3, 16, 8), "down_proj": (3, 8, 16)}
        for name, (experts, rows, columns) in shapes.items():
            shape = (experts, columns, rows) if transposed else (experts, rows, columns)
            setattr(self, name, nn.Parameter(torch.randn(shape) / 3))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            chosen = torch.arange(len(x)) % self.num_experts == expert
            up, down = self.gate_up_proj[expert], self.down_proj[expert]
            if self.is_transposed:
                out[chosen] = torch.relu(x[chosen] @ up) @ down
            else:
                out[chosen] = F.linear(torch.relu(F.linear(x[chosen], up)), down)
        return out


class Sequence(nn.Module):
    """Gives a module of sequences [B, T, 8] the input [B, 8], repeated and scaled, and returns its mean over T."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        steps = x[:, None] * torch.tensor([1.0, 0.5, -1.0])[:, None]  # [B, 3, 8]
        if isinstance(self.inner, nn.MultiheadAttention):
            other = steps[..., : self.inner.kdim], steps.repeat(1, 1, 2)[..., : self.inner.vdim]
            return self.inner(steps, *other)[0].mean(1)
        output = self.inner(steps)
        return (output[0] if isinstance(output, tuple) else output).mean(1)


class Image(nn.Module):
    """Gives a convolution over ``spatial`` dimensions the input [B, 8] as channels, and returns its mean over them."""

    def __init__(self, inner: nn.Module, spatial: int) -> None:
        super().__init__()
        self.inner, self.spatial = inner, spatial

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.linspace(-1, 1, 4).view(-1, *[1] * (self.spatial - 1)).expand(*[4] * self.spatial)
        image = x.view(*x.shape, *[1] * self.spatial) * ramp
        return self.inner(image).flatten(2).mean(2)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "conv1d": lambda: Image(nn.Conv1d(8, 8, 3, groups=2, padding=1, padding_mode="circular"), 1),
    "conv2d": lambda: Image(nn.Conv2d(8, 8, 3, groups=2, padding=1), 2),
    "conv3d": lambda: Image(nn.Conv3d(8, 8, (1, 2, 3), groups=2, padding="same", padding_mode="replicate"), 3),
    "transposed": lambda: Conv1D(8, 8),
    "attention": lambda: Sequence(nn.MultiheadAttention(8, 2, batch_first=True)),
    "attention apart": lambda: Sequence(nn.MultiheadAttention(8, 2, kdim=4, vdim=12, batch_first=True)),
    "lstm": lambda: Sequence(nn.LSTM(8, 8, batch_first=True, bidirectional=True, proj_size=4)),
    "gru": lambda: Sequence(nn.GRU(8, 8, num_layers=2, batch_first=True)),
    "rnn": lambda: Sequence(nn.RNN(8, 8, batch_first=True)),
    "experts": lambda: Experts(transposed=False),
    "transposed experts": lambda: Experts(transposed=True),
}
"""By kind: makes a network from [B, 8] to [B, 8]."""


class KindModule(LightningModule):
    """A regression through one of ``NETWORKS`` between two Linear layers.

    Args:
        kind: of ``NETWORKS``.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(1)
        self.inlet, self.network, self.head = nn.Linear(8, 8), NETWORKS[kind](), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.network(self.inlet(x))))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("mse", F.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
