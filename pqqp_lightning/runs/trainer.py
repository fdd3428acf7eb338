"""Lightning's Trainer with compression stages among its callbacks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import lightning.pytorch as pl
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from pqqp_lightning.checkpoint.format import model_folder
from pqqp_lightning.checkpoint.load import restore
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.runs.checks import check_recipe
from pqqp_lightning.runs.run import Run
from pqqp_lightning.runs.run_data import DataSource
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.storage.run_folder import RunFolder


class Training(Stage):
    """What a recipe without stages does: ``trainer.max_epochs`` of ordinary training."""


class Trainer(pl.Trainer):
    """A Lightning Trainer whose callbacks may include stages: ``fit`` applies them in the order of the list.

    ``default_root_dir`` is the run folder (``runs/run`` by default). Everything else is Lightning's; four defaults
    differ: a CSV logger in the run folder, no model summary, no sanity validation, and no checkpoint callback
    unless you add one (stages save themselves).

    Example::

        trainer = Trainer(callbacks=[SparseGPT(0.5), GPTQ(4)], default_root_dir="runs/first")
        trainer.fit(CausalLM("smollm2-135m"), datamodule=TextData())
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        callbacks = kwargs.get("callbacks") or []
        callbacks = [callbacks] if isinstance(callbacks, pl.Callback) else list(callbacks)
        kwargs["default_root_dir"] = kwargs.get("default_root_dir") or "runs/run"
        if kwargs.get("logger") is None and not kwargs.get("fast_dev_run"):
            kwargs["logger"] = CSVLogger(
                kwargs["default_root_dir"], name=RunFolder(Path(kwargs["default_root_dir"])).logs.name
            )
        if kwargs.get("enable_model_summary") is None:
            kwargs["enable_model_summary"] = False
        if kwargs.get("num_sanity_val_steps") is None:
            kwargs["num_sanity_val_steps"] = 0
        if kwargs.get("enable_checkpointing") is None:
            kwargs["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        name_stages([c for c in callbacks if isinstance(c, Stage)])  # Lightning wants their states' keys distinct
        super().__init__(*args, **kwargs)
        self.recipe: dict[str, Any] = {}
        self.recipe_text = ""

    @property
    def stages(self) -> list[Stage]:
        """The stages among the callbacks, in order."""
        return [c for c in self.callbacks if isinstance(c, Stage)]

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Measure the dense model, then apply the stages in order; see the class.

        Args:
            model: any LightningModule.
            train_dataloaders: training data, or a datamodule.
            val_dataloaders: evaluation data.
            datamodule: in place of both.
            ckpt_path: "last" to go on with the run in ``default_root_dir``.
            weights_only: not used; checkpoints always load tensors only.

        Raises:
            RecipeError: everything that must be put right, before any work.
        """
        if isinstance(train_dataloaders, LightningDataModule):
            train_dataloaders, datamodule = None, train_dataloaders
        resume = goes_on(ckpt_path, "fit")
        data = DataSource(model, train_dataloaders, val_dataloaders, datamodule)
        stages = self.stages or self._plain_training()
        check_recipe(self, data, stages)
        data.read(self)
        if self.fast_dev_run:
            folder = Path(tempfile.mkdtemp(prefix="pqqp-fast-dev-run-"))
            try:
                Run(self, data, stages, folder).go(resume=False)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return
        Run(self, data, stages, Path(self.default_root_dir)).go(resume=resume)

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Lightning's ``validate``; ``ckpt_path`` may name a run folder ("last": this trainer's)."""
        ckpt_path = self._load_run(model, ckpt_path)
        return super().validate(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Lightning's ``test``; ``ckpt_path`` may name a run folder ("last": this trainer's)."""
        ckpt_path = self._load_run(model, ckpt_path)
        return super().test(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    def _load_run(self, model: LightningModule | None, ckpt_path: Any) -> Any:
        folder = Path(self.default_root_dir) if ckpt_path == "last" else Path(ckpt_path or "")
        if model is None or not ckpt_path:
            return ckpt_path
        if ckpt_path != "last" and not folder.is_dir():
            if str(ckpt_path).partition(":")[0] not in ("best", "hpc", "registry") and not is_zipfile(folder):
                raise RecipeError(
                    f"ckpt_path={ckpt_path}: is neither a run folder nor a whole checkpoint of Lightning's."
                )
            return ckpt_path
        restore(model, model_folder(folder))
        return None

    def _plain_training(self) -> list[Stage]:
        """Without any stage, ``max_epochs`` of ordinary training (none if it is not given)."""
        epochs = self.fit_loop.max_epochs
        if not epochs:
            return []
        return [Training(epochs=epochs)]


def goes_on(ckpt_path: Any, command: str) -> bool:
    """Whether ``ckpt_path`` asks to go on with what is in the run folder.

    Raises:
        RecipeError: it asks for something else.
    """
    if ckpt_path not in (None, "last"):
        raise RecipeError(f"ckpt_path={ckpt_path}: {command} goes on with the run in --run_dir. Use --ckpt_path last.")
    return ckpt_path is not None


def name_stages(stages: Sequence[Stage]) -> None:
    """Give stages without a name of their own a distinct one: sparsegpt, gptq, sparsegpt-2."""
    seen: dict[str, int] = {}
    for stage in stages:
        seen[stage.name] = seen.get(stage.name, 0) + 1
        if seen[stage.name] > 1:
            stage.name = f"{stage.name}-{seen[stage.name]}"
