"""Applies stages to a model one after another: compress, verify, measure, save, finetune.

``fit`` and ``order`` are both built on :class:`Runner`: the first applies one list, the second every permutation.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torchmetrics import Metric

from pqqp_lightning.calibration.walk import Walk
from pqqp_lightning.checkpoint.format import Applied, skeleton_of
from pqqp_lightning.checkpoint.load import restore
from pqqp_lightning.checkpoint.save import save_checkpoint
from pqqp_lightning.checkpoint.size import ModelSize, measure_size, size_numbers
from pqqp_lightning.errors import RecipeError, shorten
from pqqp_lightning.metrics.samples import Samples, over_ranks, recording
from pqqp_lightning.network.blocks import Blocks
from pqqp_lightning.network.constraints import (
    Promise,
    broken_promises,
    collect_promises,
    constraints_of,
    set_constraints,
)
from pqqp_lightning.network.layers import weight_matrix
from pqqp_lightning.network.structure import Skeleton
from pqqp_lightning.runs.distillation import make_teacher
from pqqp_lightning.runs.finetuning import logged_steps, train_segment
from pqqp_lightning.runs.peak_memory import peak_memory
from pqqp_lightning.runs.run_data import DataSource
from pqqp_lightning.seeding import keep_random_state, run_seed, seed_from
from pqqp_lightning.stages.stage import Context, Stage
from pqqp_lightning.storage.records import make_record
from pqqp_lightning.storage.reports import Record

RESUME_POINT = "training.ckpt"


@dataclass
class Runner:
    """Applies stages to ``module``.

    Attributes:
        trainer: Lightning's, for evaluation and training.
        data: evaluation, calibration and training data.
        targeted: names of all layers that some stage of the run acts on.
        original_bits: bits of a dense targeted weight.
        dense_entries: weights that these layers have in the dense model.
        applied: the stages that the model has gone through.
        dense: the baseline's record.
        teacher: a frozen copy of the dense model, if a stage learns from one.
        keep_samples: note in ``samples`` what every sample adds to the metrics.
        samples: by metric, of the latest evaluation.
    """

    trainer: Trainer
    data: DataSource
    targeted: list[str] = field(default_factory=list)
    original_bits: int = 32
    dense_entries: int = 0
    applied: list[Applied] = field(default_factory=list)
    dense: Record | None = None
    teacher: LightningModule | None = None
    keep_samples: bool = False
    samples: dict[str, Samples] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._build = skeleton_of(self.module)
        self._structure = Skeleton(self.module)

    @property
    def module(self) -> LightningModule:
        """The model."""
        return self.data.module

    def resume(self) -> None:
        """Do what evaluating the dense model does besides: start the processes, convert the model, set up the data."""
        self._evaluate_little(0)

    def metric_names(self) -> list[str]:
        """What the evaluation measures, from one batch of it."""
        return list(self._evaluate_little(1))

    def _evaluate_little(self, batches: int) -> dict[str, float]:
        limit = self.trainer.limit_val_batches
        self.trainer.limit_val_batches = batches if limit else limit
        try:
            return self.evaluate()
        finally:
            self.trainer.limit_val_batches = limit

    def load(self, folder: Path) -> None:
        """Bring the model to the checkpoint in ``folder``."""
        if any(item.plan for item in self.applied):  # its structure is not the dense model's any more
            self._structure.restore(self.module)
        self.applied = restore(self.module, folder)["applied"]

    def evaluate(self) -> dict[str, float]:
        """The validation metrics of the model as it is; random state is put back."""
        watching = recording(self.module) if self.keep_samples else nullcontext({})
        with keep_random_state(), watching as found:
            results = self.trainer.validate(
                self.module, dataloaders=self.data.validation, datamodule=self.data.datamodule, verbose=False
            )
        metrics = {name: float(value) for result in results for name, value in result.items()}
        self.samples = {}
        recorded = over_ranks(found)
        for name, path in self._logged_metrics():
            if name in metrics and path in recorded and recorded[path].reproduces(metrics[name]):
                self.samples[name] = recorded[path]
        return metrics

    def _logged_metrics(self) -> Iterator[tuple[str, str]]:
        """Each name that the evaluation logged a torchmetrics metric under, and that metric's path in the model.

        Lightning keeps this pairing in the loop's results, which have no public name: two metrics may have the same
        value, so their values cannot tell which is which.
        """
        results = self.trainer.validate_loop._results
        for logged in results.values():
            path = logged.meta.metric_attribute
            if path is not None:
                for name in dict.fromkeys(results._forked_name(logged, on_step=False)):
                    yield name, path

    def measure_dense(self, stages: Sequence[Stage]) -> Record:
        """Evaluate the dense model and keep its record as the baseline."""
        with peak_memory(self.trainer.strategy.root_device) as peak:
            metrics = self.evaluate()
        self.describe_dense(stages)
        size = size_numbers(self.size(), self.original_bits)
        self.dense = make_record(
            name="dense",
            method="",
            options={},
            metrics=metrics,
            size=size,
            dense=None,
            elapsed_s=0.0,
            peak_memory_bytes=peak.size_bytes,
            constraints_verified=True,
            notes=[],
        )
        return self.dense

    def describe_dense(self, stages: Sequence[Stage]) -> None:
        """Note which layers the stages act on and what they are while dense; keep the teacher that stages ask for."""
        layers = {name: layer for stage in stages for name, layer in stage.find_layers(self.module).items()}
        self.targeted = list(layers)
        self.dense_entries = sum(layer.weight.numel() for layer in layers.values())
        if layers:
            self.original_bits = 8 * next(iter(layers.values())).weight.element_size()
        asking = [s.distill for s in stages if s.distill is not None and s.epochs]
        if asking and self.teacher is None:
            self.teacher = make_teacher(self.module, asking[0].teacher_dtype)

    def apply(self, stage: Stage, folder: Path, half: bool = True) -> Record:
        """Apply ``stage``: compress, verify and measure, then finetune and measure again; save to ``folder``.

        Args:
            stage: what to apply.
            folder: of the checkpoint.
            half: save before finetuning, too, for a run that goes on from there.

        Raises:
            RecipeError: the stage cannot go on, or broke an earlier stage's constraint.
        """
        start = time.perf_counter()
        with peak_memory(self.trainer.strategy.root_device) as peak:
            notes = self.compress(stage)
        record = self._record(stage, time.perf_counter() - start, peak.size_bytes, notes)
        if half or not stage.epochs:
            self.save(folder, record)
        if stage.epochs:
            record = self.finetune(stage, folder, record)
        return record

    def apply_again(self, stage: Stage, folder: Path, record: Record) -> None:
        """Apply ``stage`` as ``record`` has measured it before, and save the model once it is whole."""
        self.compress(stage)
        if stage.epochs:
            self._train(stage, folder)
        self.save(folder, record)

    def compress(self, stage: Stage) -> list[str]:
        """Let ``stage`` compress the model and verify every promise; returns its notes.

        Raises:
            RecipeError: the stage cannot go on, or broke an earlier stage's constraint.
        """
        seed_from(run_seed(), len(self.applied))
        context, promised = self._context(stage), collect_promises(self.module)
        with self.on_device():
            plan = stage.compress(self.module, context) if stage.compresses else {}
        self._agree_over_ranks()
        self._verify(stage, promised, context.notes)
        self.applied.append(Applied(type(stage), plan))
        return context.all_notes()

    def finetune(self, stage: Stage, folder: Path, compressed: Record) -> Record:
        """Train for the stage's epochs, from ``folder``'s training state if there is one; measure and save."""
        start = time.perf_counter()
        with peak_memory(self.trainer.strategy.root_device) as peak:
            notes = [*compressed["notes"], *self._train(stage, folder)]
        elapsed = compressed["elapsed_s"] + time.perf_counter() - start
        record = self._record(stage, elapsed, max(compressed["peak_memory_bytes"], peak.size_bytes), notes)
        record["metrics_before_finetuning"] = compressed["metrics"]
        record["logged_steps"] = logged_steps(self.trainer)
        self.save(folder, record)
        return record

    def _train(self, stage: Stage, folder: Path) -> list[str]:
        """Train the compressed model, let ``stage`` finish and verify every promise; returns its notes."""
        promised, context = collect_promises(self.module), self._context(stage)
        resume_point = folder.parent / RESUME_POINT
        train_segment(self.trainer, self.data, stage, len(self.applied), resume_point, self.teacher)
        with self.on_device():
            plan = stage.finish(self.module, context, self.applied[-1].plan)
        self._agree_over_ranks()
        self._verify(stage, promised, context.notes)
        self.applied[-1] = replace(self.applied[-1], plan=plan)
        return context.all_notes()

    def save(self, folder: Path, record: Record) -> None:
        """Save the model as it is, with its record, on the first rank."""
        if self.trainer.is_global_zero:
            save_checkpoint(self.module, folder, self.applied, {"record": record}, self._build)
        self.trainer.strategy.barrier("saved")

    def size(self) -> ModelSize:
        """The counted size of the model as it is."""
        return measure_size(self.module, self.targeted, self.dense_entries)

    def _context(self, stage: Stage) -> Context:
        return Context(partial(self.walk, stage.name), title=stage.name, progress=self._shows_progress())

    def _record(self, stage: Stage, elapsed_s: float, peak_bytes: int, notes: list[str]) -> Record:
        return make_record(
            name=stage.name,
            method=type(stage).__name__,
            options=stage.options(),
            metrics=self.evaluate(),
            size=size_numbers(self.size(), self.original_bits),
            dense=self.dense,
            elapsed_s=elapsed_s,
            peak_memory_bytes=peak_bytes,
            constraints_verified=True,
            notes=notes,
        )

    def walk(self, title: str, blocks: Blocks) -> Walk:
        """A walk of the model as it is over this rank's calibration batches."""
        limit = 1 if self.trainer.fast_dev_run else None
        batches, probe = self.data.calibration_batches(self.trainer.global_rank, self.trainer.world_size, limit)
        return Walk(
            self.module,
            blocks,
            batches,
            probe,
            self._run_batch,
            self.trainer.precision_plugin.forward_context,
            title,
            self._shows_progress(),
            loss=self._loss_of,
        )

    def _transferred(self, batch: Any) -> Any:
        """The batch as Lightning's own loops hand it to a step."""
        batch = self.trainer.precision_plugin.convert_input(batch)
        batch = self.module._on_before_batch_transfer(batch, 0)
        return self.trainer.strategy.batch_to_device(batch)

    def _loss_of(self, batch: Any) -> torch.Tensor:
        with _without_logging(self.module):
            result: Any = self.module.training_step(self._transferred(batch), 0)
        return result["loss"] if isinstance(result, dict) else result

    def _run_batch(self, batch: Any) -> None:
        batch = self._transferred(batch)
        step = getattr(self.module, "calibration_step", None)
        if step is not None:
            step(batch, 0)
            return
        with _without_logging(self.module):
            self.module.validation_step(batch, 0)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The model on the strategy's device while it is compressed, or walked over."""
        home = self.module.device
        self.module.to(self.trainer.strategy.root_device)
        try:
            yield
        finally:
            self.module.to(home)

    def _verify(self, stage: Stage, promised: list[Promise], notes: list[str]) -> None:
        """Hold the model to every promise: those made before the stage, and its own."""
        broken = broken_promises(self.module, promised)
        if broken and stage.allow_undo:
            for promise, found in broken:
                left = constraints_of(promise.layer).without_broken(weight_matrix(promise.layer), promise.constraints)
                set_constraints(promise.layer, left)
                notes.append(f"undone in {promise.name}: {'; '.join(found)}")
            broken = []
        broken += broken_promises(self.module, collect_promises(self.module))
        if broken:
            first, found = broken[0]
            names = dict.fromkeys(promise.name for promise, _ in broken)
            raise RecipeError(
                f"stages.{stage.name} ({type(stage).__name__}): broke what was promised for {shorten(names)}; "
                f"{first.name}: {'; '.join(found)}. Put this stage before the one that it undoes, or set "
                "allow_undo: true."
            )

    def _agree_over_ranks(self) -> None:
        """Every rank must hold the same weights after a stage."""
        if self.trainer.world_size == 1:
            return
        total = torch.stack([p.detach().double().abs().sum() for p in self.module.parameters()]).sum()
        sums = self.trainer.strategy.all_gather(total.to(self.trainer.strategy.root_device))
        if not bool((sums == sums.flatten()[0]).all()):
            raise RuntimeError("the ranks' weights differ after the stage")

    def _shows_progress(self) -> bool:
        return self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero


@contextmanager
def _without_logging(module: LightningModule) -> Iterator[None]:
    """Run a validation step outside of Lightning's loop: nothing is logged, metrics are afterwards as before."""
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    before = [{**m._copy_state_dict(), "_update_count": m._update_count, "_computed": m._computed} for m in metrics]
    for metric in metrics:
        metric.reset()  # a state that Lightning's evaluation left cannot be written to outside of inference mode
    module.__dict__["log"] = module.__dict__["log_dict"] = lambda *args, **kwargs: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        del module.__dict__["log"], module.__dict__["log_dict"]
        for metric, state in zip(metrics, before, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)
