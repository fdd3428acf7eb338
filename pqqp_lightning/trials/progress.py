"""The time limit of a search, and the progress lines that it prints."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lightning.pytorch import Trainer

from pqqp_lightning.trials.prefix_tree import Order, PrefixTree


class TimeLimit:
    """A limit in minutes from its construction; None for no limit. Every process follows the first one's clock."""

    def __init__(self, trainer: Trainer, minutes: float | None) -> None:
        self._trainer = trainer
        self.minutes = minutes
        self._start = time.monotonic()

    def is_over(self) -> bool:
        """Whether the time is up."""
        if self.minutes is None:
            return False
        over = time.monotonic() - self._start > 60 * self.minutes
        if self._trainer.world_size > 1:
            # Processes that stopped at different nodes would wait for each other forever.
            over = self._trainer.strategy.broadcast(over)
        return over


@dataclass
class Progress:
    """Prints a line for each computed node, with an estimate of the remaining time.

    Attributes:
        command: name at the start of each line.
        trainer: without a progress bar, no lines are printed.
        tree: counts the applications of stages.
        most: applications that the whole search needs; set before the first line.
        bound: "at most " if the search may need fewer.
    """

    command: str
    trainer: Trainer
    tree: PrefixTree
    most: int = 0
    bound: str = ""

    def measured(self, node: Order, at_once: int = 1) -> None:
        """Print that ``node`` was computed; ``at_once`` nodes are computed in parallel."""
        if not self.trainer.is_global_zero or self.trainer.progress_bar_callback is None:
            return
        remaining = self.most - self.tree.applications
        rest = ""
        if remaining > 0:
            mean_s = sum(self.tree.seconds) / max(1, len(self.tree.seconds))
            estimate_s = mean_s * remaining / max(1, min(at_once, remaining))
            rest = f"; {self.bound}{remaining} left, about {format_duration(estimate_s)}"
        print(f"{self.command}: {' -> '.join(node)} measured{rest}", flush=True)


def format_duration(seconds: float) -> str:
    """Seconds up to a minute and a half, minutes above: ``45 s``, ``3 min``."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
