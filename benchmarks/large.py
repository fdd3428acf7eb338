"""An 8B-shaped LLaMA compressed from disk in 6 GB of memory: peak memory, and seconds a block by part.

    python benchmarks/large.py FOLDER [--layers 32] [--samples 8] [--tokens 256] [--memory_gb 6]
    python benchmarks/large.py FOLDER --layers 3 --config '{"hidden_size": 256, "intermediate_size": 512}'

It writes a model with the shapes of LLaMA-3-8B and random weights (bf16, a file for each block, no tokenizer) without
holding it, and runs ``pqqp-lightning fit`` with SparseGPT 50% and GPTQ 4-bit (groups of 128) and ``offload: disk`` on
random tokens. The process is killed when it has written blocks of a stage, and resumed. A memory control group holds it
to the limit, page cache included; where none can be made, the process is watched, and stopped beyond the limit.

FOLDER needs space for the model, a scratch copy of its blocks, and about the model's size again for checkpoints.
Seconds are the processor's, of the resumed run. What more tokens would take follows from them: the forward passes and
the Gram matrices grow with the tokens (attention faster: 8% of a block's forward pass at 2048 tokens, not counted), the
rest does not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
BLOCKS = 32
"""Of LLaMA-3-8B."""
BLOCKS_FOLDER, UNFINISHED = "blocks", "unfinished"
"""Where a stage keeps its finished blocks, and the name of the file that is being written."""
GOAL = 128 * 2048
"""Calibration tokens that papers use."""
GROWING = ("forward", "Gram")
"""How the names of the parts begin whose time grows with the tokens."""
GROUPS = Path("/sys/fs/cgroup/memory")
"""Memory control groups, version 1."""


def make_model(folder: Path, config: dict[str, Any]) -> int:
    """Write the model block by block; returns the bytes of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, pairs = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["head_dim"]
    block = {
        "self_attn.q_proj": (heads * width, hidden),
        "self_attn.k_proj": (pairs * width, hidden),
        "self_attn.v_proj": (pairs * width, hidden),
        "self_attn.o_proj": (hidden, heads * width),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    vocabulary = config["vocab_size"]
    shards = [{f"model.layers.{i}.{name}": shape for name, shape in block.items()} for i in range(layers_of(config))]
    shards.append({"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,)})
    shards.append({"lm_head": (vocabulary, hidden)})
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, shape in shapes.items():
            weight = torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0, 0.02, generator=generator)
            tensors[f"{name}.weight"] = weight.bfloat16()
            places[f"{name}.weight"] = file
            total += 2 * weight.numel()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def layers_of(config: dict[str, Any]) -> int:
    return config["num_hidden_layers"]


def write_recipe(folder: Path, config: dict[str, Any], samples: int, tokens: int, group_size: int) -> Path:
    """Write random token files, and the recipe of the run."""
    chance = np.random.default_rng(0)
    files = {}
    for name, rows in {"calibration": samples, "evaluation": 1}.items():
        files[name] = str(folder / f"{name}.npy")
        np.save(files[name], chance.integers(0, config["vocab_size"], (rows, tokens)))
    model = {"model": str(folder / "model"), "dtype": "bfloat16", "offload": "disk"}
    recipe = {
        "model": {"class_path": "CausalLM", "init_args": model},
        "data": {"class_path": "TokenData", "init_args": files | {"calibration_batch_size": 1}},
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False},
        "stages": {
            "prune": {"class_path": "SparseGPT", "init_args": {"sparsity": 0.5}},
            "quantize": {"class_path": "GPTQ", "init_args": {"bits": 4, "group_size": group_size}},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


class Limit:
    """Holds processes to a limit of memory: a control group where one can be made, else by watching.

    Args:
        size_bytes: the limit.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._group: Path | None = GROUPS / f"pqqp-large-{os.getpid()}"
        try:
            self._group.mkdir()
            (self._group / "memory.limit_in_bytes").write_text(str(size_bytes))
            self.text = "a memory control group, page cache included"
        except OSError:
            self._group = None
            self.text = "watching its resident memory"
        self.peak_bytes = 0
        """The largest resident memory of a process."""

    def enter(self) -> None:
        """Put this process, a child, under the limit."""
        if self._group is not None:
            (self._group / "cgroup.procs").write_text(str(os.getpid()))

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """Look at the process once."""
        with suppress(OSError):  # it may have ended
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmRSS"):
                    self.peak_bytes = max(self.peak_bytes, 1024 * int(line.split()[1]))
        if self._group is None and self.peak_bytes > self._size_bytes:
            process.kill()

    def close(self) -> None:
        """Remove the control group."""
        if self._group is not None:
            self._group.rmdir()


def fit(folder: Path, limit: Limit, *more: str, blocks: int = 0) -> float:
    """Run the command, or kill it when a stage has written so many ``blocks``; returns its seconds.

    Raises:
        SystemExit: it failed.
    """
    run = folder / "run"
    command = [sys.executable, __file__, "--child", str(folder), "fit", "--config", str(folder / "recipe.yaml")]
    process = subprocess.Popen([*command, "--run_dir", str(run), *more], preexec_fn=limit.enter)
    start = time.perf_counter()
    killed = False
    while process.poll() is None:
        limit.watch(process)
        written = [file for file in run.glob(f"stages/*/{BLOCKS_FOLDER}/*") if file.name != UNFINISHED]
        if blocks and len(written) >= blocks:
            process.send_signal(signal.SIGKILL)
            killed = True
        time.sleep(0.1)
    if process.returncode and not killed:
        sys.exit(f"the run ended with code {process.returncode}")
    return time.perf_counter() - start


def child(folder: Path, arguments: list[str]) -> None:
    """The command itself, with its parts timed."""
    from parts import PLACES, Parts

    from pqqp_lightning.__main__ import main as command
    from pqqp_lightning.runs import stage_runner

    PLACES.append((stage_runner, "save_checkpoint", "saving"))
    PLACES.append((stage_runner, "evaluate", "evaluation, without forward passes"))
    parts = Parts()
    with parts.inside():
        command(arguments)
    result = {"seconds": dict(parts.seconds), "peaks": dict(parts.peaks)}
    (folder / "parts.json").write_text(json.dumps(result))


def report(folder: Path, limit: Limit, layers: int, tokens: int) -> None:
    """Print peaks, seconds by part, and what :data:`GOAL` tokens and all of :data:`BLOCKS` would take."""
    measured = json.loads((folder / "parts.json").read_text())
    records = json.loads((folder / "run" / "report.json").read_text())["stages"]
    for record in records:
        print(f"{record['name']:10}{record['elapsed_s']:8.0f} s, peak {record['peak_memory_bytes'] / 1e9:.2f} GB")
    peak = max(limit.peak_bytes, *measured["peaks"].values())
    print(f"peak resident memory {peak / 1e9:.2f} GB; held to the limit by {limit.text}")
    seconds = measured["seconds"]
    growing = 0.0
    for part, of_all in sorted(seconds.items(), key=lambda item: -item[1]):
        grows = part.startswith(GROWING)
        growing += of_all if grows else 0.0
        print(f"  {part:36}{of_all / layers:8.1f} s a block{', grows with the tokens' if grows else ''}")
    total = sum(seconds.values()) - growing + growing * GOAL / tokens
    print(f"{GOAL} tokens and {BLOCKS} blocks would take {total / layers * BLOCKS / 3600:.1f} hours of a processor")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=BLOCKS)
    parser.add_argument("--config", type=json.loads, default={})
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--group_size", type=int, default=128)
    parser.add_argument("--memory_gb", type=float, default=6.0)
    options = parser.parse_args()
    config = LLAMA_3_8B | options.config | {"num_hidden_layers": options.layers}
    if "hidden_size" in options.config and "head_dim" not in options.config:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    start = time.perf_counter()
    weights = make_model(options.folder / "model", config)
    print(f"{weights / 1e9:.2f} GB of weights, written in {time.perf_counter() - start:.0f} s", flush=True)
    write_recipe(options.folder, config, options.samples, options.tokens, options.group_size)
    limit = Limit(int(options.memory_gb * 1e9))
    try:
        until_kill = fit(options.folder, limit, blocks=max(1, options.layers // 2))
        print(f"killed after {until_kill:.0f} s", flush=True)
        resumed = fit(options.folder, limit, "--ckpt_path", "last")
        print(f"resumed, and finished in {resumed:.0f} s", flush=True)
    finally:
        limit.close()
    report(options.folder, limit, options.layers, options.samples * options.tokens)


if __name__ == "__main__":
    main()
