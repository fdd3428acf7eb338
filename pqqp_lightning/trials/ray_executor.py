"""The nodes of a prefix tree as Ray's tasks, on this machine or on a cluster: each is begun once its parent is done.

A worker (:mod:`pqqp_lightning.trials.ray_worker`) has the driver's model, data, stages, trainer, seed and number of
threads, and writes to the same store. A worker whose addresses of results differ from the driver's is refused. The
working folder and the store must lie on a file system that all machines share.
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
from pqqp_lightning.trials.prefix_tree import Order, PrefixTree, prefixes
from pqqp_lightning.trials.progress import Progress
from pqqp_lightning.trials.ray_worker import Outcome, Settings, not_shared, pack, run_node, settings_of, soon

LOST = (WorkerCrashedError, OutOfMemoryError, NodeDiedError)
"""A worker is gone, which is no error of its own."""

MOST_LOST = 4
"""A node is given up when so many workers were lost over it."""

_task = ray.remote(run_node)


@dataclass(frozen=True)
class Running:
    """A task.

    Attributes:
        node: that it measures.
        keep: its model is needed.
        lost: workers that were lost over it.
    """

    node: Order
    keep: bool
    lost: int = 0


class RayExecutor:
    """Measures as many nodes at the same time as there are processors, or GPUs, for.

    Args:
        trainer: on one device.
        tree: not open yet.
        progress: is told what was computed.

    Raises:
        RecipeError: something cannot be sent to another process, or there is no cluster at ``RAY_ADDRESS``.
    """

    def __init__(self, trainer: Trainer, tree: PrefixTree, progress: Progress) -> None:
        self._tree, self._progress = tree, progress
        self._on_gpu = trainer.strategy.root_device.type == "cuda"
        self._ours = self._announced = False
        self._sent: tuple[Settings, list[Any]] | None = None
        try:
            self._packed = pack(trainer, tree)
        except Exception as error:  # whatever is raised by a class of the user's that cannot be pickled
            text = f"cannot send the model, data or trainer to other processes: {_line(error)}"
            way_out = "Leave out what cannot be pickled, or use --executor local."
            raise RecipeError(Problem("executor", "ray", text, way_out)) from error
        if os.environ.get("RAY_ADDRESS"):
            self._connect()

    def measure(self, sequences: Sequence[Order], is_late: Callable[[], bool]) -> Iterator[Order]:
        """Begin the first node, in the order of ``sequences``, whose parent is done, whenever there is room."""
        nodes = list(dict.fromkeys(node for sequence in sequences for node in prefixes(sequence)))
        missing = self._tree.missing(nodes)
        unknown = {node for node in missing if not self._tree.is_known(node)}
        done, left = set(nodes) - missing, list(sequences)
        waiting = [node for node in nodes if node in missing]
        running: dict[Any, Running] = {}
        try:
            while True:
                for sequence in [s for s in left if done.issuperset(prefixes(s))]:
                    left.remove(sequence)
                    for node in prefixes(sequence):
                        self._tree.measure(node)  # which looks it up
                    yield sequence
                if is_late():
                    waiting.clear()
                for node in self._next(waiting, done, running):
                    waiting.remove(node)
                    keep = any(other[:-1] == node for other in waiting)
                    running[self._begin(node, keep)] = Running(node, keep)
                if not running:
                    return
                ended = self._wait(running)
                if ended is None:
                    continue
                done.add(ended)
                if ended in unknown:
                    self._progress.measured(ended, self._room())
        finally:
            for task in running:
                ray.cancel(task, force=True)

    def close(self) -> None:
        """End the Ray that was started here; one that was there before stays."""
        self._sent = None
        if self._ours:
            ray.shutdown()

    def _next(self, waiting: Sequence[Order], done: set[Order], running: dict[Any, Running]) -> list[Order]:
        """The nodes to begin now."""
        able = [node for node in waiting if not node[:-1] or node[:-1] in done]
        return able[: max(0, self._most() - len(running))] if able else []

    def _begin(self, node: Order, keep: bool, again: bool = False) -> Any:
        """The task of this node; whether its model is to be kept, and whether a worker was lost over it."""
        if self._sent is None:
            self._sent = settings_of(uuid.uuid4().hex, self._tree.base), [ray.put(self._packed)]
            self._packed = b""
        cpus, gpus = self._needs()
        task = _task.options(num_cpus=cpus, num_gpus=gpus, max_retries=0)  # a retry is counted here
        return task.remote(*self._sent, node, keep, again)

    def _wait(self, running: dict[Any, Running]) -> Order | None:
        """The node of the next task to end; None if its worker was lost, and it was begun again."""
        (task,), _ = ray.wait(list(running), num_returns=1)
        ended = running.pop(task)
        try:
            outcome: Outcome = ray.get(task)
        except RayTaskError as error:
            raise error.cause from error
        except LOST as error:
            lost = ended.lost + 1
            if lost >= MOST_LOST:
                text = f"lost {lost} workers over {' -> '.join(ended.node)}: {_line(error)}"
                way_out = "If memory is short, let fewer run (a higher OMP_NUM_THREADS), or use --executor local."
                raise RecipeError(Problem("executor", "ray", text, way_out)) from error
            print(f"ray: a worker was lost; {' -> '.join(ended.node)} is measured again", flush=True)
            running[self._begin(ended.node, ended.keep, again=True)] = replace(ended, lost=lost)
            return None
        if outcome.problems:
            raise RecipeError(outcome.problems)
        if not soon(lambda: self._tree.is_known(ended.node)):
            raise RecipeError(not_shared(os.getcwd()))
        self._tree.applications += outcome.applications
        self._tree.seconds += outcome.seconds
        return ended.node

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        where = os.environ.get("RAY_ADDRESS") or "local"  # and not what an earlier `ray start` may have left
        heeded = signal.getsignal(signal.SIGTERM)
        try:
            _knock(where)
            ray.init(where, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, heeded)  # Ray's own ends the command with 15, and without a word
        except Exception as error:  # no connection, another version, a full disk: each is another class
            text = f"cannot reach or start Ray (RAY_ADDRESS={where}): {_line(error)}"
            way_out = (
                "Set RAY_ADDRESS to a cluster (and RAY_AUTH_TOKEN, if it needs one), unset it for this machine, or "
                "use --executor local."
            )
            raise RecipeError(Problem("executor", "ray", text, way_out)) from error
        self._ours = True

    def _needs(self) -> tuple[int, int]:
        """(processors, GPUs) of a task. Ray hands them out by count alone: on a GPU one processor will do, and no task
        waits for more processors than a machine has."""
        if self._on_gpu:
            return 1, 1
        most = max((int(machine.get("CPU", 0)) for machine in _machines()), default=0)
        return max(1, min(torch.get_num_threads(), most)), 0

    def _room(self) -> int:
        """How many tasks run at the same time."""
        cpus, gpus = self._needs()
        of_gpus = [machine.get("GPU", 0) if gpus else float("inf") for machine in _machines()]
        return sum(
            int(min(machine.get("CPU", 0) // cpus, most)) for machine, most in zip(_machines(), of_gpus, strict=True)
        )

    def _most(self) -> int:
        """How many tasks Ray is given at a time: one that waits lets a cluster grow."""
        self._connect()
        room = self._room()
        if not self._announced:
            self._announced = True
            threads = torch.get_num_threads()
            hint = "; a lower OMP_NUM_THREADS lets more run" if threads > 1 and not self._on_gpu else ""
            each = "a GPU" if self._on_gpu else "1 thread" if threads == 1 else f"{threads} threads"
            print(f"ray: {room} at a time, each with {each}{hint}" if room else f"ray: waits for {each}", flush=True)
        return room + (not self._ours or bool(os.environ.get("RAY_ADDRESS")))


def _machines() -> list[dict[str, float]]:
    """The resources of every machine."""
    return [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]


def _knock(address: str) -> None:
    """Ray tries for minutes to reach a cluster that is not there: see first whether anything answers.

    Raises:
        OSError: nothing does.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _line(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if words.endswith(".") else f"{words}."
