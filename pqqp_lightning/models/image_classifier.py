"""An image classifier from timm, torchvision or the user's own code, evaluated by accuracy."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from pqqp_lightning.argument_types import refuse_wrong_types
from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.models import image_networks as vision
from pqqp_lightning.models.optimizers import build_optimizer


class ImageClassifier(LightningModule):
    """DeiT, ResNet and similar networks; batches are ``(images [B, C, H, W], labels [B])``.

    Sample YAML::

        model:
          class_path: ImageClassifier
          init_args: {model: resnet18, pretrained: false, num_classes: 10}

    Args:
        model: a network's name in timm or torchvision (timm is searched first; the prefix ``timm/`` or
            ``torchvision/`` chooses), or an ``nn.Module`` of your own by ``class_path``.
        pretrained: start from the published weights, unless ``weights`` is given; needs the hub or its cache.
        num_classes: number of classes; null keeps the network's own number.
        in_channels: 3 for colour images, 1 for grey ones.
        image_size: pixels, for networks built for one size (ViT, DeiT); the others take any size.
        weights: a run folder or checkpoint folder of this project, a .safetensors file or a Lightning .ckpt.
        model_args: further arguments of the network's builder.
        optimizer: builds the finetuning optimizer from the parameters that require a gradient.
        lr_scheduler: builds the learning-rate schedule, stepped once per epoch.

    Raises:
        RecipeError: the network is unknown or cannot be built, or its weights cannot be read or do not fit.
    """

    primary_metric = "top1"
    higher_is_better = True

    def __init__(
        self,
        model: str | nn.Module = "resnet18",
        pretrained: bool = True,
        num_classes: int | None = None,
        in_channels: int = 3,
        image_size: int | None = None,
        weights: str | None = None,
        model_args: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        refuse_wrong_types(ImageClassifier.__init__, locals(), "model")
        super().__init__()
        _check_numbers(num_classes=num_classes, in_channels=in_channels, image_size=image_size)
        self._network_args: dict[str, Any] | None = None
        if isinstance(model, str):
            name = vision.find_network(model)
            download = pretrained and weights is None
            options = dict(model_args or {})
            self.model = vision.build_network(name, download, num_classes, in_channels, image_size, options)
            # skeleton() rebuilds the network from these when a checkpoint is loaded.
            self._network_args = {
                "model": name,
                "in_channels": in_channels,
                "image_size": image_size,
                "model_args": model_args,
            }
        else:
            self.model = model
        if weights is not None:
            vision.load_weights_into(self.model, vision.read_weights(weights), weights)
        from torchmetrics.classification import MulticlassAccuracy  # here: it imports all of torchmetrics

        self.num_classes = num_classes or vision.count_classes(self.model)
        self.top1 = MulticlassAccuracy(self.num_classes, average="micro")
        self.top5 = MulticlassAccuracy(self.num_classes, average="micro", top_k=5) if self.num_classes > 5 else None
        self._build_optimizer = optimizer
        self._build_lr_scheduler = lr_scheduler

    def setup(self, stage: str) -> None:
        """Refuse data that has more classes than the network."""
        classes = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if classes is not None and classes > self.num_classes:
            text = f"is fewer than the {classes} classes of the data"
            problem = Problem("num_classes", self.num_classes, text, f"Set model.num_classes to {classes}.")
            raise RecipeError(problem.within("model"))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy in nats, a scalar."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, batch_size=len(labels), prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Update and log the accuracies and the loss."""
        images, labels = batch
        logits = self(images).float()
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(labels)}
        self.log("loss", F.cross_entropy(logits, labels), sync_dist=True, **options)
        self.top1.update(logits, labels)
        self.log("top1", self.top1, prog_bar=True, **options)
        if self.top5 is not None:
            self.top5.update(logits, labels)
            self.log("top5", self.top5, **options)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def calibration_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The logits [B, classes]; labels are not needed."""
        return self.model(batch[0])

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule; Lightning calls this at the start of each finetuning segment."""
        return build_optimizer(self, self._build_optimizer, self._build_lr_scheduler)

    def skeleton(self) -> dict[str, Any] | None:
        """The class and arguments that rebuild this structure, without weights.

        None if the user gave an ``nn.Module``: its arguments are unknown.
        """
        if self._network_args is None:
            return None
        arguments = {**self._network_args, "pretrained": False, "num_classes": self.num_classes, "weights": None}
        return {"class_path": "pqqp_lightning.models.ImageClassifier", "init_args": arguments}


def _check_numbers(**numbers: int | None) -> None:
    problems = [
        Problem(name, value, "is not above 0").within("model")
        for name, value in numbers.items()
        if value is not None and value < 1
    ]
    if problems:
        raise RecipeError(problems)
