"""Where a stage's time and memory go: processor seconds of each part without the parts inside it, resident peaks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import psutil
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pqqp_lightning.algorithms import gptq, sparsegpt
from pqqp_lightning.calibration import statistics, walk
from pqqp_lightning.runs import peak_memory, stage_runner
from pqqp_lightning.stages import hessian, layerwise

COLLECTING = "statistics' walk"
PLACES: list[tuple[Any, str, str]] = [
    (LlamaDecoderLayer, "forward", "forward, outputs"),
    (walk.Walk, "_collect", COLLECTING),
    (walk, "is_chain", "finding the blocks"),
    (walk, "capture_calls", "finding the blocks"),
    (statistics, "add_gram", "Gram matrices"),
    (statistics, "mirror_upper_triangle", "Gram matrices"),
    (hessian, "factorize_inverse", "factorization"),
    (sparsegpt, "sweep_columns", "sweep"),
    (gptq, "sweep_columns", "sweep"),
    (sparsegpt._MaskChooser, "choose", "choice of the mask"),
    (gptq, "fit_grid", "search of the range"),
    (gptq, "round_to_grid", "rounding, writing back"),
    (layerwise, "write_back", "rounding, writing back"),
    (stage_runner, "verify", "verification"),
    (stage_runner, "require_equal_ranks", "verification"),
]
"""Where each part's function is looked up, and the part."""


class Parts:
    """Exclusive processor seconds by part; ``inside`` measures what runs in it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.peaks: defaultdict[str, int] = defaultdict(int)
        self._open: list[str] = []
        self.before = 0
        self._since = 0.0

    @contextmanager
    def inside(self) -> Iterator[None]:
        self.before = psutil.Process().memory_info().rss
        with ExitStack() as patches, self._part("hooks, copies and the rest"):
            for owner, name, part in PLACES:
                patches.enter_context(patch.object(owner, name, self._timed(getattr(owner, name), part)))
            yield

    def table(self, forward_s: float) -> str:
        """A line for each part, largest first: seconds, share of the stage, and share of one forward pass."""
        total = sum(self.seconds.values())
        lines = []
        for part, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            share, passes = 100 * seconds / total, seconds / forward_s
            memory = (self.peaks[part] - self.before) / 1e6
            lines.append(f"  {part:28}{seconds:7.2f} s {share:5.1f}%  {passes:5.3f} passes, peak {memory:4.0f} MB")
        return "\n".join(lines)

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            name = part
            if part == "forward, outputs" and COLLECTING in self._open:
                name = "forward, collecting"
            with self._part(name):
                return function(*args, **kwargs)

        return timed

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        """Add the time since the last switch to the innermost open part, and its peak."""
        now = time.process_time()
        if self._open:
            part = self._open[-1]
            self.seconds[part] += now - self._since
            self.peaks[part] = max(self.peaks[part], peak_memory.resident_peak())
        peak_memory.reset_resident_peak()
        self._since = time.process_time()
