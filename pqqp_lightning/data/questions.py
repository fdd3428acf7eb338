"""Multiple-choice questions: each choice continues the question, and the model scores how likely it is.

Prompt, tokenisation and truncation follow lm-evaluation-harness' task ``arc_challenge``, zero-shot.
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
from pqqp_lightning.data.loaders import check_positive, evaluation_loader, require_samples
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
"""A target with this value is not counted; torch's losses use the same number."""


@dataclass(frozen=True)
class Questions:
    """Multiple-choice questions in the layout of ARC: columns ``question``, ``choices`` (text, label), ``answerKey``.

    Attributes:
        source: a hub id such as ``allenai/ai2_arc``, or a local folder in the hub's layout.
        config_name: the data set's configuration on the hub, such as ``ARC-Challenge``, or the subfolder of a local
            folder.
        split: the split to read.
        samples: number of questions to use, from the first on; null for all.
        batch_size: questions per batch; questions of similar length share one.
    """

    source: str
    config_name: str | None = None
    split: str = "test"
    samples: int | None = None
    batch_size: int = 8

    def check(self) -> list[Problem]:
        """Problems that can be seen without reading the data."""
        numbers = {f"{INSIDE}samples": self.samples, f"{INSIDE}batch_size": self.batch_size}
        return check_positive(1, **numbers) + sources.check_path(sources.expand_variables(self.source), INSIDE)

    def download(self) -> None:
        """Download into the hub's cache, once per machine."""
        sources.download(sources.expand_variables(self.source), self.config_name, INSIDE)

    def read(self, tokenizer: Tokenizer, model: Any = None) -> list[Question]:
        """Read and tokenise the questions, shortest first.

        Args:
            tokenizer: of the model; its default special tokens are added in front.
            model: may have ``longest_sequence`` (longer questions are truncated) and ``vocabulary_size`` (other token
                ids are refused).

        Raises:
            RecipeError: the data cannot be read, does not hold questions, or does not fit the model.
        """
        table = sources.read_table(sources.expand_variables(self.source), self.config_name, self.split, INSIDE)
        self._check_columns(table)
        count = require_samples(len(table), f"{INSIDE}samples", self.samples, f"questions in split {self.split!r}")
        longest = getattr(model, "longest_sequence", None)
        questions = []
        tokens: list[int] = []
        for number, row in enumerate(table.select(range(count))):
            question = self._encode(row, number, tokenizer)
            choices = [self._truncate(choice, longest) for choice in question.choices]
            for choice in choices:
                tokens += choice.tokens
            questions.append(replace(question, choices=choices))
        check_vocabulary(torch.tensor(tokens), model, "tokenizer")
        # Batches of similar length need little padding.
        return sorted(questions, key=lambda question: max(len(choice.tokens) for choice in question.choices))

    def loader(self, questions: Sequence[Question]) -> DataLoader[Any]:
        """Batches from :func:`collate`; each process gets its share."""
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
        if not isinstance(choices, dict):
            choices = {}
        texts = choices.get("text") or []
        labels = choices.get("label") or []
        if not isinstance(question, str) or len(texts) < 2 or len(texts) != len(labels) or not all(texts):
            text = "is not a question with two or more choices, each a text and a label"
            raise RecipeError(self._problem(text, "Use data in the layout of allenai/ai2_arc.", number))
        if key not in labels:
            given = f"answerKey={key!r}, labels {', '.join(map(str, labels))}"
            text = f"has no answer among its choices ({given})"
            raise RecipeError(self._problem(text, "Use a split with answers.", number))
        prompt = PROMPT.format(question)
        start = len(tokenizer(prompt)["input_ids"])
        # Prompt and choice are tokenised together, as the harness does: a tokenizer may merge across the seam.
        sequences = [tokenizer(prompt + DELIMITER + text)["input_ids"] for text in texts]
        if any(len(tokens) <= start for tokens in sequences):
            text = "has a choice that adds no token to the question"
            way_out = "Set data.tokenizer to the one that the model was trained with."
            raise RecipeError(self._problem(text, way_out, number))
        encoded = []
        for tokens, text in zip(sequences, texts, strict=True):
            encoded.append(Choice(tokens, scored=len(tokens) - start, characters=len(text)))
        return Question(encoded, answer=labels.index(key))

    def _truncate(self, choice: Choice, longest: int | None) -> Choice:
        """Drop the first tokens of a question that is too long for the model."""
        if longest is None or len(choice.tokens) <= longest + 1:  # the last token is only predicted, never read
            return choice
        if choice.scored > longest:
            text = f"has a choice of {choice.scored} tokens, but the model takes at most {longest}"
            raise RecipeError(self._problem(text, "Use other questions."))
        return replace(choice, tokens=choice.tokens[-(longest + 1) :])


@dataclass(frozen=True)
class Choice:
    """A question continued with one of its choices.

    Attributes:
        tokens: token ids of question and choice.
        scored: number of tokens at the end that belong to the choice.
        characters: length of the choice's text.
    """

    tokens: list[int]
    scored: int
    characters: int


@dataclass(frozen=True)
class Question:
    """A tokenised question.

    Attributes:
        choices: in the data's order.
        answer: index of the right choice.
    """

    choices: list[Choice]
    answer: int


def collate(questions: Sequence[Question]) -> dict[str, Tensor]:
    """Stack Q questions with R choices in all, each of at most T + 1 tokens, padded on the right.

    Returns:
        - ``input_ids`` and ``attention_mask`` [R, T];
        - ``targets`` [R, T]: the next token where it belongs to the choice, else :data:`IGNORED`;
        - ``characters`` [R]: length of each choice's text;
        - ``choices`` [Q]: number of choices of each question;
        - ``answer`` [Q]: index of the right choice.
    """
    choices: list[Choice] = []
    for question in questions:
        choices += question.choices
    inputs, targets = [], []
    for choice in choices:
        tokens = torch.tensor(choice.tokens)
        # Position t predicts token t + 1, so the inputs lack the last token and the targets the first.
        inputs.append(tokens[:-1])
        targets.append(tokens.index_fill(0, torch.arange(len(tokens) - choice.scored), IGNORED)[1:])
    return {
        "input_ids": pad_sequence(inputs, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in inputs], batch_first=True),
        "targets": pad_sequence(targets, batch_first=True, padding_value=IGNORED),
        "characters": torch.tensor([choice.characters for choice in choices]),
        "choices": torch.tensor([len(question.choices) for question in questions]),
        "answer": torch.tensor([question.answer for question in questions]),
    }
