"""Applies stages to a model: compress, verify, measure, save, finetune.

``fit`` applies one list of stages with a :class:`StageRunner`; a search applies many lists, one after another.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any, TypedDict

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from pqqp_lightning.calibration.batch_norm import batch_norms, recalibrate_batch_norms
from pqqp_lightning.calibration.dense_weights import DenseWeights, mark_layers
from pqqp_lightning.calibration.walk import Walk
from pqqp_lightning.checkpoint.construction import skeleton_of
from pqqp_lightning.checkpoint.finished_blocks import FinishedBlocks
from pqqp_lightning.checkpoint.format import Applied
from pqqp_lightning.checkpoint.load import restore
from pqqp_lightning.checkpoint.probe import Probe, take_probe
from pqqp_lightning.checkpoint.save import replace_extra, save_checkpoint
from pqqp_lightning.checkpoint.size import ModelSize, measure_size, size_numbers
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.metrics.samples import Samples
from pqqp_lightning.network.blocks import Blocks
from pqqp_lightning.network.constraints import (
    collect_promises,
)
from pqqp_lightning.network.coverage import count_nonzero_parameters, count_parameters, measure_coverage
from pqqp_lightning.network.layer_uses import LayerUse, mark_uses, marked_uses
from pqqp_lightning.network.layers import Layer
from pqqp_lightning.network.offload import offload_of
from pqqp_lightning.network.structure import Skeleton, class_path
from pqqp_lightning.runs.distillation import make_teacher
from pqqp_lightning.runs.early_stop import StoppedEarly, Watch
from pqqp_lightning.runs.evaluation import evaluate, evaluate_batches, require_metrics
from pqqp_lightning.runs.finetuning import logged_steps, train_segment
from pqqp_lightning.runs.peak_memory import peak_memory
from pqqp_lightning.runs.preparation import preparation_notes
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.single_steps import evaluate_batch, has_calibration_step, loss_of, run_batch, transfer
from pqqp_lightning.runs.verification import require_equal_ranks, verify
from pqqp_lightning.seeding import keep_random_state, run_seed, seed_from
from pqqp_lightning.stages.stage import Context, Stage
from pqqp_lightning.storage.records import make_record
from pqqp_lightning.storage.reports import CoverageNumbers, Record, SizeNumbers

RESUME_POINT = "training.ckpt"
RECORD, UNMEASURED = "record", "unmeasured"
"""Entries of a checkpoint's manifest: the stage's record, or what is known of it before the model is evaluated."""


class Unmeasured(TypedDict):
    """What the record of a compressed stage says besides its metrics and what can be counted."""

    elapsed_s: float
    peak_memory_bytes: int
    notes: list[str]
    undone: bool
    coverage: CoverageNumbers | None


@dataclass
class StageRunner:
    """Applies stages to the model of ``data`` and measures it after each.

    Attributes:
        trainer: for evaluation and training.
        data: the model, and its evaluation, calibration and training data.
        targeted: names of the layers that at least one stage acts on.
        original_bits: bits per weight of these layers in the dense model.
        dense_entries: number of weights of these layers in the dense model.
        dense_parameters: number of all parameters of the dense model.
        applied: the stages applied so far, with their plans.
        dense: the baseline's record.
        teacher: a frozen copy of the dense model, if a stage distils from it.
        keep_samples: record what each evaluation sample adds to the metrics.
        samples: these contributions at the latest evaluation, by metric.
    """

    trainer: Trainer
    data: RunData
    targeted: list[str] = field(default_factory=list)
    original_bits: int = 32
    dense_entries: int = 0
    dense_parameters: int = 0
    applied: list[Applied] = field(default_factory=list)
    dense: Record | None = None
    teacher: LightningModule | None = None
    keep_samples: bool = False
    samples: dict[str, Samples] = field(default_factory=dict)

    def __post_init__(self) -> None:
        offload_of(self.module).connect(self.trainer.strategy.root_device, Path(self.trainer.default_root_dir))
        self._build = skeleton_of(self.module)
        mark_layers(self.module)
        self._needs_dense = False
        self._dense_weights: DenseWeights | None = None
        self._structure = Skeleton(self.module)
        self._uses: dict[str, LayerUse] = {}

    @property
    def module(self) -> LightningModule:
        """The model."""
        return self.data.module

    def resume(self) -> None:
        """Start the processes, convert the model and set up the data, without evaluating.

        A run whose baseline is already measured still needs these side effects of an evaluation.
        """
        evaluate_batches(self.trainer, self.data, 0)

    def metric_names(self) -> list[str]:
        """Names of the metrics, from evaluating one batch.

        Raises:
            RecipeError: it logs none.
        """
        metrics = evaluate_batches(self.trainer, self.data, 1)
        require_metrics(self.trainer, self.module, metrics)
        return list(metrics)

    def load(self, folder: Path) -> None:
        """Load the checkpoint in ``folder`` into the model."""
        self._keep_dense()
        if any(item.plan for item in self.applied):  # stages changed its structure; a checkpoint's plans start dense
            self._structure.restore(self.module)
            mark_uses(self.module, self._uses)
        self.applied = restore(self.module, folder)["applied"]

    def evaluate(self, watch: Watch | None = None) -> dict[str, float]:
        """The metrics of the model as it is now; :attr:`samples` gets what each sample added. See ``evaluate``."""
        evaluated = evaluate(self.trainer, self.data, keep_samples=self.keep_samples, watch=watch)
        self.samples = evaluated.samples
        return evaluated.metrics

    def measure_dense(self, stages: Sequence[Stage]) -> Record:
        """Evaluate the dense model and keep its record as the baseline."""
        with peak_memory(self.trainer.strategy.root_device) as peak:
            metrics = self.evaluate()
        require_metrics(self.trainer, self.module, metrics)
        self.describe_dense(stages)
        self.dense = make_record(
            name="dense",
            method="",
            options={},
            metrics=metrics,
            size=self._size_numbers(),
            dense=None,
            elapsed_s=0.0,
            peak_memory_bytes=peak.size_bytes,
            constraints_verified=True,
            notes=preparation_notes(self.module),
        )
        return self.dense

    def describe_dense(self, stages: Sequence[Stage]) -> None:
        """Read the targeted layers' sizes while the model is dense, and copy the teacher if a stage needs one."""
        layers: dict[str, Layer] = {}
        for stage in stages:
            layers.update(stage.find_layers(self.module))
        self.targeted = list(layers)
        self._uses = marked_uses(self.module)
        self.dense_entries = sum(layer.weight.numel() for layer in layers.values())
        self.dense_parameters = count_parameters(self.module)
        if layers:
            self.original_bits = 8 * next(iter(layers.values())).weight.element_size()
        self._needs_dense = any(stage.needs_dense for stage in stages)
        distillations = [stage.distill for stage in stages if stage.distill is not None and stage.epochs]
        if distillations and self.teacher is None:
            self.teacher = make_teacher(self.module, distillations[0].teacher_dtype)  # the checks want one dtype

    def _keep_dense(self) -> None:
        """Copy the dense weights to disk before the model changes for the first time, if a stage needs them."""
        if self._needs_dense and self._dense_weights is None:
            folder = Path(self.trainer.default_root_dir)
            self._dense_weights = DenseWeights(self.module, folder if folder.is_dir() else Path(gettempdir()))

    def _dense_weight(self, layer: Layer) -> Tensor | None:
        """The weight [O, I] of ``layer`` in the dense model; None where a stage changed what the layer computes."""
        comparable = all(item.stage.comparable_layers for item in self.applied)
        return self._dense_weights.of(layer) if comparable and self._dense_weights is not None else None

    def apply(self, stage: Stage, folder: Path, half: bool = True, watch: Watch | None = None) -> Record:
        """Apply ``stage``: compress, verify and measure, then finetune and measure again; save to ``folder``.

        Args:
            stage: the stage to apply.
            folder: where the checkpoint is written.
            half: save before measuring and finetuning as well, so that a killed run resumes there.
            watch: may stop the evaluation of a stage that does not train.

        Raises:
            RecipeError: the stage fails, or broke an earlier stage's constraint.
            StoppedEarly: ``watch`` stopped the evaluation; nothing is saved.
        """
        coverage = self._coverage(stage)  # before the stage changes the model's structure
        start = time.perf_counter()
        with peak_memory(self.trainer.strategy.root_device) as peak:
            context = self.compress(stage, folder)
        unmeasured: Unmeasured = {
            "elapsed_s": time.perf_counter() - start + context.finished.earlier_s,
            "peak_memory_bytes": peak.size_bytes,
            "notes": context.all_notes(),
            "undone": context.undone,
            "coverage": coverage,
        }
        if half:
            self.save(folder, {UNMEASURED: unmeasured})
            record = self.measure(stage, folder, unmeasured)
        else:
            try:
                metrics = self.evaluate(None if stage.epochs else watch)
            except StoppedEarly:
                context.finished.drop()
                raise
            record = self._measured(stage, unmeasured, metrics)
            if not stage.epochs:
                self.save(folder, {RECORD: record})
        if stage.epochs:
            record = self.finetune(stage, folder, record)
        return record

    def measure(self, stage: Stage, folder: Path, unmeasured: Unmeasured) -> Record:
        """Measure the compressed model, whose checkpoint is in ``folder``, and write the record there.

        Args:
            stage: the stage that was compressed.
            folder: of its checkpoint.
            unmeasured: what the checkpoint's manifest says of the stage.
        """
        record = self._measured(stage, unmeasured, self.evaluate())
        if self.trainer.is_global_zero:
            replace_extra(folder, {RECORD: record}, UNMEASURED)
        self.trainer.strategy.barrier("measured")
        return record

    def apply_again(self, stage: Stage, folder: Path, record: Record) -> None:
        """Apply ``stage`` without evaluating and save the model; ``record`` is its known result."""
        self.compress(stage, folder)
        if stage.epochs:
            self._train(stage, folder)
        self.save(folder, {RECORD: record})

    def compress(self, stage: Stage, folder: Path | None = None) -> Context:
        """Compress the model with ``stage`` and verify every promise; returns what it noted.

        Args:
            stage: the stage to apply.
            folder: of its checkpoint. Until that is saved, it has the blocks that the stage has finished, so that a
                killed run resumes at the next one.

        Raises:
            RecipeError: the stage fails, or broke an earlier stage's constraint.
        """
        # The position is part of the seed: a stage computes the same in a resumed run and in every search.
        seed_from(run_seed(), len(self.applied))
        self._keep_dense()
        context = self._context(stage)
        context.finished = self._finished_blocks(stage, folder)
        promised = collect_promises(self.module)
        for what, layers in stage.left_layers(self.module).items():
            context.found(what, layers)
        with self.on_device():
            plan = stage.compress(self.module, context) if stage.compresses else {}
            if stage.recalibrates_batch_norm:
                self._recalibrate_batch_norms(stage, context)
        offload_of(self.module).settle(self.module)
        require_equal_ranks(self.trainer, self.module)
        verify(self.module, stage, promised, context)
        self.applied.append(Applied(type(stage), plan))
        return context

    def _recalibrate_batch_norms(self, stage: Stage, context: Context) -> None:
        """Estimate the statistics of the model's BatchNorm layers again; ``context`` gets what the record says of it.

        A stage that needs no calibration data itself runs without, and the statistics then stay as they are.
        """
        norms = batch_norms(self.module)
        if not norms:
            return
        if not self.data.has_calibration_data():
            context.notes.append("BatchNorm statistics kept: there is no calibration data")
            return
        with keep_random_state():
            try:
                walk = context.walk(stage.find_blocks(self.module))
            except RecipeError as error:
                context.notes.append(f"BatchNorm statistics kept: {error.problems[0].text}")
                return
            findings = recalibrate_batch_norms(walk)
        for what, layers in findings.items():
            context.found(what, layers)
        context.notes.append(f"BatchNorm statistics of {len(norms)} layers estimated again")

    def finetune(self, stage: Stage, folder: Path, compressed: Record) -> Record:
        """Train for the stage's epochs, resuming a killed training; then measure and save.

        Args:
            stage: the stage that was compressed.
            folder: where the checkpoint is written.
            compressed: the record of the stage before finetuning.
        """
        start = time.perf_counter()
        with peak_memory(self.trainer.strategy.root_device) as peak:
            context = self._train(stage, folder)
        elapsed = compressed["elapsed_s"] + time.perf_counter() - start
        peak_bytes = max(compressed["peak_memory_bytes"], peak.size_bytes)
        notes = [*compressed["notes"], *context.all_notes()]
        undone = compressed.get("undone", False) or context.undone  # runs of earlier versions did not record it
        record = self._record(stage, self.evaluate(), elapsed, peak_bytes, notes, undone)
        if "coverage" in compressed:
            record["coverage"] = compressed["coverage"]
        record["metrics_before_finetuning"] = compressed["metrics"]
        record["logged_steps"] = logged_steps(self.trainer)
        self.save(folder, {RECORD: record})
        return record

    def _train(self, stage: Stage, folder: Path) -> Context:
        """Train the compressed model, let ``stage`` finish and verify every promise; returns what it noted."""
        promised = collect_promises(self.module)
        context = self._context(stage)
        resume_point = folder.parent / RESUME_POINT
        train_segment(self.trainer, self.data, stage, len(self.applied), resume_point, self.teacher)
        with self.on_device():
            plan = stage.finish(self.module, context, self.applied[-1].plan)
        require_equal_ranks(self.trainer, self.module)
        verify(self.module, stage, promised, context)
        self.applied[-1] = replace(self.applied[-1], plan=plan)
        return context

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """Save the model, with ``extra`` in its manifest, on the first rank."""
        probe = self.probe()  # on every rank: the user's step may wait for the others
        if self.trainer.is_global_zero:
            save_checkpoint(self.module, folder, self.applied, extra, self._build, probe)
        self.trainer.strategy.barrier("saved")

    def probe(self) -> Probe:
        """What the model computes on a few evaluation samples, to compare with after loading."""
        with self.on_device():
            try:
                with keep_random_state():
                    batch = transfer(self.trainer, self.module, self.data.probe_batch())
            except Exception as error:  # the data is the user's, and the run shall go on without a probe
                return Probe(missing=f"{type(error).__name__}: {error}")
            return take_probe(self.module, batch)

    def size(self) -> ModelSize:
        """Count the model's size."""
        return measure_size(self.module, self.targeted, self.dense_entries, self.dense_parameters)

    def _size_numbers(self) -> SizeNumbers:
        return size_numbers(self.size(), self.original_bits, count_nonzero_parameters(self.module))

    def _coverage(self, stage: Stage) -> CoverageNumbers | None:
        """What ``stage`` covers of the model as it is now; None for a stage that only trains."""
        if not stage.compresses:
            return None
        coverage = measure_coverage(self.module, stage.find_layers(self.module).values())
        return {"parameters": coverage.parameters, "covered": coverage.covered, "left": coverage.left}

    def _context(self, stage: Stage) -> Context:
        return Context(
            partial(self.walk, stage.name),
            title=stage.name,
            progress=self._shows_progress(),
            dense=self._dense_weight,
            offload=offload_of(self.module),
        )

    def _finished_blocks(self, stage: Stage, folder: Path | None) -> FinishedBlocks:
        identity = {
            "stage": class_path(stage),
            "arguments": stage.arguments(),
            "position": len(self.applied),
            "seed": run_seed(),
            "processes": self.trainer.world_size,
        }
        agree = self.trainer.strategy.broadcast if self.trainer.world_size > 1 else bool
        return FinishedBlocks(folder, identity, writes=self.trainer.is_global_zero, agree=agree)

    def _measured(self, stage: Stage, unmeasured: Unmeasured, metrics: dict[str, float]) -> Record:
        """The record of a stage that was compressed and not finetuned."""
        elapsed, peak_bytes = unmeasured["elapsed_s"], unmeasured["peak_memory_bytes"]
        record = self._record(stage, metrics, elapsed, peak_bytes, unmeasured["notes"], unmeasured["undone"])
        if unmeasured["coverage"] is not None:
            record["coverage"] = unmeasured["coverage"]
        return record

    def _record(
        self,
        stage: Stage,
        metrics: dict[str, float],
        elapsed_s: float,
        peak_bytes: int,
        notes: list[str],
        undone: bool,
    ) -> Record:
        return make_record(
            name=stage.name,
            method=type(stage).__name__,
            options=stage.arguments(),
            metrics=metrics,
            size=self._size_numbers(),
            dense=self.dense,
            elapsed_s=elapsed_s,
            peak_memory_bytes=peak_bytes,
            constraints_verified=True,
            notes=notes,
            undone=undone,
        )

    def walk(self, title: str, blocks: Blocks) -> Walk:
        """Make a walk of the model over this rank's calibration batches."""
        limit = 1 if self.trainer.fast_dev_run else None
        batches, probe = self.data.calibration_batches(self.trainer.global_rank, self.trainer.world_size, limit)
        return Walk(
            self.module,
            blocks,
            batches,
            probe,
            partial(run_batch, self.trainer, self.module),
            self.trainer.precision_plugin.forward_context,
            title,
            self._shows_progress(),
            loss=partial(loss_of, self.trainer, self.module),
            dense=None if self._dense_weights is None else self._dense_weights.inside,
            evaluate=partial(evaluate_batch, self.trainer, self.module) if has_calibration_step(self.module) else None,
        )

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Move the model to the strategy's device inside; Lightning moves it back to the CPU after each loop."""
        home = self.module.device
        self.module.to(self.trainer.strategy.root_device)
        try:
            yield
        finally:
            self.module.to(home)

    def _shows_progress(self) -> bool:
        return self.trainer.progress_bar_callback is not None and self.trainer.is_global_zero
