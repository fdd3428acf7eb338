"""A run's evaluation against a plain Hugging Face forward loop, on SmolLM2-135M: processor seconds and their ratio.

    PQQP_DATA=... python benchmarks/evaluation.py [--dtype bfloat16] [--windows 8] [--pairs 3] [--batch 1]

The loop computes the logits of the same windows and drops them: no loss, no metric. Both are timed in turn, pair by
pair; medians are quoted.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings

import torch

from pqqp_lightning import Trainer
from pqqp_lightning.data import TokenData
from pqqp_lightning.metrics.perplexity import Perplexity
from pqqp_lightning.models import CausalLM
from pqqp_lightning.runs.evaluation import evaluate
from pqqp_lightning.runs.run_data import RunData

TOKENS = "$PQQP_DATA/smollm2-135m-tokens"


def loop_seconds(module: CausalLM, data: TokenData) -> float:
    start = time.process_time()
    with torch.no_grad():
        for batch in data.val_dataloader():
            module.model(input_ids=batch["input_ids"], use_cache=False)
    return time.process_time() - start


def evaluation_seconds(module: CausalLM, data: TokenData) -> tuple[float, float]:
    """Seconds of an evaluation, and of the metric in it."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    metric_s = 0.0
    update = Perplexity.update

    def timed(self: Perplexity, *args: torch.Tensor) -> None:
        nonlocal metric_s
        begin = time.process_time()
        update(self, *args)
        metric_s += time.process_time() - begin

    Perplexity.update = timed  # type: ignore[method-assign]
    start = time.process_time()
    try:
        evaluate(trainer, RunData(module, datamodule=data), keep_samples=True)
    finally:
        Perplexity.update = update  # type: ignore[method-assign]
    return time.process_time() - start, metric_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    module = CausalLM("smollm2-135m", dtype=options.dtype).eval()
    files = (f"{TOKENS}/calibration.npy", f"{TOKENS}/evaluation.npy")
    data = TokenData(*files, batch_size=options.batch, evaluation_samples=options.windows)
    data.setup("validate")
    evaluation_seconds(module, data)  # imports and first allocations
    ratios, loops, evaluations, metrics = [], [], [], []
    for _ in range(options.pairs):
        loops.append(loop_seconds(module, data))
        seconds, metric_s = evaluation_seconds(module, data)
        evaluations.append(seconds)
        metrics.append(metric_s)
        ratios.append(loops[-1] / seconds)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.dtype}, {options.windows} windows")
    print(
        f"loop {statistics.median(loops):.2f} s, evaluation {statistics.median(evaluations):.2f} s, of which metric "
        f"{statistics.median(metrics):.2f} s; speed {statistics.median(ratios):.3f} of the loop's "
        f"({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
