"""The settings of distillation from the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pqqp_lightning.errors import Problem

TeacherDtype = Literal["same", "bfloat16", "float16"]


@dataclass
class Distillation:
    """Distillation from the dense model during finetuning.

    Attributes:
        weight: share of the teacher's objective in the loss, in (0, 1]; the rest is the task's own loss.
        temperature: softens both distributions; above 0.
        loss: "kl" compares distributions over classes or tokens, "mse" compares the outputs directly.
        hidden_weight: weight of the distance between the blocks' outputs; 0 ignores it.
        teacher_dtype: "same" keeps the teacher's precision, "bfloat16" and "float16" halve its memory.
    """

    weight: float = 0.5
    temperature: float = 2.0
    loss: Literal["kl", "mse"] = "kl"
    hidden_weight: float = 0.0
    teacher_dtype: TeacherDtype = "same"

    def check(self) -> list[Problem]:
        """Problems of these values; each key is an attribute."""
        problems = []
        if not 0 < self.weight <= 1:
            problems.append(Problem("weight", self.weight, "is not in (0, 1]", "1 learns from the teacher alone."))
        if not self.temperature > 0:
            problems.append(Problem("temperature", self.temperature, "is not above 0", "2 is usual."))
        if self.hidden_weight < 0:
            way_out = "0 leaves the hidden states out."
            problems.append(Problem("hidden_weight", self.hidden_weight, "is negative", way_out))
        return problems
