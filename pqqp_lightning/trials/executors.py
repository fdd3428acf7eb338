"""Who measures the sequences of a search: this process, one after another, or Ray's tasks, many at the same time.

Either way the results end up in the store, and the search goes on from there: what it finds does not depend on who
measured.
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
        """Measure ``sequences`` with all their beginnings, and yield each one that is done.

        Once ``is_late`` says so nothing further is begun; what is known is yielded all the same.
        """


class LocalExecutor:
    """Measures in this process."""

    def __init__(self, tree: PrefixTree, progress: Progress) -> None:
        self._tree, self._progress = tree, progress

    def measure(self, sequences: Sequence[Order], is_late: Callable[[], bool]) -> Iterator[Order]:
        """One sequence after another, as they come; a common beginning is used while it is in memory."""
        for sequence in sequences:
            if not all(self._tree.is_known(node) for node in prefixes(sequence)) and is_late():
                continue
            for node in prefixes(sequence):
                known = self._tree.is_known(node)
                self._tree.measure(node)
                if not known:
                    self._progress.measured(node)
            yield sequence


@contextmanager
def executing(name: str, trainer: Trainer, tree: PrefixTree, progress: Progress) -> Iterator[Executor]:
    """The executor of that name, from :data:`EXECUTORS`, for as long as it is used.

    Args:
        name: passed :func:`check_executor`.
        trainer: for evaluation and training.
        tree: not open yet.
        progress: is told what was computed.
    """
    if name == LOCAL:
        yield LocalExecutor(tree, progress)
        return
    from pqqp_lightning.trials.ray_executor import RayExecutor  # Ray is imported here alone

    executor = RayExecutor(trainer, tree, progress)
    try:
        yield executor
    finally:
        executor.close()


def check_executor(name: str, trainer: Trainer) -> list[Problem]:
    """Why there is no such executor, or why it cannot run what this trainer runs."""
    if name not in EXECUTORS:
        return [Problem("executor", name, "is unknown", suggest(name, EXECUTORS).strip())]
    if name == LOCAL:
        return []
    found = find_spec("ray")
    if found is None or found.origin is None:  # or it is a folder of that name
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
