"""Token ids from NumPy files: with the windows of another implementation, results agree to the last digit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from pqqp_lightning.argument_types import refuse_wrong_types
from pqqp_lightning.data.hub_tables import expand_variables
from pqqp_lightning.data.loaders import (
    Windows,
    check_positive,
    draw_indices,
    evaluation_loader,
    fixed_loader,
    require_samples,
    train_loader,
)
from pqqp_lightning.errors import NOT_GIVEN, Problem, RecipeError
from pqqp_lightning.models.transformers_bridge import third_party_errors


class TokenData(LightningDataModule):
    """Integer arrays [N, T] of token ids (.npy); batches are ``{"input_ids": [B, T]}``.

    The windows are taken as they are: put the beginning-of-sequence token in front if the model expects one.

    Sample YAML::

        data:
          class_path: TokenData
          init_args: {calibration: tokens/calibration.npy, evaluation: tokens/evaluation.npy}

    Args:
        calibration: file of the calibration windows.
        evaluation: file of the windows for validation and test.
        train: file of the windows for finetuning; null if no stage finetunes.
        batch_size: windows per batch in training and evaluation.
        calibration_batch_size: windows per batch in calibration.
        calibration_samples: calibration windows to use, drawn by ``seed``; null for all.
        evaluation_samples: evaluation windows to use, from the first on; null for all.
        seed: decides which calibration windows are drawn, and the order of training.
        num_workers: processes that load batches.

    Raises:
        RecipeError: from ``setup`` and the dataloaders. ``check`` lists the problems that show without reading data.
    """

    def __init__(
        self,
        calibration: str,
        evaluation: str,
        train: str | None = None,
        batch_size: int = 1,
        calibration_batch_size: int = 4,
        calibration_samples: int | None = None,
        evaluation_samples: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        refuse_wrong_types(TokenData.__init__, locals(), "data")
        files = {"calibration": calibration, "evaluation": evaluation, "train": train}
        self.files: dict[str, str | None] = {}
        for argument, file in files.items():
            self.files[argument] = None if file is None else expand_variables(file)
        self.batch_size = batch_size
        self.calibration_samples, self.calibration_batch_size = calibration_samples, calibration_batch_size
        self.evaluation_samples = evaluation_samples
        self.seed = seed
        self.calibration_seed = seed  # repeated measurements draw other calibration windows, all else unchanged
        self.num_workers = num_workers
        self._arrays: dict[str, np.ndarray] = {}

    @property
    def has_training_data(self) -> bool:
        """Whether there are windows for finetuning."""
        return self.files["train"] is not None

    def check(self) -> list[Problem]:
        """Problems that can be seen without reading the data."""
        problems = check_positive(
            batch_size=self.batch_size,
            calibration_batch_size=self.calibration_batch_size,
            calibration_samples=self.calibration_samples,
            evaluation_samples=self.evaluation_samples,
        )
        problems += check_positive(0, num_workers=self.num_workers)
        for argument, file in self.files.items():
            if file is not None and not Path(file).expanduser().is_file():
                text = f"does not exist (looked at {Path(file).expanduser().absolute()})"
                problems.append(Problem(argument, file, text).within("data"))
        return problems

    def setup(self, stage: str | None = None) -> None:
        """Open the files; those already open are kept."""
        problems = self.check()
        if problems:
            raise RecipeError(problems)
        for argument, file in self.files.items():
            if file is not None:
                self._read(argument)
        self._evaluation_windows()
        self._calibration_windows()

    def train_dataloader(self) -> DataLoader[Any]:
        """The training windows, in an order that depends on (seed, epoch) only."""
        return train_loader(Windows(self._read("train")), self.batch_size, self.seed, self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        """The evaluation windows."""
        return evaluation_loader(self._evaluation_windows(), self.batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader[Any]:
        """The evaluation windows."""
        return self.val_dataloader()

    def calibration_dataloader(self) -> DataLoader[Any]:
        """The calibration windows."""
        return fixed_loader(self._calibration_windows(), self.calibration_batch_size, self.num_workers)

    def _evaluation_windows(self) -> Windows:
        rows = self._read("evaluation")
        what = f"windows in {self.files['evaluation']}"
        samples = require_samples(len(rows), "evaluation_samples", self.evaluation_samples, what)
        return Windows(rows, range(samples))

    def _calibration_windows(self) -> Windows:
        rows = self._read("calibration")
        what = f"windows in {self.files['calibration']}"
        samples = require_samples(len(rows), "calibration_samples", self.calibration_samples, what)
        return Windows(rows, draw_indices(len(rows), samples, self.calibration_seed))

    def _read(self, argument: str) -> np.ndarray:
        """The windows [N, T] of the file that ``argument`` names, memory-mapped once."""
        if argument not in self._arrays:
            file = self.files[argument]
            if file is None:
                text = "is not set, but finetuning needs it"
                raise RecipeError(Problem(argument, text=text, way_out="Give a .npy file of windows.").within("data"))
            self._arrays[argument] = _open(file, argument)
        # Checked on every call: the arrays are kept, but a later trainer may bring another model.
        model = getattr(self.trainer, "lightning_module", None)
        check_vocabulary(self._arrays[argument], model, argument, self.files[argument])
        return self._arrays[argument]


def check_vocabulary(rows: Any, model: Any, argument: str, value: Any = NOT_GIVEN) -> None:
    """Refuse token ids, of any shape, that ``model`` has no embedding for; without a model, only negative ones.

    Raises:
        RecipeError: about ``argument`` of the data, which has ``value``.
    """
    vocabulary = getattr(model, "vocabulary_size", None)
    lowest, highest = int(rows.min()), int(rows.max())
    if lowest < 0:
        raise RecipeError(Problem(argument, value, f"gives a negative token id, {lowest}").within("data"))
    if vocabulary is not None and highest >= vocabulary:
        text = f"gives a token id {highest}, but the model knows {vocabulary} tokens"
        way_out = "Use the tokenizer that the model was trained with."
        raise RecipeError(Problem(argument, value, text, way_out).within("data"))


def _open(file: str, argument: str) -> np.ndarray:
    unreadable = Problem(argument, file, "is not a readable .npy file", "Write it with numpy.save.").within("data")
    with third_party_errors(unreadable):
        array = np.load(Path(file).expanduser(), mmap_mode="r", allow_pickle=False)
    # numpy.load returns a lazy archive, not an array, for a .npz file under another name.
    content = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "iu" or array.shape[1] < 2:
        text = f"is not an array of integers [windows, tokens] with at least two tokens each: got {content}"
        raise RecipeError(Problem(argument, file, text).within("data"))
    if len(array) == 0:
        raise RecipeError(Problem(argument, file, "is an empty array").within("data"))
    return array
