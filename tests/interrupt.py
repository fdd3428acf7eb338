"""Runs that die at a training batch, or by SIGKILL at any moment, and are resumed: they must end as if undisturbed."""

import random
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import forked
import psutil
import pytest
from lightning.pytorch import Callback
from tiny import regression_loader, trainer

AGENTS = ("dashboard/agent.py", "runtime_env/agent/main.py")


class Died(Exception):
    """Stands for a kill."""


class DieAt(Callback):
    """Ends the run before a batch of an epoch of the stage's segment with that number, the first being 1."""

    def __init__(self, segment, epoch, batch):
        self.at, self.segment = (segment, epoch, batch), 0

    def on_train_start(self, trainer, pl_module):
        self.segment += 1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (self.segment, trainer.current_epoch, batch_idx) == self.at:
            raise Died


def undisturbed_and_resumed(folder: Path, stages, make_module, at, more=list, **options):
    """The modules of two runs: one undisturbed, one that died ``at`` (segment, epoch, batch) and was resumed.

    ``more`` makes further callbacks.
    """

    def fit(name, callbacks, ckpt_path=None):
        module = make_module()
        engine = trainer(folder / name, *stages(), callbacks=[*more(), *callbacks], **options)
        engine.fit(module, regression_loader(), regression_loader(16, seed=1), ckpt_path=ckpt_path)
        return module

    undisturbed = fit("undisturbed", [])
    with pytest.raises(Died):
        fit("died", [DieAt(*at)])
    return undisturbed, fit("died", [], "last")


def run_with_kills(words: Sequence[str], folder: Path, seed: int, kills: int, longest: float) -> int:
    """Run ``python WORDS`` again and again, each time with SIGKILL after a random while, and at last to its end.

    Args:
        words: the same every time.
        folder: where.
        seed: of the moments.
        kills: at most so many.
        longest: seconds until a kill, at most.

    Returns:
        How often it was killed before it came to its end.
    """
    chance = random.Random(seed)
    for killed in range(kills + 1):
        process = forked.start(words, folder)
        process.join(longest * chance.random() if killed < kills else None)
        if process.exitcode is not None:
            assert process.exitcode == 0
            return killed
        kill(process)
    raise AssertionError


def kill(process: ForkServerProcess) -> None:
    """End the process by SIGKILL, and wait until no process that it started is left."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.join()
    until = time.monotonic() + 30
    while alive := [child for child in started if _stays(child)]:
        assert time.monotonic() < until, alive
        time.sleep(0.2)


def _stays(process: psutil.Process) -> bool:
    """Whether it is there, and none of Ray's two agents, which take a minute to end."""
    try:
        words = process.cmdline()  # none of a process that has ended
    except psutil.NoSuchProcess:
        return False
    agent = any((word.startswith("ray::") and "Agent" in word) or word.endswith(AGENTS) for word in words)
    return bool(words) and not agent
