"""vLLM's perplexity of an exported folder, beside the run's own, token by token.

python benchmarks/export_vllm.py reference RUN reference.npz          # in this project's environment
python benchmarks/export_vllm.py measure FOLDER reference.npz DTYPE   # in vLLM's own environment
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np

TOKENS = 256


def reference(run: str, file: str) -> None:
    """Write the token ids of the run's samples, and the run's log-probability of each but the first."""
    import torch
    from safetensors.torch import load_file

    import pqqp_lightning

    ids = load_file(os.path.join(run, "samples.safetensors"))["input_ids"][:, :TOKENS]
    network = pqqp_lightning.load(run).model
    rows = []
    with torch.no_grad():
        for row in ids:
            log_p = network(input_ids=row[None], use_cache=False).logits[0].log_softmax(-1)  # [T, V]
            rows.append(log_p[:-1].gather(1, row[1:, None])[:, 0])
    np.savez(file, ids=ids.numpy(), log_probabilities=torch.stack(rows).numpy())


def measure(folder: str, file: str, dtype: str) -> None:
    """Print what vLLM gives."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    given = np.load(file)
    rows = given["ids"].tolist()
    start = time.perf_counter()
    model = LLM(folder, enforce_eager=True, max_model_len=2 * TOKENS, dtype=dtype)
    loaded = time.perf_counter()
    options = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    results = model.generate([{"prompt_token_ids": row} for row in rows], options)
    end = time.perf_counter()
    found = []
    for result, row in zip(results, rows, strict=True):
        found.append([scores[token].logprob for scores, token in zip(result.prompt_logprobs[1:], row[1:], strict=True)])
    own = given["log_probabilities"]
    perplexities = [float(np.exp(-np.mean(values))) for values in (found, own)]
    print(f"{folder} ({dtype}): perplexity {perplexities[0]:.4f}, the run's {perplexities[1]:.4f}; ", end="")
    print(f"largest difference of a log-probability {np.abs(np.array(found) - own).max():.3f}; ", end="")
    print(f"loaded in {loaded - start:.0f} s, {own.size} tokens in {end - loaded:.1f} s")


if __name__ == "__main__":
    {"reference": reference, "measure": measure}[sys.argv[1]](*sys.argv[2:])
