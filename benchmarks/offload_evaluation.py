"""The evaluation of SmolLM2-135M with its weights in memory and on disk: seconds of the processor, and peak memory.

    PQQP_DATA=... python benchmarks/offload_evaluation.py [--windows 8] [--offload none disk]

Each mode runs in a process of its own, over windows of 512 tokens. Memory is the resident peak above what the process
holds after its imports; pages of files that are mapped count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings

import psutil
import torch

from pqqp_lightning import Trainer
from pqqp_lightning.data import TokenData
from pqqp_lightning.models import CausalLM
from pqqp_lightning.runs.peak_memory import peak_memory

TOKENS = "$PQQP_DATA/smollm2-135m-tokens"


def measure(mode: str, windows: int) -> dict[str, float]:
    """Load and evaluate the model in this process."""
    warnings.simplefilter("ignore")
    before = psutil.Process().memory_info().rss
    with peak_memory(torch.device("cpu")) as peak, tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        module = CausalLM("smollm2-135m", offload=mode)
        loaded = time.process_time()
        files = (f"{TOKENS}/calibration.npy", f"{TOKENS}/evaluation.npy")
        data = TokenData(*files, evaluation_samples=windows)
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder)
        (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
        seconds = time.process_time() - loaded
    return {
        "perplexity": metrics["perplexity"],
        "load_s": loaded - start,
        "evaluate_s": seconds,
        "peak_mb": (peak.size_bytes - before) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--offload", nargs="+", default=["none", "disk", "none", "disk"])
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # measure in this process
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(measure(options.inside, options.windows)))
        return
    for mode in options.offload:
        command = [sys.executable, __file__, "--windows", str(options.windows), "--inside", mode]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        print(f"{mode:5} " + ", ".join(f"{name} {value:.6g}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
