"""SparseGPT 50%, GPTQ 4-bit and Polish after both, on SmolLM2-135M: seconds, peak memory, ratio to a forward pass.

    PQQP_DATA=... python benchmarks/compression.py [--dtype bfloat16] [--batch 4] [--pairs 3]

The forward pass and the stage are timed in turn, pair by pair, over the same calibration tokens (32 x 512), since
machines drift; medians are quoted. Memory is the resident peak above what the process holds before the stage.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings

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


def forward_seconds(module: CausalLM, data: TokenData) -> float:
    """One plain forward pass over the calibration tokens, head included."""
    start = time.perf_counter()
    with torch.no_grad():
        for batch in data.calibration_dataloader():
            module(batch["input_ids"])
    return time.perf_counter() - start


def stage_seconds(module: CausalLM, data: TokenData, *stages: Stage) -> tuple[float, int]:
    """The last stage, on a dense model that went through the others: seconds, and resident bytes above the start."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    runner = StageRunner(trainer, RunData(module, datamodule=data))
    runner.describe_dense(stages)
    for stage in stages[:-1]:
        runner.compress(stage)
    before = psutil.Process().memory_info().rss
    with peak_memory(torch.device("cpu")) as peak:
        start = time.perf_counter()
        runner.compress(stages[-1])
        seconds = time.perf_counter() - start
    return seconds, peak.size_bytes - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dense = CausalLM("smollm2-135m", dtype=options.dtype).eval()
    weights = sum(p.numel() * p.element_size() for p in dense.parameters())
    files = (f"{TOKENS}/calibration.npy", f"{TOKENS}/evaluation.npy")
    data = TokenData(*files, calibration_batch_size=options.batch)
    data.setup("validate")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.dtype}, batches of {options.batch}")
    print(f"weights {weights / 1e6:.0f} MB")
    for make in (lambda: [SparseGPT(0.5)], lambda: [GPTQ(4)], lambda: [SparseGPT(0.5), GPTQ(4), Polish()]):
        forwards, stages, extra = [], [], []
        for _ in range(options.pairs):
            forwards.append(forward_seconds(dense, data))
            seconds, memory = stage_seconds(copy.deepcopy(dense), data, *make())
            stages.append(seconds)
            extra.append(memory)
        ratios = [s / f for s, f in zip(stages, forwards, strict=True)]
        seconds, forward, ratio = map(statistics.median, (stages, forwards, ratios))
        print(f"{type(make()[-1]).__name__:10}{seconds:6.1f} s, forward {forward:5.1f} s, ratio {ratio:.2f}", end="")
        print(f" ({min(ratios):.2f} to {max(ratios):.2f}), memory beyond the weights {max(extra) / 1e6:.0f} MB", end="")
        print(f" ({100 * max(extra) / weights:.0f}%)", flush=True)


if __name__ == "__main__":
    main()
