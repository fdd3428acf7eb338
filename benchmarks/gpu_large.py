"""GPTQ 4-bit and SparseGPT 50% on a few blocks of an 8B-shaped LLaMA, on a GPU: seconds, peak memory, and the parts.

    python benchmarks/gpu_large.py [--layers 4] [--samples 128] [--tokens 2048] [--minutes 8]
    python benchmarks/gpu_large.py --layers 2 --hidden 256 --samples 8 --tokens 128     # to try it on a CPU

The blocks have the shapes of LLaMA-3-8B and random weights, in bfloat16; the calibration tokens are random as well.
What is measured does not depend on the values, except for the sweep's retries on a Hessian that cannot be factorized.
Each method runs with float32 matrix products at the precision "highest", "high" and "medium" (torch's words), then with
float32 weights; what no longer fits into the minutes is left out. The figures for 32 blocks are extrapolated: the
seconds of a block times 32, and the peak with the weights of the blocks that are missing.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningDataModule
from parts import Parts
from torch.utils.data import DataLoader

from pqqp_lightning import Trainer
from pqqp_lightning.callbacks import GPTQ, SparseGPT
from pqqp_lightning.models import CausalLM
from pqqp_lightning.network.blocks import model_blocks
from pqqp_lightning.runs.peak_memory import peak_memory
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.stage_runner import StageRunner
from pqqp_lightning.stages.stage import Stage

BLOCKS = 32
"""Of LLaMA-3-8B."""
LLAMA_3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
MODES = (("bfloat16", "highest"), ("bfloat16", "high"), ("bfloat16", "medium"), ("float32", "highest"))
"""The dtype of the weights, and the precision of float32 matrix products."""


@dataclass(frozen=True)
class Measured:
    """What one stage took.

    Attributes:
        seconds: of the whole stage.
        peak_bytes: on the GPU; on a CPU, the process's resident memory.
        parts: seconds by part, measured in a run of its own.
    """

    seconds: float
    peak_bytes: int
    parts: DeviceParts


class DeviceParts(Parts):
    """Seconds by part on the clock; the device finishes each part's work before the next one begins."""

    def table(self, forward_s: float) -> str:
        """A line for each part, largest first: seconds, share of the stage, and share of one forward pass."""
        total = sum(self.seconds.values())
        lines = []
        for part, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            lines.append(f"  {part:28}{seconds:7.2f} s {seconds / total:6.1%}  {seconds / forward_s:5.3f} passes")
        return "\n".join(lines)

    def _switch(self) -> None:
        now = device_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class RandomTokens(LightningDataModule):
    """Calibration sequences of random tokens."""

    def __init__(self, samples: int, tokens: int, vocabulary: int, batch_size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self._rows = torch.randint(vocabulary, (samples, tokens), generator=generator)
        self._batch_size = batch_size

    def calibration_dataloader(self) -> DataLoader:
        """Batches of {"input_ids": [B, T]}."""
        rows = [{"input_ids": row} for row in self._rows]
        return DataLoader(rows, batch_size=self._batch_size)


def device_time() -> float:
    """Seconds on the clock when the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def shapes(layers: int, hidden: int) -> dict[str, object]:
    """The model's configuration; a narrower one has fewer heads of the same width, and a small vocabulary."""
    config: dict[str, object] = {**LLAMA_3_8B, "num_hidden_layers": layers}
    if hidden != LLAMA_3_8B["hidden_size"]:
        heads = max(1, hidden // 128)
        config |= {"hidden_size": hidden, "intermediate_size": hidden * 7 // 2, "vocab_size": 1024}
        config |= {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4)}
    return config


def run_stage(dense: CausalLM, data: RandomTokens, stage: Stage, parts: Parts | None = None) -> tuple[float, int]:
    """Seconds and peak bytes of ``stage`` on a copy of the dense model."""
    trainer = Trainer(accelerator="auto", devices=1, logger=False, enable_progress_bar=False)
    runner = StageRunner(trainer, RunData(copy.deepcopy(dense), datamodule=data))
    runner.describe_dense([stage])
    device = trainer.strategy.root_device
    with peak_memory(device) as peak:
        start = device_time()
        if parts is None:
            runner.compress(stage)
        else:
            with parts.inside():
                runner.compress(stage)
        seconds = device_time() - start
    return seconds, peak.size_bytes


def measure(dense: CausalLM, data: RandomTokens, method: str) -> Measured:
    """Time the stage, and once more by parts: the waits between parts cost a little."""
    seconds, peak_bytes = run_stage(dense, data, METHODS[method]())
    parts = DeviceParts()
    run_stage(dense, data, METHODS[method](), parts)
    return Measured(seconds, peak_bytes, parts)


METHODS = {"GPTQ": lambda: GPTQ(4, group_size=128), "SparseGPT": lambda: SparseGPT(0.5)}


def report(name: str, measured: Measured, dense: CausalLM, forward_s: float) -> None:
    """Print what was measured, what it means for 32 blocks, and the share of each part."""
    blocks = list(model_blocks(dense).values())
    block_bytes = sum(parameter.nbytes for parameter in blocks[0].parameters())
    a_block = measured.seconds / len(blocks)
    whole = measured.peak_bytes + (BLOCKS - len(blocks)) * block_bytes
    print(f"{name}: {measured.seconds:.1f} s for {len(blocks)} blocks, {a_block:.2f} s a block", end="")
    print(f" ({measured.seconds / forward_s:.2f} forward passes), peak {measured.peak_bytes / 1e9:.2f} GB")
    print(
        f"  extrapolated to {BLOCKS} blocks: {BLOCKS * a_block:.0f} s, peak {whole / 1e9:.1f} GB with all weights there"
    )
    print(measured.parts.table(forward_s), flush=True)


def forward_seconds(dense: CausalLM, data: RandomTokens, device: torch.device) -> float:
    """One forward pass of the blocks over the calibration tokens, without the head; the first batch warms up."""
    module = dense.to(device)
    batches = [batch["input_ids"].to(device) for batch in data.calibration_dataloader()]
    with torch.no_grad():
        module.model.base_model(input_ids=batches[0], use_cache=False)
        start = device_time()
        for batch in batches:
            module.model.base_model(input_ids=batch, use_cache=False)
        seconds = device_time() - start
    dense.cpu()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=LLAMA_3_8B["hidden_size"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {processor}, {options.samples} x {options.tokens} tokens", flush=True)
    config = shapes(options.layers, options.hidden)
    data = RandomTokens(options.samples, options.tokens, int(str(config["vocab_size"])), options.batch)
    longest = 0.0  # seconds of a method in one mode so far
    for dtype, precision in MODES:
        torch.set_float32_matmul_precision(precision)
        torch.manual_seed(0)
        with torch.device(device):
            dense = CausalLM(config, dtype=dtype).eval()
        forward_s = forward_seconds(dense, data, device)
        print(f"\n{dtype}, float32 products {precision}: one forward pass of the blocks {forward_s:.1f} s", flush=True)
        for method in METHODS:
            start = time.perf_counter()
            if start - began + longest > 60 * options.minutes:
                print(f"{method}: left out, {options.minutes:g} minutes are over")
                continue
            report(method, measure(dense, data, method), dense, forward_s)
            longest = max(longest, time.perf_counter() - start)
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
