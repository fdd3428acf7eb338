"""One run in its folder: the dense baseline, each stage in order, and resuming where a kill left off."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from pqqp_lightning.checkpoint.format import read_manifest
from pqqp_lightning.checkpoint.save import save_checkpoint
from pqqp_lightning.checkpoint.size import layer_table
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.structure import class_path
from pqqp_lightning.runs.finetuning import continue_steps
from pqqp_lightning.runs.run_data import DataSource
from pqqp_lightning.runs.stage_runner import Runner
from pqqp_lightning.seeding import run_seed
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.storage.records import append_record, read_records, write_report
from pqqp_lightning.storage.reports import Record
from pqqp_lightning.storage.run_folder import MANIFEST, RunFolder


class Run:
    """A list of stages applied in a run folder.

    Args:
        trainer: ours or Lightning's; its attribute ``recipe``, if any, is kept with the run.
        data: the model and its data.
        stages: in the order of compression.
        folder: the run folder.
    """

    def __init__(self, trainer: Trainer, data: DataSource, stages: Sequence[Stage], folder: Path) -> None:
        self._stages, self._folder, self._trainer = stages, RunFolder(folder), trainer
        self._runner = Runner(trainer, data)
        self._records: list[Record] = []
        self._identity = identity(trainer, data, stages)

    def go(self, *, resume: bool) -> list[Record]:
        """Do what is not done yet, and return the records of all stages, baseline first."""
        recipe = getattr(self._trainer, "recipe_text", "")
        if resume:
            self._folder.resume(self._identity)
            self._records = read_records(self._folder.path)
            if self._trainer.is_global_zero:
                self._folder.keep_recipe(recipe)
        elif self._trainer.is_global_zero:
            self._reopen_loggers(self._folder.open(self._identity, recipe))
        try:
            self._measure_dense()
            for position, stage in enumerate(self._stages):
                self._stage(position, stage)
            self._finish()
        except RecipeError:
            self._report("failed")
            raise
        return self._records

    def _measure_dense(self) -> None:
        if self._records:
            self._runner.resume()
            self._runner.describe_dense(self._stages)
            self._runner.dense = self._records[0]
            self._restore()
        else:
            self._add(self._runner.measure_dense(self._stages))

    def _restore(self) -> None:
        """Bring the model to where the run was: the last stage that is finished, or lacks only its finetuning."""
        continue_steps(self._trainer, max(record.get("logged_steps", 0) for record in self._records))
        done = len(self._records) - 1
        if done < len(self._stages) and self._half_done(done):
            done += 1
        if done:
            folder = self._stage_folder(done - 1)
            if done == len(self._stages) and not folder.is_dir():
                folder = self._folder.model
            self._runner.load(folder)

    def _stage(self, position: int, stage: Stage) -> None:
        if position + 1 < len(self._records):
            return
        folder = self._stage_folder(position)
        if position < len(self._runner.applied) and (compressed := self._half_done(position)):
            record = self._runner.finetune(stage, folder, compressed)
        else:
            record = self._runner.apply(stage, folder)
        self._add(record)
        if self._trainer.is_global_zero and position:
            shutil.rmtree(self._stage_folder(position - 1), ignore_errors=True)

    def _half_done(self, position: int) -> Record | None:
        """The record of a stage that was compressed but not yet finetuned when the run was killed."""
        folder = self._stage_folder(position)
        if not self._stages[position].epochs or not (folder / MANIFEST).is_file():
            return None
        record = read_manifest(folder)["record"]
        return None if "metrics_before_finetuning" in record else record

    def _finish(self) -> None:
        if not self._trainer.is_global_zero:
            return
        last = self._stage_folder(len(self._stages) - 1) if self._stages else None
        model = self._folder.model
        if last is not None and last.is_dir():
            shutil.rmtree(model, ignore_errors=True)
            last.replace(model)
            shutil.rmtree(self._folder.stages, ignore_errors=True)
        elif not model.is_dir():
            save_checkpoint(self._runner.module, model, self._runner.applied, {"record": self._records[-1]})
        self._report("finished")

    def _add(self, record: Record) -> None:
        self._records.append(record)
        if self._trainer.is_global_zero:
            append_record(self._folder.path, record)
            self._report("running")

    def _reopen_loggers(self, moved: bool) -> None:
        """Let loggers begin new files whose old ones were ``moved`` aside with the folder of an earlier run."""
        for logger in self._trainer.loggers:
            if moved and logger.log_dir and Path(logger.log_dir).is_relative_to(self._folder.path):
                vars(logger)["_experiment"] = None

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


def identity(trainer: Trainer, data: DataSource, stages: Sequence[Stage]) -> dict[str, Any]:
    """What makes two runs the same: stages with their knobs, seed, model and data."""
    plain = {
        "command": "fit",
        "seed": run_seed(),
        "stages": {s.name: {"class_path": class_path(s), "init_args": s.options()} for s in stages},
        "model": class_path(data.module),
        "data": None if data.datamodule is None else class_path(data.datamodule),
        **getattr(trainer, "recipe", {}),
    }
    return json.loads(json.dumps(plain, default=str))
