"""Lightning's Trainer with compression stages among its callbacks."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import lightning.pytorch as pl
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from pqqp_lightning.argument_types import refuse_wrong_types
from pqqp_lightning.checkpoint.format import model_folder
from pqqp_lightning.checkpoint.load import restore
from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.network.offload import offload_of
from pqqp_lightning.runs.block_evaluation import Evaluate, evaluate_by_blocks
from pqqp_lightning.runs.calibration_precision import MatmulPrecision
from pqqp_lightning.runs.checks import check_recipe, check_uses, read_data
from pqqp_lightning.runs.preparation import attach, prepare
from pqqp_lightning.runs.run import Run
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.storage.run_folder import RunFolder
from pqqp_lightning.surgery.preparation import overridden_hooks


class Training(Stage):
    """The stage of a recipe without stages: ``trainer.max_epochs`` of ordinary training.

    Checkpoints store this class's path.
    """


class Trainer(pl.Trainer):
    """A Lightning Trainer whose callbacks may include stages: ``fit`` applies them in the order of the list.

    ``default_root_dir`` is the run folder (``runs/run`` by default). The other arguments are Lightning's. Four
    defaults differ: a CSV logger in the run folder, no model summary, no sanity validation, and no checkpoint callback
    unless you add one, since the run saves the model after each stage.

    Args:
        args: Lightning's.
        fold_parametrizations: make plain weights of all parametrized ones (weight_norm, spectral_norm, orthogonal,
            masks of torch.nn.utils.prune) before the first stage, also of layers that no stage acts on. The model
            computes the same in evaluation mode; training then moves the plain weights.
        calibration_precision: of float32 matrix products while stages calibrate, in the words of
            ``torch.set_float32_matmul_precision``: "highest" computes in float32, "high" in TF32 and "medium" in
            bfloat16 where the device has it. Statistics are summed, factorized and swept in float32. None leaves
            torch's own setting.
        kwargs: Lightning's.

    Attributes:
        recipe: the model's, the data's and the trainer's settings as plain data, which decide whether a run may be
            resumed; the command line sets it, and it is empty in Python.
        recipe_text: the whole recipe with its defaults, for the run folder; the command line sets it.

    Example::

        trainer = Trainer(callbacks=[SparseGPT(0.5), GPTQ(4)], default_root_dir="runs/first")
        trainer.fit(CausalLM("smollm2-135m"), datamodule=TextData())
    """

    recipe: dict[str, Any]
    recipe_text: str

    def __init__(
        self,
        *args: Any,
        fold_parametrizations: bool = False,
        calibration_precision: MatmulPrecision | None = None,
        **kwargs: Any,
    ) -> None:
        own = {"fold_parametrizations": fold_parametrizations, "calibration_precision": calibration_precision}
        refuse_wrong_types(Trainer.__init__, own, "trainer")
        self.fold_parametrizations = fold_parametrizations
        self.calibration_precision = calibration_precision
        callbacks = kwargs.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
        _refuse_others(callbacks)
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
        # Lightning refuses callbacks with equal state keys, which contain the stages' names.
        name_stages([c for c in callbacks if isinstance(c, Stage)])
        super().__init__(*args, **kwargs)
        self.recipe = {}
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
        """Evaluate the dense model, then apply the stages in order and evaluate after each.

        Args:
            model: any LightningModule.
            train_dataloaders: training data, or a datamodule.
            val_dataloaders: evaluation data.
            datamodule: in place of both.
            ckpt_path: "last" resumes the run in ``default_root_dir``.
            weights_only: ignored; checkpoints are always loaded as tensors only.

        Raises:
            RecipeError: with all problems of the recipe, before any work.
        """
        if not isinstance(model, LightningModule):  # torch.compile(module) is another class
            text = f"is {type(model).__name__}, which cannot be compressed"
            way_out = "Give the LightningModule itself, and compile it after the run."
            raise RecipeError(Problem(text=text, way_out=way_out).within("model"))
        if isinstance(train_dataloaders, LightningDataModule):
            datamodule = train_dataloaders
            train_dataloaders = None
        resume = is_resume(ckpt_path, "fit")
        data = RunData(model, train_dataloaders, val_dataloaders, datamodule)
        prepare(self, data)
        stages = self.stages
        if not stages and self.fit_loop.max_epochs:
            stages = [Training(epochs=self.fit_loop.max_epochs)]
        check_recipe(self, data, stages)
        read_data(self, data, stages)
        check_uses(self, data, stages)
        if self.fast_dev_run:  # leaves nothing behind, so it must not write over the run folder
            folder = Path(tempfile.mkdtemp(prefix="pqqp-fast-dev-run-"))
            try:
                Run(self, data, stages, folder).execute(resume=False)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return
        Run(self, data, stages, Path(self.default_root_dir)).execute(resume=resume)

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
        ckpt_path = self._load_run(model, ckpt_path, datamodule or dataloaders)

        def evaluate(*, verbose: bool) -> Any:
            return super(Trainer, self).validate(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

        return self._by_blocks(model, evaluate, verbose)

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
        ckpt_path = self._load_run(model, ckpt_path, datamodule or dataloaders)

        def evaluate(*, verbose: bool) -> Any:
            return super(Trainer, self).test(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

        return self._by_blocks(model, evaluate, verbose)

    def _by_blocks(self, model: LightningModule | None, evaluate: Evaluate, verbose: bool) -> Any:
        """Evaluate an offloaded model block by block: its weights then come to the device once, not for each batch."""
        if model is None:
            return evaluate(verbose=verbose)
        offload = offload_of(model)
        offload.connect(self.strategy.root_device, Path(self.default_root_dir))
        if offload.mode == "none":
            return evaluate(verbose=verbose)
        return evaluate_by_blocks(self, model, evaluate, verbose=verbose)

    def _load_run(self, model: LightningModule | None, ckpt_path: Any, data: Any) -> Any:
        """Load ``model`` from a run folder; returns the ``ckpt_path`` that is left for Lightning to load."""
        folder = Path(self.default_root_dir) if ckpt_path == "last" else Path(ckpt_path or "")
        if model is None or not ckpt_path:
            return ckpt_path
        if ckpt_path != "last" and not folder.is_dir():
            if str(ckpt_path).partition(":")[0] not in ("best", "hpc", "registry") and not is_zipfile(folder):
                text = "is neither a run folder nor a complete Lightning checkpoint"
                raise RecipeError(Problem("ckpt_path", str(ckpt_path), text))
            return ckpt_path
        if overridden_hooks(model):  # those that make layers may ask for the trainer and the data
            attach(self, RunData(model, datamodule=data if isinstance(data, LightningDataModule) else None))
        offload_of(model).connect(self.strategy.root_device, Path(self.default_root_dir))
        restore(model, model_folder(folder))
        return None


def is_resume(ckpt_path: Any, command: str) -> bool:
    """Whether ``ckpt_path`` asks to resume the run in the run folder.

    Raises:
        RecipeError: it names anything but "last".
    """
    if ckpt_path not in (None, "last"):
        text = f"is not supported: {command} resumes the run in --run_dir"
        raise RecipeError(Problem("ckpt_path", str(ckpt_path), text, "Use --ckpt_path last."))
    return ckpt_path is not None


def _refuse_others(callbacks: Sequence[Any]) -> None:
    """Refuse what is not a callback; Lightning would fail on it with an error of its own.

    Raises:
        RecipeError: with every one.
    """
    problems = []
    for callback in callbacks:
        if not isinstance(callback, pl.Callback):
            made = isinstance(callback, type) and issubclass(callback, pl.Callback)
            text = f"holds {callback!r}, which is not a callback"
            way_out = f"Make one: {callback.__name__}(...)." if made else "Give stages and Lightning's callbacks."
            problems.append(Problem("callbacks", text=text, way_out=way_out).within("trainer"))
    if problems:
        raise RecipeError(problems)


def name_stages(stages: Sequence[Stage]) -> None:
    """Number stages that share a name: sparsegpt, gptq, sparsegpt-2."""
    counts: Counter[str] = Counter()
    for stage in stages:
        counts[stage.name] += 1
        if counts[stage.name] > 1:
            stage.name = f"{stage.name}-{counts[stage.name]}"
