"""Multiple-choice questions: every choice continues the question, and the model says how likely it is.

Prompt, tokenisation and truncation are those of lm-evaluation-harness' task ``arc_challenge`` without examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from pqqp_lightning.data import hub_tables as sources
from pqqp_lightning.data.loaders import check_positive, evaluation_loader, require
from pqqp_lightning.data.tokens import check_vocabulary
from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.models.loading import Tokenizer

if TYPE_CHECKING:
    pass

INSIDE = "questions."
COLUMNS = ("question", "choices", "answerKey")
PROMPT = "Question: {}\nAnswer:"
DELIMITER = " "  # between the prompt and a choice
IGNORED = -100
"""A target that is not counted, as torch's losses have it."""


@dataclass(frozen=True)
class Questions:
    """Multiple-choice questions in the layout of ARC: columns ``question``, ``choices`` (text, label), ``answerKey``.

    Attributes:
        source: a hub id, as ``allenai/ai2_arc``, or a local folder in the hub's layout.
        config_name: of the data set on the hub, as ``ARC-Challenge``, or of the folder's subfolder.
        split: which part of it.
        samples: the first so many questions; null for all.
        batch_size: questions that are scored together; those of similar length are.
    """

    source: str
    config_name: str | None = None
    split: str = "test"
    samples: int | None = None
    batch_size: int = 8

    def check(self) -> list[Problem]:
        """Problems that can be seen without reading the data."""
        numbers = {f"{INSIDE}samples": self.samples, f"{INSIDE}batch_size": self.batch_size}
        return check_positive(1, **numbers) + sources.check_path(sources.expand(self.source), INSIDE)

    def download(self) -> None:
        """Fill the hub's cache, once per machine."""
        sources.download(sources.expand(self.source), self.config_name, INSIDE)

    def read(self, tokenizer: Tokenizer, model: Any = None) -> list[Question]:
        """The questions in tokens, shortest first.

        Args:
            tokenizer: adds the special tokens that it puts in front of a text by default.
            model: says how many tokens it takes and knows (``longest_sequence``, ``vocabulary_size``), if it does.

        Raises:
            RecipeError: the data is not there, is no set of questions, or does not fit the model.
        """
        table = sources.read_table(sources.expand(self.source), self.config_name, self.split, INSIDE)
        self._check_columns(table)
        count = require(len(table), f"{INSIDE}samples", self.samples, f"questions in split {self.split!r}")
        questions = [self._encode(row, i, tokenizer) for i, row in enumerate(table.select(range(count)))]
        longest = getattr(model, "longest_sequence", None)
        questions = [replace(q, choices=[self._truncate(c, longest) for c in q.choices]) for q in questions]
        tokens = torch.tensor([token for q in questions for c in q.choices for token in c.tokens])
        check_vocabulary(tokens, model, "tokenizer")
        return sorted(questions, key=lambda q: max(len(c.tokens) for c in q.choices))

    def loader(self, questions: Sequence[Question]) -> DataLoader[Any]:
        """Batches as :func:`collate` makes them, shared out to the processes."""
        return evaluation_loader(questions, self.batch_size, 0, collate)

    def _problem(self, text: str, way_out: str, row: int | None = None) -> Problem:
        where = f"(split {self.split!r})" if row is None else f"(split {self.split!r}, row {row})"
        return Problem(f"{INSIDE}source", self.source, f"{where} {text}", way_out).within("data")

    def _check_columns(self, table: sources.Table) -> None:
        missing = [name for name in COLUMNS if name not in table.column_names]
        if missing:
            text = f"has no column {', '.join(missing)}, only {', '.join(table.column_names)}"
            way_out = f"Questions have {', '.join(COLUMNS)}, as in allenai/ai2_arc."
            raise RecipeError(self._problem(text, way_out))

    def _encode(self, row: dict[str, Any], number: int, tokenizer: Tokenizer) -> Question:
        question, choices, key = (row[name] for name in COLUMNS)
        texts, labels = (choices.get(k) or [] if isinstance(choices, dict) else [] for k in ("text", "label"))
        if not isinstance(question, str) or len(texts) < 2 or len(texts) != len(labels) or not all(texts):
            text = "is not a question with two or more choices, each a text and a label"
            raise RecipeError(self._problem(text, "Use data in the layout of allenai/ai2_arc.", number))
        if key not in labels:
            given = f"answerKey={key!r}, labels {', '.join(map(str, labels))}"
            text = f"has no answer among its choices ({given})"
            raise RecipeError(self._problem(text, "Use a split with answers.", number))
        prompt = PROMPT.format(question)
        start = len(tokenizer(prompt)["input_ids"])
        whole = [tokenizer(prompt + DELIMITER + text)["input_ids"] for text in texts]
        if any(len(w) <= start for w in whole):
            text = "has a choice that adds no token to the question"
            way_out = "Set data.tokenizer to the one that the model was trained with."
            raise RecipeError(self._problem(text, way_out, number))
        encoded = [Choice(w, len(w) - start, len(text)) for w, text in zip(whole, texts, strict=True)]
        return Question(encoded, labels.index(key))

    def _truncate(self, choice: Choice, longest: int | None) -> Choice:
        """Without the beginning of a question that is too long; the last token is a target only."""
        if longest is None or len(choice.tokens) <= longest + 1:
            return choice
        if choice.scored > longest:
            text = f"has a choice of {choice.scored} tokens, but the model takes at most {longest}"
            raise RecipeError(self._problem(text, "Use other questions."))
        return replace(choice, tokens=choice.tokens[-(longest + 1) :])


@dataclass(frozen=True)
class Choice:
    """A question continued with one of its choices.

    Attributes:
        tokens: of both.
        scored: so many of them, the last ones, are the choice's.
        characters: length of the choice's text.
    """

    tokens: list[int]
    scored: int
    characters: int


@dataclass(frozen=True)
class Question:
    """A question in tokens.

    Attributes:
        choices: in their order.
        answer: which of them is right.
    """

    choices: list[Choice]
    answer: int


def collate(questions: Sequence[Question]) -> dict[str, Tensor]:
    """Q questions with R choices in all, of at most T + 1 tokens, padded on the right.

    Returns:
        ``input_ids`` and ``attention_mask`` [R, T]; ``targets`` [R, T], the next tokens where they belong to the
        choice; ``characters`` [R] of each choice; ``choices`` [Q], how many each question has; ``answer`` [Q].
    """
    choices = [choice for question in questions for choice in question.choices]
    tokens = [torch.tensor(choice.tokens) for choice in choices]
    targets = [t.index_fill(0, torch.arange(len(t) - c.scored), IGNORED) for t, c in zip(tokens, choices, strict=True)]
    return {
        "input_ids": pad_sequence([t[:-1] for t in tokens], batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(t[:-1]) for t in tokens], batch_first=True),
        "targets": pad_sequence([t[1:] for t in targets], batch_first=True, padding_value=IGNORED),
        "characters": torch.tensor([choice.characters for choice in choices]),
        "choices": torch.tensor([len(question.choices) for question in questions]),
        "answer": torch.tensor([question.answer for question in questions]),
    }
