"""Accuracy on multiple-choice questions: a language model answers with the choice that it finds most likely.

The two accuracies are those of lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.12608602). ``acc`` takes the
choice with the highest log-likelihood, ``acc_norm`` the one with the highest log-likelihood per character of its text.
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
"""A target with this value is not counted; torch's losses use the same number."""


def log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum the log-likelihoods of each row's targets, in nats, float64 [R].

    Args:
        logits: [R, T, V]; only the positions with a target are read.
        targets: [R, T]; :data:`IGNORED` at positions without a target.
    """
    # A choice is a few tokens of a long row: a log-softmax over all positions would waste most of its work.
    row, position = (targets != IGNORED).nonzero(as_tuple=True)
    losses = F.cross_entropy(logits[row, position].float(), targets[row, position], reduction="none")
    return losses.new_zeros(len(targets), dtype=torch.float64).index_add_(0, row, -losses.double())


def group_by_question(scores: Tensor, choices: Tensor) -> Tensor:
    """Arrange the scores [R] of all choices by question, [Q, C].

    Args:
        scores: of all choices of the first question, then of the second, and so on.
        choices: [Q], the number of choices of each question, at most C; missing ones score -inf.
    """
    return pad_sequence(scores.split(choices.tolist()), batch_first=True, padding_value=-math.inf)


class ChoiceAccuracy(Metric):
    """The fraction of questions whose right choice has the highest score; among equal scores, the first one counts.

    One NaN score makes the accuracy NaN: a broken model has none.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    undefined: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Integer states: converting the model to half precision would round counts above 2048 in a float state.
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
