"""Token ids from NumPy files, for results that agree to the digit with someone else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from pqqp_lightning.data.hub_tables import expand
from pqqp_lightning.data.loaders import (
    Windows,
    check_positive,
    draw,
    evaluation_loader,
    fixed_loader,
    require,
    train_loader,
)
from pqqp_lightning.errors import NOT_GIVEN, Problem, RecipeError
from pqqp_lightning.models.transformers_bridge import third_party_errors


class TokenData(LightningDataModule):
    """Integer arrays [N, T] of token ids (.npy); batches are ``{"input_ids": [B, T]}``.

    Sample YAML::

        data:
          class_path: TokenData
          init_args: {calibration: tokens/calibration.npy, evaluation: tokens/evaluation.npy}

    Args:
        calibration: file of the calibration windows.
        evaluation: file of the windows for validation and test.
        train: file of the windows for finetuning, if there is any.
        batch_size: windows per batch in training and evaluation.
        calibration_batch_size: windows per batch in calibration.
        calibration_samples: so many of the calibration windows, drawn by ``seed``; null for all.
        evaluation_samples: the first so many of the evaluation windows; null for all.
        seed: of the calibration windows and the order of training.
        num_workers: processes that load batches.

    Raises:
        RecipeError: from ``setup`` and the dataloaders; ``check`` lists what can be seen without reading the data.
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
        files = {"calibration": calibration, "evaluation": evaluation, "train": train}
        self.files = {knob: None if file is None else expand(file) for knob, file in files.items()}
        self.batch_size, self.calibration_batch_size = batch_size, calibration_batch_size
        self.calibration_samples, self.evaluation_samples = calibration_samples, evaluation_samples
        self.seed, self.calibration_seed, self.num_workers = seed, seed, num_workers
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
        """Open the files, unless that was done before."""
        problems = self.check()
        if problems:
            raise RecipeError(problems)
        for knob, file in self.files.items():
            if file is not None:
                self._read(knob)
        self._evaluation_windows()
        self._calibration_windows()

    def train_dataloader(self) -> DataLoader[Any]:
        """The training windows, in an order of (seed, epoch)."""
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
        rows, what = self._read("evaluation"), f"windows in {self.files['evaluation']}"
        return Windows(rows, range(require(len(rows), "evaluation_samples", self.evaluation_samples, what)))

    def _calibration_windows(self) -> Windows:
        rows, what = self._read("calibration"), f"windows in {self.files['calibration']}"
        samples = require(len(rows), "calibration_samples", self.calibration_samples, what)
        return Windows(rows, draw(len(rows), samples, self.calibration_seed))

    def _read(self, knob: str) -> np.ndarray:
        if knob not in self._arrays:
            file = self.files[knob]
            if file is None:
                text = "is not set, but finetuning needs it"
                raise RecipeError(Problem(knob, text=text, way_out="Give a .npy file of windows.").within("data"))
            self._arrays[knob] = _open(file, knob)
        model = getattr(self.trainer, "lightning_module", None)
        check_vocabulary(self._arrays[knob], model, knob, self.files[knob])
        return self._arrays[knob]


def check_vocabulary(rows: Any, model: Any, argument: str, value: Any = NOT_GIVEN) -> None:
    """Refuse token ids [N, T] that ``model`` has no embedding for; without a model, only negative ones.

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


def _open(file: str, knob: str) -> np.ndarray:
    unreadable = Problem(knob, file, "is not a readable .npy file", "Write it with numpy.save.").within("data")
    with third_party_errors(unreadable):
        array = np.load(Path(file).expanduser(), mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "iu" or array.shape[1] < 2:
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        text = f"is not an array of integers [windows, tokens] with at least two tokens each: got {found}"
        raise RecipeError(Problem(knob, file, text).within("data"))
    if len(array) == 0:
        raise RecipeError(Problem(knob, file, "is an empty array").within("data"))
    return array
