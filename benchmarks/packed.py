"""A run loaded as always and with ``packed=True``: memory, and tokens per second of processor time.

    python benchmarks/packed.py runs/quickstart

Each load is in a process of its own, on one thread. Memory is counted from the tensors, and taken from the system: the
growth of the resident memory since just before the load. Libraries are imported before, by a load of a small model.
Times are of the processor, in which other work on the machine does not count.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pqqp_lightning import load
from pqqp_lightning.checkpoint.memory import memory_bytes
from pqqp_lightning.models import CausalLM

TOKENS = 512
"""Of the prompt that is read in one pass."""
NEW_TOKENS = 16


def resident_mb(key: str) -> float:
    """``VmRSS``, or ``VmHWM`` for the peak, of this process in MB (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(key))


def import_libraries() -> None:
    """Build and run a small model."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    small: Any = CausalLM({"model_type": "llama", "vocab_size": 64, **sizes})
    small.model.generate(torch.zeros(1, 4, dtype=torch.long), max_new_tokens=2, do_sample=False, pad_token_id=0)


def measure(run: str, packed: bool) -> None:
    """Print one row."""
    torch.set_num_threads(1)
    import_libraries()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    before = resident_mb("VmRSS")
    start = time.process_time()
    module: Any = load(run, packed=packed)
    loading_s = time.process_time() - start
    resident, peak = resident_mb("VmRSS") - before, resident_mb("VmHWM") - before
    ids = torch.randint(0, module.vocabulary_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        start = time.process_time()
        module(ids)
        reading = TOKENS / (time.process_time() - start)
        start = time.process_time()
        module.model.generate(ids[:, : TOKENS // 32], **options)
        writing = NEW_TOKENS / (time.process_time() - start)
    print("packed" if packed else "plain")
    print(f"  tensors {memory_bytes(module) / 1e6:.1f} MB, resident +{resident:.0f} MB, peak +{peak:.0f} MB")
    speeds = f"{reading:.0f} tokens/s in a pass of {TOKENS}, {writing:.1f} one by one"
    print(f"  load {loading_s:.1f} s; {speeds}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(sys.argv[1], packed=sys.argv[2] == "packed")
    else:
        for kind in ("plain", "packed"):
            subprocess.run([sys.executable, __file__, sys.argv[1], kind], check=True)
