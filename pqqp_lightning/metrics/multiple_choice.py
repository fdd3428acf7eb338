"""Accuracy on multiple-choice questions, by how likely a language model finds each choice after the question.

As lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.12608602) defines them: ``acc`` takes the choice of the highest
log-likelihood, ``acc_norm`` that of the highest log-likelihood per character of the choice's text.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import Metric

IGNORED = -100
"""A target that is not counted, as torch's losses have it."""


def log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """The summed log-likelihood of each row's targets, float64 [R].

    Args:
        logits: [R, T, V]; only where there are targets are they read.
        targets: [R, T], :data:`IGNORED` where there is none.
    """
    row, position = (targets != IGNORED).nonzero(as_tuple=True)
    losses = F.cross_entropy(logits[row, position].float(), targets[row, position], reduction="none")
    return losses.new_zeros(len(targets), dtype=torch.float64).index_add_(0, row, -losses.double())


def by_question(scores: Tensor, choices: Tensor) -> Tensor:
    """The scores [R] of all choices as [Q, C], -inf where a question of ``choices`` [Q] has fewer than C."""
    return pad_sequence(scores.split(choices.tolist()), batch_first=True, padding_value=-math.inf)


class ChoiceAccuracy(Metric):
    """The fraction of questions whose answer has the highest score; of equal scores, the first counts.

    A score that is NaN makes it NaN. The states are whole numbers, which a conversion to half precision leaves alone.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    undefined: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for state in ("correct", "undefined", "count"):
            self.add_state(state, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, answers: Tensor) -> None:
        """Count ``answers`` [Q] against ``scores`` [Q, C]."""
        if scores.ndim != 2 or scores.shape[:1] != answers.shape:
            raise ValueError(
                f"Expected `scores` [Q, C] and `answers` [Q], but got {list(scores.shape)} and {list(answers.shape)}."
            )
        self.correct = self.correct + (scores.argmax(1) == answers).sum()
        self.undefined = self.undefined + scores.isnan().any(1).sum()
        self.count = self.count + len(answers)

    def compute(self) -> Tensor:
        """The accuracy, a float64 scalar; NaN if nothing was counted or a score was NaN."""
        accuracy = self.correct.double() / self.count
        return torch.where(self.undefined > 0, torch.nan, accuracy)
