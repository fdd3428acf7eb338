"""Measures the nodes of a prefix tree in Ray tasks, on this machine or on a cluster.

A node's task starts when its parent is done. A worker (:mod:`pqqp_lightning.trials.ray_worker`) has the driver's model,
data, stages, trainer, seed and number of threads, and writes to the same store. A worker is refused if its keys of
results differ from the driver's. All machines must share the file system with the working folder and the store.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from lightning.pytorch import Trainer
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from pqqp_lightning.errors import Problem, RecipeError
from pqqp_lightning.trials.prefix_tree import Order, PrefixTree, distinct_prefixes, prefixes
from pqqp_lightning.trials.progress import Progress
from pqqp_lightning.trials.ray_worker import (
    Outcome,
    Settings,
    not_shared_problem,
    pickle_search,
    read_settings,
    run_node,
    wait_until,
)

WORKER_LOST = (WorkerCrashedError, OutOfMemoryError, NodeDiedError)
"""The worker's process died; the task itself may be fine and is tried again."""

MAX_LOST_WORKERS = 4
"""Give a node up when this many workers died while measuring it."""

_task = ray.remote(run_node)


@dataclass(frozen=True)
class Running:
    """A running task.

    Attributes:
        node: the node that it measures.
        keep: keep the node's model for its children.
        lost_workers: workers that died while measuring it.
    """

    node: Order
    keep: bool
    lost_workers: int = 0


class RayExecutor:
    """Measures as many nodes in parallel as there are processors or GPUs for.

    Args:
        trainer: on one device.
        tree: the results; not open yet, since workers get a copy of it.
        progress: prints a line for each computed node.

    Raises:
        RecipeError: the search cannot be pickled, or no cluster answers at ``RAY_ADDRESS``.
    """

    def __init__(self, trainer: Trainer, tree: PrefixTree, progress: Progress) -> None:
        self._tree = tree
        self._progress = progress
        self._on_gpu = trainer.strategy.root_device.type == "cuda"
        self._connected_here = False
        self._announced = False
        self._sent: tuple[Settings, list[Any]] | None = None
        try:
            self._pickled = pickle_search(trainer, tree)
        except Exception as error:  # the user's classes may raise anything when pickled
            text = f"cannot send the model, data or trainer to other processes: {_one_line(error)}"
            way_out = "Leave out what cannot be pickled, or use --executor local."
            raise RecipeError(Problem("executor", "ray", text, way_out)) from error
        if os.environ.get("RAY_ADDRESS"):
            self._connect()

    def measure(self, sequences: Sequence[Order], is_late: Callable[[], bool]) -> Iterator[Order]:
        """Measure nodes in the order of ``sequences``; each starts when its parent is done and there is room."""
        nodes = distinct_prefixes(sequences)
        missing = self._tree.missing(nodes)
        unmeasured = {node for node in missing if not self._tree.is_known(node)}  # the others only lack their model
        done = set(nodes) - missing
        waiting = [node for node in nodes if node in missing]
        remaining = list(sequences)
        running: dict[Any, Running] = {}
        try:
            while True:
                for sequence in [s for s in remaining if done.issuperset(prefixes(s))]:
                    remaining.remove(sequence)
                    for node in prefixes(sequence):
                        self._tree.measure(node)  # reads the worker's result from the store
                    yield sequence
                if is_late():
                    waiting.clear()
                for node in self._startable(waiting, done, running):
                    waiting.remove(node)
                    keep = any(other[:-1] == node for other in waiting)
                    running[self._submit(node, keep)] = Running(node, keep)
                if not running:
                    return
                ended = self._wait_for_one(running)
                if ended is None:
                    continue
                done.add(ended)
                if ended in unmeasured:
                    self._progress.measured(ended, self._capacity())
        finally:  # also when the caller stops iterating, or a task has failed
            for task in running:
                ray.cancel(task, force=True)

    def close(self) -> None:
        """Shut Ray down if this executor has started or joined it."""
        self._sent = None
        if self._connected_here:
            ray.shutdown()

    def _startable(self, waiting: Sequence[Order], done: set[Order], running: dict[Any, Running]) -> list[Order]:
        """The nodes to start now: their parents are done and there is room for them."""
        ready = [node for node in waiting if not node[:-1] or node[:-1] in done]
        if not ready:  # Ray need not start if all results are known
            return []
        return ready[: max(0, self._task_limit() - len(running))]

    def _submit(self, node: Order, keep: bool, again: bool = False) -> Any:
        """Start the task of ``node``; ``again`` if a worker died while measuring it."""
        if self._sent is None:
            # Ray stores the pickled search once; each task gets a reference to it.
            self._sent = read_settings(uuid.uuid4().hex, self._tree.base), [ray.put(self._pickled)]
            self._pickled = b""
        cpus, gpus = self._task_resources()
        task = _task.options(num_cpus=cpus, num_gpus=gpus, max_retries=0)  # retries are counted in _wait_for_one
        return task.remote(*self._sent, node, keep, again)

    def _wait_for_one(self, running: dict[Any, Running]) -> Order | None:
        """Wait for a task to end and return its node; None if its worker died and the task was started again."""
        (task,), _ = ray.wait(list(running), num_returns=1)
        ended = running.pop(task)
        try:
            outcome: Outcome = ray.get(task)
        except RayTaskError as error:
            raise error.cause from error
        except WORKER_LOST as error:
            lost = ended.lost_workers + 1
            if lost >= MAX_LOST_WORKERS:
                text = f"lost {lost} workers over {' -> '.join(ended.node)}: {_one_line(error)}"
                way_out = "If memory is short, let fewer run (a higher OMP_NUM_THREADS), or use --executor local."
                raise RecipeError(Problem("executor", "ray", text, way_out)) from error
            print(f"ray: a worker was lost; measuring {' -> '.join(ended.node)} again", flush=True)
            running[self._submit(ended.node, ended.keep, again=True)] = replace(ended, lost_workers=lost)
            return None
        if outcome.problems:
            raise RecipeError(outcome.problems)
        if not wait_until(lambda: self._tree.is_known(ended.node)):
            raise RecipeError(not_shared_problem(os.getcwd()))
        self._tree.applications += outcome.applications
        self._tree.seconds += outcome.seconds
        return ended.node

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        where = os.environ.get("RAY_ADDRESS") or "local"  # without an address Ray would join an earlier `ray start`
        sigterm_handler = signal.getsignal(signal.SIGTERM)
        try:
            _require_listener(where)
            ray.init(where, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, sigterm_handler)  # Ray's own exits with 15 and prints no message
        except Exception as error:  # no connection, another version, a full disk: each raises another class
            text = f"cannot reach or start Ray (RAY_ADDRESS={where}): {_one_line(error)}"
            way_out = (
                "Set RAY_ADDRESS to a cluster (and RAY_AUTH_TOKEN, if it needs one), unset it for this machine, or "
                "use --executor local."
            )
            raise RecipeError(Problem("executor", "ray", text, way_out)) from error
        self._connected_here = True

    def _task_resources(self) -> tuple[int, int]:
        """(processors, GPUs) that a task reserves; a GPU task hardly uses its processor."""
        if self._on_gpu:
            return 1, 1
        # A task that asks for more processors than the largest machine has would wait forever.
        largest = max((int(machine.get("CPU", 0)) for machine in _machines()), default=0)
        return max(1, min(torch.get_num_threads(), largest)), 0

    def _capacity(self) -> int:
        """How many tasks can run in parallel now."""
        cpus, gpus = self._task_resources()
        capacity = 0
        for machine in _machines():
            tasks = machine.get("CPU", 0) // cpus
            if gpus:
                tasks = min(tasks, machine.get("GPU", 0))
            capacity += int(tasks)
        return capacity

    def _task_limit(self) -> int:
        """How many tasks to submit at a time: on a cluster one more than can run, which makes it add machines."""
        self._connect()
        capacity = self._capacity()
        if not self._announced:
            self._announced = True
            self._announce(capacity)
        on_cluster = not self._connected_here or bool(os.environ.get("RAY_ADDRESS"))
        return capacity + on_cluster

    def _announce(self, capacity: int) -> None:
        threads = torch.get_num_threads()
        hint = ""
        if self._on_gpu:
            share = "a GPU"
        elif threads == 1:
            share = "1 thread"
        else:
            share = f"{threads} threads"
            hint = "; a lower OMP_NUM_THREADS lets more run"
        if capacity:
            print(f"ray: {capacity} at a time, each with {share}{hint}", flush=True)
        else:
            print(f"ray: waiting for {share}", flush=True)


def _machines() -> list[dict[str, float]]:
    """The resources of every machine."""
    return [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]


def _require_listener(address: str) -> None:
    """Connect to the cluster's port once, because ``ray.init`` retries for minutes if nothing listens there.

    Raises:
        OSError: nothing listens.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _one_line(error: Exception) -> str:
    """The error's message as one sentence on one line."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if words.endswith(".") else f"{words}."
