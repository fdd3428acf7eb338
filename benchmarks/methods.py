"""Every method on SmolLM2-135M and the recipes that compare orders: one `fit` for each row of docs/methods.md.

    PQQP_DATA=... python benchmarks/methods.py [name ...]     # runs what has no report yet; all rows by default
    python benchmarks/methods.py --page > docs/methods.md     # the page, from what the runs recorded

The runs lie in runs/methods, one folder for each row. All of them take three to four hours on two cores; the recipes
for digits need the networks of recipes/digits-resnet-train.yaml and recipes/digits-deit-train.yaml.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RUNS = REPOSITORY / "runs" / "methods"
TRAINING = "--data.train $PQQP_DATA/smollm2-135m-tokens/calibration.npy"

HALF = "--stages.prune SparseGPT --stages.prune.sparsity 0.5"
KEPT = "--stages.rotate QuaRot --stages.rotate.gains keep --stages.rotate.online true"
FOUR = "--stages.quantize {} --stages.quantize.bits 4"
THREE = "--stages.quantize {} --stages.quantize.group_size 64 --stages.quantize.symmetric false"
RECOVER = "--stages.recover {} --stages.recover.epochs 1 --stages.recover.learning_rate {}"
CLIP, PLAIN = "--stages.quantize.clip true", "--stages.quantize.clip false"
RTN, GPTQ = FOUR.format("RTN"), FOUR.format("GPTQ")
EIGHT = "--stages.quantize GPTQ --stages.quantize.bits 8"
GPTQ_3 = f"{THREE.format('GPTQ')} --stages.quantize.bits 3"
MIXED_3 = f"{THREE.format('MixedPrecision')} --stages.quantize.average_bits 3"

METHODS = {
    "Pruning": {
        "magnitude": "--stages.prune Magnitude --stages.prune.sparsity 0.5",
        "wanda": "--stages.prune Wanda --stages.prune.sparsity 0.5",
        "sparsegpt": HALF,
        "sparsegpt-60": "--stages.prune SparseGPT --stages.prune.sparsity 0.6",
        "sparsegpt-60-sensitivity": "--stages.prune SparseGPT --stages.prune.sparsity 0.6 "
        "--stages.prune.allocation sensitivity",
        "channels": "--stages.prune ChannelPruning --stages.prune.ratio 0.1 --stages.prune.importance taylor",
    },
    "Quantization": {
        "rtn": RTN,
        "rtn-clip": f"{RTN} {CLIP}",
        "gptq": GPTQ,
        "gptq-plain": f"{GPTQ} {PLAIN}",
        "nf4": "--stages.quantize NF4",
        "fp4": "--stages.quantize FP4",
        "int8": "--stages.quantize INT8",
        "gptq-8": EIGHT,
        "gptq-8-plain": f"{EIGHT} {PLAIN}",
        "gptq-3": GPTQ_3,
        "gptq-3-plain": f"{GPTQ_3} {PLAIN}",
        "mixed-3": MIXED_3,
        "mixed-3-plain": f"{MIXED_3} {PLAIN}",
        "mixed-3-regressive": f"{MIXED_3} --stages.quantize.schedule regressive",
        "sparsegpt-gptq": f"{HALF} {GPTQ}",
        "sparsegpt-gptq-plain": f"{HALF} {GPTQ} {PLAIN}",
        "activations-4": "--stages.round ActivationQuantization --stages.round.bits 4 --stages.round.clip 0.9",
    },
    "Rotation": {
        "quarot-rtn": f"--stages.rotate QuaRot {RTN}",
        "quarot-rtn-clip": f"--stages.rotate QuaRot {RTN} {CLIP}",
        "quarot-keep-rtn": f"{KEPT} {RTN}",
        "quarot-keep-rtn-clip": f"{KEPT} {RTN} {CLIP}",
        "quarot-gptq": f"--stages.rotate QuaRot {GPTQ}",
        "quarot-gptq-plain": f"--stages.rotate QuaRot {GPTQ} {PLAIN}",
        "quarot-activations-4": "--stages.rotate QuaRot --stages.rotate.online true "
        "--stages.round ActivationQuantization --stages.round.bits 4 --stages.round.clip 0.9",
    },
    "Recovery": {
        "finetune": f"{HALF} {RECOVER.format('Finetune', 0.00002)}",
        "lora": f"{HALF} {RECOVER.format('LoRA', 0.0005)}",
        "lora-aware": f"{HALF} {RECOVER.format('LoRA', 0.0005)} --stages.recover.merge_aware true",
        "gradual": "--stages.prune GradualPruning --stages.prune.sparsity 0.5 --stages.prune.epochs 1 "
        "--stages.prune.ramp 0.5 --stages.prune.learning_rate 0.00005 --trainer.limit_train_batches 12",
        "qat": "--stages.quantize QAT --stages.quantize.bits 4 --stages.quantize.learning_rate 0.00002 "
        "--stages.quantize.epochs 1 --trainer.limit_train_batches 12",
    },
    "Sharing": {
        "svd": "--stages.share BasisSharing --stages.share.ratio 0.2 --stages.share.group 1",
        "sharing-2": "--stages.share BasisSharing --stages.share.ratio 0.2 --stages.share.group 2",
    },
}
"""Section, name of the run, and what is added to the command of the reference recipe."""

FEW = "--data.calibration_samples 4"
RECIPES = {
    "quarot-gptq": "quantization/quarot-gptq.yaml",
    "gptq": "quantization/gptq.yaml",
    "nf4": "quantization/nf4.yaml",
    "quarot-w4a8": "quantization/quarot-w4a8.yaml",
    "mixed-progressive": f"quantization/mixed-progressive.yaml {FEW}",
    "mixed-regressive": f"quantization/mixed-progressive.yaml {FEW} --stages.quantize.schedule regressive",
    "sleb-rtn": "pruning/sleb-rtn.yaml",
    "rtn-sleb": "pruning/sleb-rtn.yaml --stage_order [quantize,shorten]",
    "prune-lora-quantize": "recovery/prune-lora-quantize.yaml --trainer.limit_train_batches 48",
    "sparsegpt-qlora": "recovery/sparsegpt-qlora.yaml",
    "qlora-sparsegpt": "recovery/sparsegpt-qlora.yaml --stage_order [recover,prune]",
    "basis-sharing-sparsegpt": "sharing/basis-sharing-sparsegpt.yaml",
    "sparsegpt-basis-sharing": "sharing/sparsegpt-basis-sharing.yaml",
    "digits-resnet-channels": "pruning/digits-resnet-channels.yaml",
    "digits-deit-heads": "pruning/digits-deit-heads.yaml",
    "digits-qat": "recovery/digits-qat.yaml",
}

ROWS = {
    **{
        name: f"recipes/reference/smollm2-135m.yaml {options}" + (f" {TRAINING}" if section == "Recovery" else "")
        for section, rows in METHODS.items()
        for name, options in rows.items()
    },
    **{f"recipe-{name}": f"recipes/{options}" for name, options in RECIPES.items()},
}
"""Name of the run, and what follows ``pqqp-lightning fit --config``."""

INTRODUCTION = """\
# Every method, measured

Each row is one run, without an interval: differences below 1% say nothing (the same algorithm in another order of
summation moves that much). `python benchmarks/methods.py` makes the runs, `--page` this page from what they recorded.
Perplexities can be compared within a table and not between the two. The tables by method ran on an NVIDIA H100, but for
LoRA's rows, which with the recipes ran on two cores of AMD EPYCs of several kinds; the dense model's perplexity is the
same on both to four digits. Times are in [benchmarks/README.md](../benchmarks/README.md).

## SmolLM2-135M on WikiText-2 tokens

40 windows of 512 tokens of WikiText-2's test text, calibrated on 32 windows of its validation text, float32. Recovery
trains on those 32 windows or some of them: a sign that it works, far from what it can do. A row's options follow
`pqqp-lightning fit --config recipes/reference/smollm2-135m.yaml`; recovery also needs `--data.train
$PQQP_DATA/smollm2-135m-tokens/calibration.npy`. The dense model's perplexity is 28.62.
"""

RECIPES_INTRODUCTION = """\
## Recipes

What follows `pqqp-lightning fit --config recipes/`, the metric after each stage, and the size at the end: perplexity
on the documentation of Python for language models (dense 14.69; recovery trains on other pages of it), top-1 on
scikit-learn's digits for images, of which 360 are for evaluation.
"""

READING = """
## What the tables say

- **Pruning.** Half of the weights gone by magnitude alone break this model; Wanda and SparseGPT look at the inputs and
  do not. Channels cost more than single weights: 10% of them a quarter of what 50% by SparseGPT cost.
- **4 bits.** NF4, with a scale for every 64 weights and levels where normally distributed weights are, is about as good
  as GPTQ with a scale a row (36.5 and 39.0; on the documentation of Python 19.2 and 19.0), and larger.
- **Allocation.** At 60%, sparsity by sensitivity in place of the same in every layer takes a fifth off the perplexity.
- **Training.** Twelve steps of QAT bring RTN's 4 bits close to where GPTQ is (42 and 39); one epoch of finetuning, with
  masks kept, takes SparseGPT's half from 54 to 44, and adapters take it to 40. GradualPruning with twelve steps is far
  better than magnitudes at once, and far worse than SparseGPT.
- **Activations.** 4 bits for every layer's inputs break the model, and do not after QuaRot with online rotations.
- **Sharing.** With a fifth of the parameters gone, bases that two layers share are no better on this model than each
  layer's own factorization (118.5 against 115.5), and both cost far more than pruning half of the weights.
- **Rotation.** QuaRot as published helps GPTQ and spoils RTN on this model: two of its 576 channels hold over 40% of
  the residual stream's mean square, and the norms before the MLPs all but mute one of them; with the norms' gains
  folded into the weights, a rounding error meets that channel in full. GPTQ sees the inputs and avoids it. `gains:
  keep` with `online: true` leaves the norms where they are, and RTN with `clip` is then clearly better than without a
  rotation.
- **The range of the scales.** Searching it pays for GPTQ at 8, 4 and 3 bits, after a rotation and after pruning, and
  is its default; it pays for RTN on rotated weights only.
- **Mixed precision** at 3 bits on average is clearly better than 3 bits everywhere, with the search of the range (45
  against 57) and without it (65 against 81). Quantizing the most bits first or last makes no difference here: 17.48
  and 17.45.
- **LoRA** that trains through its merge ends no better than plain LoRA that is masked once, and a step costs more.
- **Order.** Pruning before GPTQ is better than after it (the quickstart: by 2.68, 95% interval 2.02 to 3.28). SLEB
  before RTN is worse than after it here: it removes other blocks. SparseGPT before QLoRA is better than after it,
  since the adapters make up for the pruning. After SparseGPT, Basis Sharing loses the zeros; before it both hold,
  with 60% of the weights gone instead of 20%, so that the two rows cannot be compared.
"""


def run(name: str) -> None:
    """Make the row's run, with what it prints in a file beside its folder."""
    RUNS.mkdir(parents=True, exist_ok=True)
    arguments = [os.path.expandvars(word) for word in shlex.split(ROWS[name])]
    arguments += ["--run_dir", str(RUNS / name), "--trainer.enable_progress_bar", "false"]
    with (RUNS / f"{name}.log").open("w") as log:
        command = [sys.executable, "-m", "pqqp_lightning", "fit", "--config", *arguments]
        done = subprocess.run(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT)
    print(f"{name}: {'done' if done.returncode == 0 else f'failed, see {log.name}'}", flush=True)


def records_of(name: str) -> list[dict[str, Any]]:
    """The records of a row's run; none where it is not complete."""
    report = RUNS / name / "report.json"
    if not report.is_file() or json.loads(report.read_text())["status"] != "finished":
        return []
    return [json.loads(line) for line in (RUNS / name / "records.jsonl").read_text().splitlines()]


def page() -> str:
    """docs/methods.md."""
    lines = [INTRODUCTION]
    for section, rows in METHODS.items():
        if any(map(records_of, rows)):
            lines += [f"### {section}", "", *_table(rows, "options", "perplexity"), ""]
    lines += [RECIPES_INTRODUCTION, *_table({f"recipe-{k}": v for k, v in RECIPES.items()}, "recipe", "metric")]
    return "\n".join([*lines, READING.rstrip()]) + "\n"


def _table(rows: dict[str, str], first: str, metric: str) -> list[str]:
    lines = [f"| {first} | {metric} | zeros | bits/weight | size |", "| --- | --- | --- | --- | --- |"]
    for name, options in rows.items():
        if records := records_of(name):
            last = records[-1]
            measure = next(name for name in ("perplexity", "top1") if name in last["metrics"])
            values = [r["metrics"][measure] for r in records]
            walk = [f"{value:.2f}" if measure == "perplexity" else f"{value:.3f}" for value in values]
            cells = [
                f"`{options}`",
                " → ".join(walk if name.startswith("recipe-") else walk[-1:]),
                f"{last['sparsity']:.1%}",
                f"{last['bits_per_weight']:.2f}",
                f"{last['size_bytes'] / 1e6:.1f} MB"
                if last["size_bytes"] > 1e6
                else f"{last['size_bytes'] / 1e3:.1f} kB",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="rows to run; all by default")
    parser.add_argument("--page", action="store_true", help="print the page instead")
    options = parser.parse_args()
    if options.page:
        print(page(), end="")
        return
    if unknown := [name for name in options.names if name not in ROWS]:
        parser.error(f"no rows: {', '.join(unknown)}. There are {', '.join(ROWS)}.")
    for name in options.names or ROWS:
        if not records_of(name):
            run(name)


if __name__ == "__main__":
    main()
