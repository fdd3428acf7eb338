"""How long a search may take, and what it says while it runs."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lightning.pytorch import Trainer

from pqqp_lightning.trials.prefix_tree import Order, PrefixTree


class TimeLimit:
    """Minutes from now on, by the first process's clock; None for no limit."""

    def __init__(self, trainer: Trainer, minutes: float | None) -> None:
        self._trainer, self.minutes, self._start = trainer, minutes, time.monotonic()

    def is_over(self) -> bool:
        """Whether the time is up."""
        if self.minutes is None:
            return False
        over = time.monotonic() - self._start > 60 * self.minutes
        return self._trainer.strategy.broadcast(over) if self._trainer.world_size > 1 else over


@dataclass
class Progress:
    """A line for each node that was computed, with what the rest may take.

    Attributes:
        command: that the lines are of.
        trainer: shows progress bars, or not.
        tree: counts the applications.
        most: applications when all is done; may be set until the first line.
        bound: "at most " where it may become fewer.
    """

    command: str
    trainer: Trainer
    tree: PrefixTree
    most: int = 0
    bound: str = ""

    def measured(self, node: Order, at_once: int = 1) -> None:
        """Say that ``node`` was computed, by one of ``at_once`` who work at the same time."""
        if not self.trainer.is_global_zero or self.trainer.progress_bar_callback is None:
            return
        left, taken = self.most - self.tree.applications, self.tree.seconds
        about = duration(sum(taken) / max(1, len(taken)) * left / max(1, min(at_once, left)))
        rest = f"; {self.bound}{left} left, about {about}" if left > 0 else ""
        print(f"{self.command}: {' -> '.join(node)} measured{rest}", flush=True)


def duration(seconds: float) -> str:
    """For people."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
