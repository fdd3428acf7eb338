"""Text, tokenised and cut into windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from pqqp_lightning.argument_types import refuse_wrong_types
from pqqp_lightning.data import hub_tables as sources
from pqqp_lightning.data import text_sources as corpora
from pqqp_lightning.data.loaders import (
    Windows,
    check_positive,
    draw_indices,
    evaluation_loader,
    fixed_loader,
    require_samples,
    train_loader,
)
from pqqp_lightning.data.questions import Question, Questions
from pqqp_lightning.data.tokenizing import begins_with_bos, token_ids
from pqqp_lightning.data.tokens import check_vocabulary
from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.models.loading import Tokenizer, load_tokenizer
from pqqp_lightning.network.quiet import quiet_transformers

Bos = Literal["auto"] | bool


class TextData(LightningDataModule):
    """Non-overlapping windows of one long text; batches are ``{"input_ids": [B, T]}``.

    With ``bos`` each window begins with the beginning-of-sequence token, as the model's texts did in training. Without
    it, Gemma 3 is a broken model: its perplexity is more than twice as high. The token is never a target, so that
    perplexity counts T - 1 tokens of a window either way. The code of GPTQ, SparseGPT and Wanda tokenises WikiText-2 as
    a whole, so that only its first window has the token; ``bos: false`` comes nearest to the papers' figures.

    Sample YAML::

        data:
          class_path: TextData
          init_args: {source: Salesforce/wikitext, config_name: wikitext-2-raw-v1, calibration_samples: 128}

    Args:
        source: a hub id; a local folder in the hub's layout; plain text files, the last tenth of which is for
            evaluation; or ``python-docs``, the documentation that comes with Python, offline.
        config_name: the data set's configuration on the hub, or the subfolder of a local folder.
        text_column: the column that holds the text; its rows are joined by blank lines.
        tokenizer: a hub id, folder or .gguf file; null takes the model's tokenizer.
        sequence_length: tokens per window, the beginning-of-sequence token included.
        calibration_samples: windows for calibration, drawn from the train split by ``seed``.
        evaluation_samples: windows of the evaluation split to use, from the first on; null for all.
        batch_size: windows per batch in training and evaluation.
        calibration_batch_size: windows per batch in calibration.
        train_split: split for finetuning and calibration.
        evaluation_split: split for validation and test.
        seed: decides which calibration windows are drawn, and the order of training.
        num_workers: processes that load batches.
        bos: begin each window with the tokenizer's beginning-of-sequence token; "auto" does what the tokenizer does
            with a text (LLaMA, Mistral and Gemma add the token, Qwen and SmolLM2 do not). Questions always follow it.
        questions: multiple-choice questions to evaluate on as well: {source: allenai/ai2_arc, config_name:
            ARC-Challenge}; see :class:`Questions`.

    Raises:
        RecipeError: from ``setup`` and the dataloaders. ``check`` lists the problems that show without reading data.
    """

    def __init__(
        self,
        source: str | list[str] = corpora.PYTHON_DOCS,
        config_name: str | None = None,
        text_column: str = "text",
        tokenizer: str | None = None,
        sequence_length: int = 512,
        calibration_samples: int = 32,
        evaluation_samples: int | None = None,
        batch_size: int = 1,
        calibration_batch_size: int = 4,
        train_split: str = "train",
        evaluation_split: str = "test",
        seed: int = 0,
        num_workers: int = 0,
        questions: Questions | None = None,
        bos: Bos = "auto",
    ) -> None:
        super().__init__()
        refuse_wrong_types(TextData.__init__, locals(), "data")
        self.source: str | list[str]
        if isinstance(source, str):
            self.source = sources.expand_variables(source)
        else:
            self.source = [sources.expand_variables(file) for file in source]
        self.config_name = config_name
        self.text_column = text_column
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.calibration_samples, self.calibration_batch_size = calibration_samples, calibration_batch_size
        self.evaluation_samples = evaluation_samples
        self.batch_size = batch_size
        self.train_split, self.evaluation_split = train_split, evaluation_split
        self.seed = seed
        self.calibration_seed = seed  # repeated measurements draw other calibration windows, all else unchanged
        self.num_workers = num_workers
        self.questions = questions
        self.bos = bos
        self._windows: dict[bool, Tensor] = {}  # token ids [N, T], by whether they are for evaluation
        self._encoded: list[Question] | None = None

    def check(self) -> list[Problem]:
        """Problems that can be seen without reading the data."""
        problems = check_positive(2, sequence_length=self.sequence_length)
        problems += check_positive(0, num_workers=self.num_workers)
        problems += check_positive(
            calibration_samples=self.calibration_samples,
            evaluation_samples=self.evaluation_samples,
            batch_size=self.batch_size,
            calibration_batch_size=self.calibration_batch_size,
        )
        named = [self.source] if isinstance(self.source, str) else self.source
        if not named:
            text, way_out = "is an empty list", "Name at least one text file."
            problems.append(Problem("source", text=text, way_out=way_out).within("data"))
        for source in named:
            problems += sources.check_path(source)
            if isinstance(self.source, list) and Path(source).expanduser().is_dir():
                text = "is a folder; a list is for text files"
                problems.append(Problem("source", source, text, "Give it alone.").within("data"))
            problems += sources.check_builtin(source, corpora.PYTHON_DOCS)
        return problems + (self.questions.check() if self.questions else [])

    def prepare_data(self) -> None:
        """Download the data, once per machine."""
        self._refuse_problems()
        if isinstance(self.source, str) and self.source != corpora.PYTHON_DOCS:
            sources.download(self.source, self.config_name)
        if self.questions is not None:
            self.questions.download()

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the parts that ``stage`` needs; those already read are kept."""
        self._refuse_problems()
        self._evaluation_windows()
        if self.questions is not None:
            self._read_questions(self.questions)
        if stage in (None, "fit"):
            self._calibration_windows()

    def train_dataloader(self) -> DataLoader[Any]:
        """All windows of the train split, in an order that depends on (seed, epoch) only."""
        return train_loader(Windows(self._read(False)), self.batch_size, self.seed, self.num_workers)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The evaluation windows, and the questions if there are any."""
        windows = evaluation_loader(self._evaluation_windows(), self.batch_size, self.num_workers)
        if self.questions is None:
            return windows
        return [windows, self.questions.loader(self._read_questions(self.questions))]

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """As in validation."""
        return self.val_dataloader()

    def calibration_dataloader(self) -> DataLoader[Any]:
        """The calibration windows; the seed decides which."""
        return fixed_loader(self._calibration_windows(), self.calibration_batch_size, self.num_workers)

    def _refuse_problems(self) -> None:
        problems = self.check()
        if problems:
            raise RecipeError(problems)

    def _evaluation_windows(self) -> Windows:
        rows = self._read(True)
        what = f"evaluation windows of sequence_length={self.sequence_length}"
        samples = require_samples(len(rows), "evaluation_samples", self.evaluation_samples, what)
        return Windows(rows, range(samples))

    def _calibration_windows(self) -> Windows:
        rows = self._read(False)
        what = f"training windows of sequence_length={self.sequence_length}"
        samples = require_samples(len(rows), "calibration_samples", self.calibration_samples, what)
        return Windows(rows, draw_indices(len(rows), samples, self.calibration_seed))

    def _read(self, evaluation: bool) -> Tensor:
        """The windows of one part [N, T], tokenised once."""
        if evaluation not in self._windows:
            part = "evaluation" if evaluation else "training"
            most = self.evaluation_samples if evaluation else None  # calibration draws from all windows
            self._windows[evaluation] = self._cut_windows(self._read_text(evaluation), part, most)
        # Checked on every call: the windows are kept, but a later trainer may bring another model.
        check_vocabulary(self._windows[evaluation], self._model(), "tokenizer")
        return self._windows[evaluation]

    def _read_questions(self, questions: Questions) -> list[Question]:
        if self._encoded is None:
            self._encoded = questions.read(self._find_tokenizer(), self._model())
        return self._encoded

    def _model(self) -> Any:
        """The trainer's model; None while the datamodule is used without a trainer."""
        return getattr(self.trainer, "lightning_module", None)

    def _read_text(self, evaluation: bool) -> str:
        if self.source == corpora.PYTHON_DOCS:
            return corpora.read_python_docs(evaluation)
        if isinstance(self.source, list):
            return corpora.read_files(self.source, evaluation)
        if not self.source.endswith(".parquet") and Path(self.source).expanduser().is_file():
            return corpora.read_files([self.source], evaluation)
        split = self.evaluation_split if evaluation else self.train_split
        return corpora.read_rows(self.source, self.config_name, split, self.text_column)

    def _cut_windows(self, text: str, part: str, most: int | None) -> Tensor:
        """Tokenise ``text`` and cut it into windows, int32 [N, T]; the incomplete last window is dropped.

        Args:
            text: of one part.
            part: its name, for messages.
            most: number of windows that are needed; None for all.
        """
        length = self.sequence_length
        longest = getattr(self._model(), "longest_sequence", None)
        if longest is not None and length > longest:
            problem = Problem("sequence_length", length, f"is more than the model takes ({longest})", "Lower it.")
            raise RecipeError(problem.within("data"))
        tokenizer = self._find_tokenizer()
        first = self._first_tokens(tokenizer)
        body = length - len(first)
        with quiet_transformers():  # it warns that the text exceeds the model's context
            ids = token_ids(tokenizer, text, None if most is None else most * body, f"tokenise the {part} text")
        count = len(ids) // body
        if count == 0:
            problem_text = f"is more than the {part} text of {self.source!r} has ({len(ids) + len(first)} tokens)"
            raise RecipeError(Problem("sequence_length", length, problem_text, "Lower it.").within("data"))
        windows = torch.from_numpy(ids[: count * body]).view(count, body)
        return torch.cat([torch.tensor(first, dtype=torch.int32).expand(count, -1), windows], dim=1)

    def _first_tokens(self, tokenizer: Tokenizer) -> list[int]:
        """What every window begins with: the beginning-of-sequence token, or nothing."""
        if self.bos is False or (self.bos == "auto" and not begins_with_bos(tokenizer)):
            return []
        token = getattr(tokenizer, "bos_token_id", None)
        if token is None:
            text = "asks for a beginning-of-sequence token, and the tokenizer has none"
            raise RecipeError(Problem("bos", self.bos, text, "Use bos: auto.").within("data"))
        return [token]

    def _find_tokenizer(self) -> Tokenizer:
        if self.tokenizer is not None:
            return load_tokenizer(self.tokenizer, "data.tokenizer")
        model = self._model()
        # The class is asked: reading the property of an instance would already load the tokenizer.
        if model is None or not hasattr(type(model), "tokenizer"):
            text = "is not set, and the model has none"
            raise RecipeError(Problem("tokenizer", text=text, way_out="Set data.tokenizer.").within("data"))
        return model.tokenizer
