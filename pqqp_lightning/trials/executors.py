"""Executors measure the sequences of a search: in this process one by one, or in Ray tasks in parallel.

Both write results to the store, and the search reads them from there, so its findings do not depend on the executor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from pqqp_lightning.errors import Problem, suggest
from pqqp_lightning.trials.prefix_tree import Order, PrefixTree, prefixes
from pqqp_lightning.trials.progress import Progress

LOCAL, RAY = "local", "ray"
EXECUTORS = (LOCAL, RAY)


class Executor(Protocol):
    """Measures sequences of stages."""

    def measure(self, sequences: Sequence[Order], is_late: Callable[[], bool]) -> Iterator[Order]:
        """Measure ``sequences`` and all their prefixes, and yield each sequence that is done.

        Once ``is_late`` returns True, nothing new is measured; sequences with known results are still yielded.
        """


class LocalExecutor:
    """Measures in this process."""

    def __init__(self, tree: PrefixTree, progress: Progress) -> None:
        self._tree = tree
        self._progress = progress

    def measure(self, sequences: Sequence[Order], is_late: Callable[[], bool]) -> Iterator[Order]:
        """Measure one sequence after another; consecutive sequences reuse a common prefix that is in memory."""
        for sequence in sequences:
            all_known = all(self._tree.is_known(node) for node in prefixes(sequence))
            if not all_known and is_late():
                continue
            for node in prefixes(sequence):
                known = self._tree.is_known(node)
                self._tree.measure(node)
                if not known:
                    self._progress.measured(node)
            yield sequence


@contextmanager
def open_executor(name: str, trainer: Trainer, tree: PrefixTree, progress: Progress) -> Iterator[Executor]:
    """Yield the executor called ``name`` and close it on exit.

    Args:
        name: one of :data:`EXECUTORS`, checked by :func:`check_executor`.
        trainer: for evaluation and training.
        tree: the results; not open yet, since Ray workers get a copy of it.
        progress: prints a line for each computed node.
    """
    if name == LOCAL:
        yield LocalExecutor(tree, progress)
        return
    from pqqp_lightning.trials.ray_executor import RayExecutor  # Ray is optional and slow to import

    executor = RayExecutor(trainer, tree, progress)
    try:
        yield executor
    finally:
        executor.close()


def is_installed(package: str) -> bool:
    """Whether a package can be imported; a mere folder of its name in the working folder does not count."""
    found = find_spec(package)
    return found is not None and found.origin is not None


def check_executor(name: str, trainer: Trainer) -> list[Problem]:
    """The problem if the executor is unknown, not installed, or cannot run with this trainer."""
    if name not in EXECUTORS:
        return [Problem("executor", name, "is unknown", suggest(name, EXECUTORS).strip())]
    if name == LOCAL:
        return []
    if not is_installed("ray"):
        way_out = 'Run pip install "pqqp-lightning[ray]", or use --executor local.'
        return [Problem("executor", name, "needs Ray, which is not installed", way_out)]
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy):
        text = f"gives every task one device, but the trainer has {trainer.world_size} with {type(strategy).__name__}"
        way_out = "Set trainer.devices: 1 without trainer.strategy, or use --executor local."
        return [Problem("executor", name, text, way_out)]
    device = strategy.root_device
    if device.type not in ("cpu", "cuda") or device.index not in (None, 0):
        text = f"assigns processors and CUDA GPUs itself, but the trainer is bound to {device}"
        way_out = "Set trainer.accelerator to cpu or gpu and trainer.devices: 1, or use --executor local."
        return [Problem("executor", name, text, way_out)]
    return []
