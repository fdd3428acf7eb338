"""SparseGPT 50%, GPTQ 4-bit and Polish after both, on SmolLM2-135M: seconds, peak memory, ratio to a forward pass.

    PQQP_DATA=... python benchmarks/compression.py [--dtype bfloat16] [--batch 4] [--pairs 3] [--methods GPTQ Polish]
        [--blocks 3]

The forward pass and the stage are timed in turn, pair by pair, over the same calibration tokens (32 x 512), since
machines drift; medians are quoted. Seconds are the processor's, which other work on the machine disturbs least. Memory
is the resident peak above what the process holds before the stage. Polish is compared with the GPTQ before it, too.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import suppress

import psutil
import torch

from pqqp_lightning import Trainer
from pqqp_lightning.callbacks import GPTQ, Polish, SparseGPT
from pqqp_lightning.data import TokenData
from pqqp_lightning.models import CausalLM
from pqqp_lightning.runs.peak_memory import peak_memory
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.stage_runner import StageRunner
from pqqp_lightning.stages.stage import Stage

TOKENS = "$PQQP_DATA/smollm2-135m-tokens"


METHODS: dict[str, Callable[[], list[Stage]]] = {
    "SparseGPT": lambda: [SparseGPT(0.5)],
    "GPTQ": lambda: [GPTQ(4)],
    "GPTQ-full-range": lambda: [GPTQ(4, clip=False)],
    "Polish": lambda: [SparseGPT(0.5), GPTQ(4), Polish()],
}
"""What is measured is the last stage."""


def forward_seconds(module: CausalLM, data: TokenData) -> float:
    """One plain forward pass over the calibration tokens, head included."""
    start = time.process_time()
    with torch.no_grad():
        for batch in data.calibration_dataloader():
            module(batch["input_ids"])
    return time.process_time() - start


def stage_costs(module: CausalLM, data: TokenData, stages: list[Stage]) -> list[tuple[float, int]]:
    """What each of ``stages`` costs in turn, from the dense model on: seconds, and resident bytes above its start."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    runner = StageRunner(trainer, RunData(module, datamodule=data))
    runner.describe_dense(stages)
    costs = []
    for stage in stages:
        release_freed_memory()
        before = psutil.Process().memory_info().rss
        with peak_memory(torch.device("cpu")) as peak:
            start = time.process_time()
            runner.compress(stage)
            seconds = time.process_time() - start
        costs.append((seconds, peak.size_bytes - before))
    return costs


def release_freed_memory() -> None:
    """Give what earlier work freed back to the system, so that the next peak is not hidden in it."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--blocks", type=int, default=30, help="the first ones only: quicker, and all blocks are alike")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dense = CausalLM("smollm2-135m", dtype=options.dtype).eval()
    dense.model.model.layers = dense.model.model.layers[: options.blocks]
    weights = sum(p.numel() * p.element_size() for p in dense.parameters())
    files = (f"{TOKENS}/calibration.npy", f"{TOKENS}/evaluation.npy")
    data = TokenData(*files, calibration_batch_size=options.batch)
    data.setup("validate")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.dtype}, batches of {options.batch}")
    print(f"weights {weights / 1e6:.0f} MB")
    for method in options.methods:
        forwards, stages, extra, earlier = [], [], [], []
        for _ in range(options.pairs):
            forwards.append(forward_seconds(dense, data))
            *before, last = stage_costs(copy.deepcopy(dense), data, METHODS[method]())
            stages.append(last[0])
            extra.append(last[1])
            earlier += before[-1:]
        ratios = [s / f for s, f in zip(stages, forwards, strict=True)]
        seconds, forward, ratio = map(statistics.median, (stages, forwards, ratios))
        print(f"{method:16}{seconds:6.1f} s, forward {forward:5.1f} s, ratio {ratio:.2f}", end="")
        print(f" ({min(ratios):.2f} to {max(ratios):.2f}), memory beyond the weights {max(extra) / 1e6:.0f} MB", end="")
        print(f" ({100 * max(extra) / weights:.0f}%)", flush=True)
        if earlier:
            times = statistics.median(s / e for s, (e, _) in zip(stages, earlier, strict=True))
            held = max(memory for _, memory in earlier)
            print(f"{'':16}{times:.2f} times the seconds of the stage before it, whose memory is {held / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
