"""One run in its folder: the dense baseline, then each stage in order; a killed run resumes where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqqp_lightning.checkpoint.format import read_manifest
from pqqp_lightning.checkpoint.save import save_checkpoint
from pqqp_lightning.checkpoint.size import layer_table
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.structure import class_path
from pqqp_lightning.runs.companions import keep_companions
from pqqp_lightning.runs.finetuning import continue_steps
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.stage_runner import RECORD, UNMEASURED, StageRunner
from pqqp_lightning.seeding import run_seed
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.storage.records import append_record, read_records, write_report
from pqqp_lightning.storage.reports import Record
from pqqp_lightning.storage.run_folder import MANIFEST, RunFolder

if TYPE_CHECKING:
    from pqqp_lightning.runs.trainer import Trainer  # which imports this module


class Run:
    """Applies a list of stages to a model and keeps everything in a run folder.

    Args:
        trainer: ours; its recipe is stored in the folder.
        data: the model and its data.
        stages: in the order of compression.
        folder: the run folder.
    """

    def __init__(self, trainer: Trainer, data: RunData, stages: Sequence[Stage], folder: Path) -> None:
        self._stages = stages
        self._folder = RunFolder(folder)
        self._trainer = trainer
        self._data = data
        self._runner = StageRunner(trainer, data)
        self._records: list[Record] = []
        self._identity = run_identity(trainer, data, stages)

    def execute(self, *, resume: bool) -> list[Record]:
        """Apply the stages, or with ``resume`` the remaining ones.

        Returns:
            The records of all stages, the baseline's first.
        """
        recipe = self._trainer.recipe_text
        if resume:
            self._folder.resume(self._identity)
            self._records = read_records(self._folder.path)
            if self._trainer.is_global_zero:
                self._folder.keep_recipe(recipe)
        elif self._trainer.is_global_zero:
            moved = self._folder.open(self._identity, recipe)
            for logger in self._trainer.loggers:
                # An earlier run in the folder was moved aside together with the files that its loggers hold open.
                if moved and logger.log_dir and Path(logger.log_dir).is_relative_to(self._folder.path):
                    vars(logger)["_experiment"] = None  # Lightning's loggers open it again on first use
        try:
            self._measure_dense()
            for position, stage in enumerate(self._stages):
                self._apply(position, stage)
            self._finish()
        except RecipeError:
            self._report("failed")
            raise
        return self._records

    def _measure_dense(self) -> None:
        if self._records:
            self._runner.resume()
            self._runner.describe_dense(self._stages)  # before _restore: the layers must be those of the dense model
            self._runner.dense = self._records[0]
            self._restore()
        else:
            self._add(self._runner.measure_dense(self._stages))

    def _restore(self) -> None:
        """Load the model of the last compressed stage, finetuned or not."""
        continue_steps(self._trainer, max(record.get("logged_steps", 0) for record in self._records))
        applied = len(self._records) - 1
        if applied < len(self._stages) and self._half_done(applied) is not None:
            applied += 1
        if applied:
            folder = self._stage_folder(applied - 1)
            # A run killed at its very end has already moved the last stage's folder.
            if applied == len(self._stages) and not folder.is_dir():
                folder = self._folder.model
            self._runner.load(folder)

    def _apply(self, position: int, stage: Stage) -> None:
        """Apply the stage at ``position``, or the finetuning that it lacks, unless its record exists."""
        if position + 1 < len(self._records):
            return
        folder = self._stage_folder(position)
        manifest = None
        if position < len(self._runner.applied):  # loaded by _restore
            manifest = self._half_done(position)
        if manifest is None:
            record = self._runner.apply(stage, folder)
        else:
            if RECORD in manifest:
                record = manifest[RECORD]
            else:
                record = self._runner.measure(stage, folder, manifest[UNMEASURED])
            if stage.epochs:
                record = self._runner.finetune(stage, folder, record)
        self._add(record)
        if self._trainer.is_global_zero and position:  # only now can the run resume from this stage's folder
            shutil.rmtree(self._stage_folder(position - 1), ignore_errors=True)

    def _half_done(self, position: int) -> dict[str, Any] | None:
        """The manifest of a stage that was compressed, and perhaps measured, when the run was killed; else None.

        A stage that was finetuned but is not on record begins anew: the loggers' step belongs to its training.
        """
        folder = self._stage_folder(position)
        if not (folder / MANIFEST).is_file():
            return None
        manifest = read_manifest(folder)
        return None if "metrics_before_finetuning" in manifest.get(RECORD, {}) else manifest

    def _finish(self) -> None:
        """Move the last stage's checkpoint to its final place, and write the finished report."""
        probe = None if self._stages else self._runner.probe()
        if not self._trainer.is_global_zero:
            return
        last = self._stage_folder(len(self._stages) - 1) if self._stages else None
        model = self._folder.model
        if last is not None and last.is_dir():
            shutil.rmtree(model, ignore_errors=True)
            last.replace(model)
            shutil.rmtree(self._folder.stages, ignore_errors=True)
        elif not model.is_dir():  # no stages: the model is dense or loaded
            extra = {RECORD: self._records[-1]}
            save_checkpoint(self._runner.module, model, self._runner.applied, extra, probe=probe)
        keep_companions(self._folder, self._data)
        self._report("finished")

    def _add(self, record: Record) -> None:
        self._records.append(record)
        if self._trainer.is_global_zero:
            append_record(self._folder.path, record)
            self._report("running")

    def _report(self, status: str) -> None:
        if not self._trainer.is_global_zero:
            return
        more: dict[str, Any] = {"seed": run_seed(), "recipe": self._identity}
        if status == "finished":
            more["layers"] = layer_table(self._runner.size())
            more["checkpoint"] = {"path": self._folder.model.name, "file_bytes": self._folder.model_bytes()}
        write_report(self._folder.path, status=status, records=self._records, **more)

    def _stage_folder(self, position: int) -> Path:
        return self._folder.stage(position, self._stages[position].name)


def run_identity(trainer: Trainer, data: RunData, stages: Sequence[Stage]) -> dict[str, Any]:
    """Everything that a resumed run must share: stages with their arguments, seed, model and data, as plain data."""
    plain = {
        "command": "fit",
        "seed": run_seed(),
        "stages": {stage.name: {"class_path": class_path(stage), "init_args": stage.arguments()} for stage in stages},
        "model": class_path(data.module),
        "data": None if data.datamodule is None else class_path(data.datamodule),
        **trainer.recipe,
    }
    if trainer.fold_parametrizations:  # only then: older runs do not have it
        plain["fold_parametrizations"] = True
    return json.loads(json.dumps(plain, default=str))
