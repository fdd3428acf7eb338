"""What needs the whole model at once, and so cannot run where its weights are offloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from pqqp_lightning.errors import Problem
from pqqp_lightning.network.offload import OPTION, offload_of
from pqqp_lightning.report.formatting import human_bytes
from pqqp_lightning.stages.stage import Stage

MOMENTS = 2
"""What AdamW keeps for each trained weight."""


def check_offload(trainer: Trainer, module: LightningModule, stages: Sequence[Stage]) -> list[Problem]:
    """The problems of ``stages`` with a model that is offloaded on the trainer's device; this decides whether it is."""
    offload = offload_of(module)
    offload.connect(trainer.strategy.root_device, Path(trainer.default_root_dir))
    if offload.mode == "none":
        return []
    weights = sum(parameter.nbytes for parameter in module.parameters())
    trained = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    problems = []
    for stage in stages:
        for argument, instead in stage.whole_model_arguments.items():
            needed = f"{human_bytes(weights)} of weights"
            if argument == "epochs":
                needed += f", {human_bytes(trained)} of gradients and, with AdamW, {human_bytes(MOMENTS * trained)}"
                needed += " of moments"
            text = f"needs the whole model in memory ({needed}), which model.{OPTION}={offload.mode} avoids"
            way_out = f"Set model.{OPTION}: none with enough memory, or {argument}: {instead}."
            problem = Problem(argument, getattr(stage, argument), text, way_out)
            problems.append(problem.within(f"stages.{stage.name}", type(stage).__name__))
    return problems
