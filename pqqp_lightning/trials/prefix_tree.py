"""Measures sequences of stages from one dense model; a common prefix is computed once for all searches.

The sequences form a tree: a node adds one stage to its parent. One node's model is in memory. The others are packed
checkpoints on disk, kept while a later sequence may extend them. Measured results stay in the store.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule
from torch import Tensor

from pqqp_lightning.calibration.layer_errors import mark_blocks
from pqqp_lightning.calibration.walk import Walk
from pqqp_lightning.checkpoint.save import save_checkpoint
from pqqp_lightning.metrics.samples import Samples, restored
from pqqp_lightning.network.blocks import model_blocks
from pqqp_lightning.runs.early_stop import StoppedEarly, Watch
from pqqp_lightning.runs.latency import Latency, measure_latency
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.stage_runner import StageRunner
from pqqp_lightning.runs.trainer import Trainer
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
"""Names of the stages to apply, in order; a node of the tree. The empty order is the dense model."""

MAX_NAME_LENGTH = 60
"""Characters of the stages' names at the start of a result's key; the digest after them identifies it."""


def prefixes(order: Order) -> list[Order]:
    """Every prefix of ``order``, the shortest first and ``order`` itself last, without the empty one."""
    return [order[:length] for length in range(1, len(order) + 1)]


def distinct_prefixes(orders: Iterable[Order]) -> list[Order]:
    """The prefixes of all ``orders`` without repetition, each before its extensions."""
    nodes: dict[Order, None] = {}  # a dict keeps the order, unlike a set
    for order in orders:
        nodes.update(dict.fromkeys(prefixes(order)))
    return list(nodes)


class PrefixTree:
    """Measures sequences of ``stages``.

    Args:
        trainer: for evaluation and training.
        data: the dense model and its data, set up.
        stages: by the names that orders use. A sweep may name one stage several times with other arguments; those
            share ``Stage.name``, because a result's key says what was applied, not what a search calls it.
        store: holds the results of all searches.

    Attributes:
        base: digests of what all results depend on, and of what finetuned ones depend on as well; None before
            :meth:`identify`.
        applications: number of stages applied so far.
        seconds: time of each application including its evaluation.
    """

    def __init__(self, trainer: Trainer, data: RunData, stages: Mapping[str, Stage], store: ResultStore) -> None:
        self._trainer = trainer
        self._data = data
        self._store = store
        mark_blocks(model_blocks(data.module))
        self._runner = StageRunner(trainer, data, keep_samples=True)
        self._stages = dict(stages)
        self._digests = {name: stage_fingerprint(stage) for name, stage in stages.items()}
        self._results: dict[Order, Result] = {}
        self._samples: dict[tuple[Order, str], Samples | None] = {}
        self.base: tuple[str, str] | None = None
        self._in_memory: Order | None = ()  # the model's node; None while a stage changes it
        self.applications = 0
        self.seconds: list[float] = []

    def identify(self) -> None:
        """Compute the digests that results are looked up by."""
        with self._without_loggers():
            self._runner.resume()
        self._compute_base()

    def open(self, check: Callable[[Iterable[str]], object] = lambda names: None) -> Record:
        """Measure the dense model, or look its result up; call this before :meth:`measure`.

        Args:
            check: called with the metrics' names before any work; may raise.
        """
        if self.base is None:
            self.identify()
        with self._without_loggers():
            if not self.is_known(()):
                check(self._runner.metric_names())
            self._runner.dense = self.measure(()).record
        return self._runner.dense

    def open_with(self, dense: Result) -> None:
        """Open with the dense result of another tree that has the same trainer and evaluation data."""
        self._compute_base()
        self._runner.dense = dense.record
        self._results[()] = dense

    def _compute_base(self) -> None:
        self._runner.describe_dense(list(self._stages.values()))
        base = base_fingerprint(self._trainer, self._data, self._runner.targeted)
        training = ""
        if any(stage.epochs for stage in self._stages.values()):  # reading training samples takes a while
            training = training_fingerprint(self._trainer, self._data)
        self.base = (base, training)

    def key(self, order: Order) -> str:
        """The key of a result in the store: the stages' names and a digest."""
        assert self.base is not None, "call identify() first"
        base, training = self.base
        stages = [self._stages[name] for name in order]
        names = "+".join(stage.name for stage in stages) or "dense"
        if not any(stage.epochs for stage in stages):
            training = ""  # changed training data must not invalidate results without finetuning
        digest = node_fingerprint(base, training, [self._digests[name] for name in order])
        return f"{names[:MAX_NAME_LENGTH]}-{digest[:24]}"

    def is_known(self, order: Order) -> bool:
        """Whether this or another search has measured ``order``."""
        return order in self._results or self._ask_first_rank(lambda: self._store.has(self.key(order)))

    def missing(self, orders: Iterable[Order]) -> set[Order]:
        """The nodes whose last stage must be applied to measure all ``orders``.

        These are the unmeasured orders, and their prefixes whose checkpoint was deleted.
        """
        missing: set[Order] = set()
        for order in orders:
            if self.is_known(order):
                continue
            missing.add(order)
            parent = order[:-1]
            while parent and not self.has_model(parent):
                missing.add(parent)
                parent = parent[:-1]
        return missing

    def measure(self, order: Order) -> Result:
        """The result of the dense model after these stages, looked up or computed."""
        if order not in self._results:
            key = self.key(order)
            result = self._ask_first_rank(lambda: self._store.read(key))
            if result is None:
                with self._locked(key):
                    # Another search may have computed it while this one waited for the lock.
                    result = self._ask_first_rank(lambda: self._store.read(key)) or self._compute(order, key)
            self._results[order] = result
        return self._results[order]

    def measure_unless(self, order: Order, metric: str, stops: Callable[[Tensor], bool]) -> Result | Tensor:
        """The result of ``order``, or what its first samples added to ``metric`` [n, S], if ``stops`` says so of them.

        A result that is known is looked at in the same way, so that a search does not depend on what others measured.

        Args:
            order: the node; its parent is measured. One whose last stage trains is always measured.
            metric: whose samples decide.
            stops: called with the samples so far, again and again.
        """
        if self._stages[order[-1]].epochs:  # the training has cost more than the evaluation would save
            return self.measure(order)
        key = self.key(order)
        part_key = f"{key}-part"
        path = self._results[()].paths.get(metric)
        if path is not None and not self.is_known(order):
            part = self._store.read(part_key)
            if part is not None and metric in part.samples and stops(part.samples[metric]):
                return part.samples[metric]
            with self._locked(key):
                if not self.is_known(order):
                    try:
                        self._results[order] = self._compute(
                            order, key, lambda states: path in states and stops(states[path])
                        )
                    except StoppedEarly as stopped:
                        self.applications += 1
                        states = stopped.states[path]
                        record = cast(Record, {"name": self._stages[order[-1]].name, "metrics": {}})
                        self._store.write(part_key, Result(record, {metric: states}, {metric: path}))
                        return states
        result = self.measure(order)
        known = result.samples.get(metric)
        return known if known is not None and stops(known) else result

    def latency(self, order: Order) -> Latency:
        """The time of a forward pass of ``order``'s model here and now, on the first evaluation batch."""
        self._go_to(order)
        with self._runner.on_device():
            return measure_latency(self._trainer, self._data.module, self._data.first_evaluation_batch())

    @property
    def names(self) -> list[str]:
        """The stages' names in orders, as given to the tree."""
        return list(self._stages)

    def results(self) -> dict[Order, Result]:
        """Every result that this tree has measured or looked up, the dense model's included."""
        return dict(self._results)

    def samples(self, order: Order, metric: str) -> Samples | None:
        """What each evaluation sample adds to ``metric``; None if it was not recorded."""
        if (order, metric) not in self._samples:
            result = self._results[order]
            samples = None
            if metric in result.samples and result.record["metrics"].get(metric) is not None:
                samples = restored(self._data.module, result.paths[metric], result.samples[metric])
            self._samples[order, metric] = samples
        return self._samples[order, metric]

    def snapshot(self, order: Order) -> Any:
        """The folder of the compressed model, which is computed again if it was deleted."""
        if not self.has_model(order):
            if self._in_memory == order:
                self._in_memory = None  # makes _go_to apply the stage again, which writes the checkpoint
            self._go_to(order)
        return self._store.snapshot(self._model_key(order))

    def take_model(self, order: Order, take: Callable[[Path], None]) -> None:
        """Call ``take`` with the folder of the compressed model; no other search can delete it meanwhile."""
        key = self._model_key(order)
        taken = False
        while not taken:
            self.snapshot(order)
            with self._locked(key):
                taken = self.has_model(order)  # another search may have deleted it before the lock was ours
                if taken:
                    if self._trainer.is_global_zero:
                        take(self._store.snapshot(key))
                    self._trainer.strategy.barrier("taken")

    def bring_to(self, order: Order) -> LightningModule:
        """Bring the tree's only model to ``order``; the next call of the tree may change it."""
        self._go_to(order)
        return self._data.module

    def compress_alone(self, name: str) -> LightningModule:
        """Compress the dense model with one stage; nothing is measured or kept. The next call may change the model."""
        self._go_to(())
        self._in_memory = None
        self._runner.compress(self._stages[name])
        return self._data.module

    @property
    def targeted(self) -> list[str]:
        """Names of the dense model's layers that some stage acts on."""
        return self._runner.targeted

    @contextmanager
    def walking(self, title: str) -> Iterator[Walk]:
        """Yield a calibration walk of the model in memory, which is on the trainer's device inside."""
        with self._runner.on_device():
            yield self._runner.walk(title, model_blocks(self._data.module))

    def drop(self, order: Order) -> None:
        """Delete the model of ``order``; its result stays."""
        if self._trainer.is_global_zero:
            self._store.drop_snapshot(self._model_key(order))
        self._trainer.strategy.barrier("dropped")

    def _compute(self, order: Order, key: str, watch: Watch | None = None) -> Result:
        if order:
            self._go_to(order[:-1])
            record = self._apply(order, watch=watch)
        else:
            record = self._runner.measure_dense(list(self._stages.values()))
        samples = self._runner.samples
        states = {name: found.states for name, found in samples.items()}
        result = Result(record, states, {name: found.path for name, found in samples.items()})
        if self._trainer.is_global_zero:
            self._store.write(key, result)
        self._trainer.strategy.barrier("measured")
        return result

    def _apply(self, order: Order, measured: Result | None = None, watch: Watch | None = None) -> Record:
        """Apply the last stage of ``order`` to its parent's model; with a known result, do not evaluate again."""
        start = time.perf_counter()
        self._in_memory = None
        stage = self._stages[order[-1]]
        folder = self._store.snapshot(self.key(order))
        if measured is not None:
            record = measured.record
            self._runner.apply_again(stage, folder, record)
        else:
            watched = {} if watch is None else {"watch": watch}
            record = self._runner.apply(stage, folder, half=False, **watched)
            record.pop("logged_steps", None)  # depends on what this process ran before, unlike the result
            self.seconds.append(time.perf_counter() - start)
        self._in_memory = order
        self.applications += 1
        return record

    def _go_to(self, order: Order) -> None:
        """Bring the model in memory to ``order``: load its checkpoint, or apply its stages again."""
        self._keep_dense()
        if self._in_memory == order:
            return
        key = self._model_key(order)
        with self._locked(key):
            if self.has_model(order):
                self._in_memory = None  # should loading fail, the model is of no node
                self._runner.load(self._store.snapshot(key))
                self._in_memory = order
            elif order:  # its checkpoint was deleted after the measurement
                measured = self._results.get(order) or self._ask_first_rank(lambda: self._store.read(key))
                self._go_to(order[:-1])
                self._apply(order, measured)
            else:
                raise RuntimeError("the dense model was dropped before the search's end")

    def _keep_dense(self) -> None:
        """Save the dense model before the model in memory changes, because it cannot be computed again.

        Measuring it is not the place: another search may have measured it already, and then this one only reads its
        result and loads a later node over it.
        """
        if self._in_memory != () or self.has_model(()):
            return
        key = self._model_key(())
        with self._locked(key):
            if self._trainer.is_global_zero:
                save_checkpoint(self._data.module, self._store.snapshot(key))
            self._trainer.strategy.barrier("dense")

    def has_model(self, order: Order) -> bool:
        """Whether the checkpoint of ``order`` exists, so that later stages can be applied to it."""
        return self._ask_first_rank(lambda: self._store.has_snapshot(self._model_key(order)))

    def _model_key(self, order: Order) -> str:
        """The key of the node's checkpoint.

        Searches share compressed models, but each has its own copy of the dense one, under its run folder's digest: it
        cannot be computed again when another search ends and deletes it.
        """
        if order:
            return self.key(order)
        folder = str(Path(self._trainer.default_root_dir).resolve())
        return f"{self.key(())}-{hashlib.sha256(folder.encode()).hexdigest()[:8]}"

    def _ask_first_rank(self, ask: Callable[[], Any]) -> Any:
        """Call ``ask`` on the first rank and return its answer on every rank.

        The store changes while ranks look at it. Ranks with different answers would take different branches.
        """
        answer = ask() if self._trainer.is_global_zero else None
        if self._trainer.world_size > 1:
            answer = self._trainer.strategy.broadcast(answer)
        return answer

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Hold the store's lock of ``key`` against other searches, on the first rank for all."""
        if not self._trainer.is_global_zero:
            yield
            return
        with self._store.locked(key):
            yield

    @contextmanager
    def _without_loggers(self) -> Iterator[None]:
        """Take the loggers away inside: the run folder must stay untouched until all checks have passed."""
        loggers = self._trainer.loggers
        self._trainer.loggers = []
        try:
            yield
        finally:
            self._trainer.loggers = loggers
