"""Sequences of stages, each from the same dense model; a common beginning is computed once, whoever asks for it.

The sequences form a tree: a node adds one stage to its parent. One model is in memory; the others lie on the disk as
packed checkpoints for as long as something may go on from them. What was measured stays in the store.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from pqqp_lightning.calibration.layer_errors import mark_blocks
from pqqp_lightning.calibration.walk import Walk
from pqqp_lightning.checkpoint.save import save_checkpoint
from pqqp_lightning.metrics.samples import Samples, restored
from pqqp_lightning.network.blocks import model_blocks
from pqqp_lightning.runs.run_data import DataSource
from pqqp_lightning.runs.stage_runner import Runner
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.storage.reports import Record
from pqqp_lightning.storage.result_store import Result, ResultStore
from pqqp_lightning.trials.fingerprint import (
    base_fingerprint,
    node_fingerprint,
    stage_fingerprint,
    training_fingerprint,
)

Order = tuple[str, ...]
"""Stages to apply one after another, by the names that a tree knows them by."""

READABLE = 60
"""Characters of the stages' names in a result's folder name."""


def prefixes(order: Order) -> list[Order]:
    """Every beginning of ``order`` but the empty one."""
    return [order[:length] for length in range(1, len(order) + 1)]


class PrefixTree:
    """Measures sequences of ``stages``.

    Args:
        trainer: for evaluation and training.
        data: the dense model and its data, set up.
        stages: by the names that orders call them by; two of them may be the same stage with other knobs, and then have
            one ``name``: the address of a result tells what was applied, and not what a search calls it.
        store: where results are looked up and kept.

    Attributes:
        base: the digests of all that results depend on besides the stages, and of what training does, once it is
            identified.
        applications: stages applied so far.
        seconds: what one application with its evaluation took, for each.
    """

    def __init__(self, trainer: Trainer, data: DataSource, stages: Mapping[str, Stage], store: ResultStore) -> None:
        self._trainer, self._data, self._store = trainer, data, store
        mark_blocks(model_blocks(data.module))
        self._runner = Runner(trainer, data, keep_samples=True)
        self._stages = dict(stages)
        self._digests = {name: stage_fingerprint(stage) for name, stage in stages.items()}
        self._results: dict[Order, Result] = {}
        self._samples: dict[tuple[Order, str], Samples | None] = {}
        self.base: tuple[str, str] | None = None
        self._at: Order | None = ()
        self.applications = 0
        self.seconds: list[float] = []

    def identify(self) -> None:
        """Find out what results depend on: from here on they can be looked up."""
        with self._without_loggers():
            self._runner.resume()
        self._settle()

    def open(self, check: Callable[[Iterable[str]], object] = lambda names: None) -> Record:
        """Measure the dense model, or look it up; nothing else can be measured before.

        Args:
            check: is shown the metrics' names, before all of the work.
        """
        if self.base is None:
            self.identify()
        with self._without_loggers():
            if not self.is_known(()):
                check(self._runner.metric_names())
            self._runner.dense = self.measure(()).record
        return self._runner.dense

    def open_with(self, dense: Result) -> None:
        """The same for a dense model that another tree of this trainer has measured on the same evaluation data."""
        self._settle()
        self._runner.dense, self._results[()] = dense.record, dense

    def _settle(self) -> None:
        self._runner.describe_dense(list(self._stages.values()))
        trains = any(stage.epochs for stage in self._stages.values())
        base = base_fingerprint(self._trainer, self._data, self._runner.targeted)
        self.base = base, training_fingerprint(self._trainer, self._data) if trains else ""

    def key(self, order: Order) -> str:
        """The address of a result."""
        assert self.base is not None, "not identified yet"
        base, training = self.base
        stages = [self._stages[name] for name in order]
        readable = "+".join(stage.name for stage in stages) or "dense"
        trained = training if any(stage.epochs for stage in stages) else ""
        digest = node_fingerprint(base, trained, [self._digests[name] for name in order])
        return f"{readable[:READABLE]}-{digest[:24]}"

    def is_known(self, order: Order) -> bool:
        """Whether the result is there already."""
        return order in self._results or self._agreed(lambda: self._store.has(self.key(order)))

    def missing(self, orders: Iterable[Order]) -> set[Order]:
        """The sequences whose last stage is to be applied until all ``orders`` are known: those that nobody has
        measured, and those among their beginnings whose models are not there any more."""
        found: set[Order] = set()
        for order in orders:
            if not self.is_known(order):
                found.add(order)
                while order[:-1] and not self.has_model(order[:-1]):
                    order = order[:-1]
                    found.add(order)
        return found

    def measure(self, order: Order) -> Result:
        """The result of the dense model after these stages, computed if nobody has computed it."""
        if order not in self._results:
            key = self.key(order)
            found = self._agreed(lambda: self._store.read(key))
            if found is None:
                with self._locked(key):
                    found = self._agreed(lambda: self._store.read(key)) or self._compute(order, key)
            self._results[order] = found
        return self._results[order]

    @property
    def names(self) -> list[str]:
        """What orders call the stages, as the tree was given them."""
        return list(self._stages)

    def results(self) -> dict[Order, Result]:
        """All that was measured or looked up, dense model included."""
        return dict(self._results)

    def samples(self, order: Order, metric: str) -> Samples | None:
        """What each evaluation sample adds to ``metric``, if that can be said."""
        if (order, metric) not in self._samples:
            result = self._results[order]
            samples = None
            if metric in result.samples and result.record["metrics"].get(metric) is not None:
                samples = restored(self._data.module, result.paths[metric], result.samples[metric])
            self._samples[order, metric] = samples
        return self._samples[order, metric]

    def snapshot(self, order: Order) -> Any:
        """The folder of the compressed model, computed again if it is not there any more."""
        if not self.has_model(order):
            if self._at == order:
                self._at = None  # in memory, but to be written
            self._go_to(order)
        return self._store.snapshot(self._model_key(order))

    def take_model(self, order: Order, take: Callable[[Path], None]) -> None:
        """Call ``take`` with the folder of the compressed model, which no other search drops meanwhile."""
        key, taken = self._model_key(order), False
        while not taken:
            self.snapshot(order)
            with self._locked(key):
                if taken := self.has_model(order):
                    if self._trainer.is_global_zero:
                        take(self._store.snapshot(key))
                    self._trainer.strategy.barrier("taken")

    def bring_to(self, order: Order) -> LightningModule:
        """The one model of the tree, after these stages, until the tree is asked for something else."""
        self._go_to(order)
        return self._data.module

    def compress_alone(self, name: str) -> LightningModule:
        """The one model of the tree, as this stage alone compresses it; nothing is measured or kept."""
        self._go_to(())
        self._at = None
        self._runner.compress(self._stages[name])
        return self._data.module

    @property
    def targeted(self) -> list[str]:
        """The dense model's layers that some stage acts on."""
        return self._runner.targeted

    @contextmanager
    def walking(self, title: str) -> Iterator[Walk]:
        """A walk of the model as it is over the calibration data; inside, the model is on the trainer's device."""
        with self._runner.on_device():
            yield self._runner.walk(title, model_blocks(self._data.module))

    def drop(self, order: Order) -> None:
        """Nothing goes on from ``order`` any more."""
        if self._trainer.is_global_zero:
            self._store.drop_snapshot(self._model_key(order))
        self._trainer.strategy.barrier("dropped")

    def _compute(self, order: Order, key: str) -> Result:
        if order:
            self._go_to(order[:-1])
            record = self._apply(order)
        else:
            record = self._runner.measure_dense(list(self._stages.values()))
        samples = self._runner.samples
        states = {name: found.states for name, found in samples.items()}
        result = Result(record, states, {name: found.path for name, found in samples.items()})
        if self._trainer.is_global_zero:
            self._store.write(key, result)
        self._trainer.strategy.barrier("measured")
        return result

    def _apply(self, order: Order, measured: Result | None = None) -> Record:
        """Apply the last stage of ``order``; what was measured before is not measured again."""
        start, self._at = time.perf_counter(), None
        stage, folder = self._stages[order[-1]], self._store.snapshot(self.key(order))
        if measured is not None:
            record = measured.record
            self._runner.apply_again(stage, folder, record)
        else:
            record = self._runner.apply(stage, folder, half=False)
            record.pop("logged_steps", None)  # where the loggers were: this process's history, not the result's
            self.seconds.append(time.perf_counter() - start)
        self._at = order
        self.applications += 1
        return record

    def _go_to(self, order: Order) -> None:
        """Bring the model to ``order``."""
        self._keep_dense()
        if self._at == order:
            return
        key = self._model_key(order)
        with self._locked(key):
            if self.has_model(order):
                self._at = None
                self._runner.load(self._store.snapshot(key))
                self._at = order
            elif order:  # dropped since it was measured
                measured = self._results.get(order) or self._agreed(lambda: self._store.read(key))
                self._go_to(order[:-1])
                self._apply(order, measured)
            else:
                raise RuntimeError("the dense model was dropped before the search's end")

    def _keep_dense(self) -> None:
        """Save the dense model as long as it is in memory: it cannot be computed again, and another search may have
        measured all that begins with it, so that the first thing this one does is to load what goes on from there."""
        if self._at != () or self.has_model(()):
            return
        key = self._model_key(())
        with self._locked(key):
            if self._trainer.is_global_zero:
                save_checkpoint(self._data.module, self._store.snapshot(key))
            self._trainer.strategy.barrier("dense")

    def has_model(self, order: Order) -> bool:
        """Whether the compressed model is there to go on from."""
        return self._agreed(lambda: self._store.has_snapshot(self._model_key(order)))

    def _model_key(self, order: Order) -> str:
        """Where the model lies. The dense one cannot be computed again: another search that ends must not drop it."""
        if order:
            return self.key(order)
        folder = str(Path(self._trainer.default_root_dir).resolve())
        return f"{self.key(())}-{hashlib.sha256(folder.encode()).hexdigest()[:8]}"

    def _agreed(self, ask: Callable[[], Any]) -> Any:
        """The first rank's answer, on every rank."""
        answer = ask() if self._trainer.is_global_zero else None
        return self._trainer.strategy.broadcast(answer) if self._trainer.world_size > 1 else answer

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        if not self._trainer.is_global_zero:
            yield
            return
        with self._store.locked(key):
            yield

    @contextmanager
    def _without_loggers(self) -> Iterator[None]:
        """Nothing is written to the run folder yet."""
        loggers, self._trainer.loggers = self._trainer.loggers, []
        try:
            yield
        finally:
            self._trainer.loggers = loggers
