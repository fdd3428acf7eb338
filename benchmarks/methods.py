"""Every method on SmolLM2-135M and the recipes that compare orders: one `fit` for each row of docs/methods.md.

    PQQP_DATA=... python benchmarks/methods.py [name ...]     # runs what has no report yet; all rows by default
    python benchmarks/methods.py --page > docs/methods.md     # the page, from what the runs recorded

The runs lie in runs/methods, one folder for each row. All of them take three to four hours on two cores; the recipes
for images need the networks of recipes/digits-{resnet,deit}-train.yaml and recipes/paper/{resnet,deit}-train.yaml.
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
PAGES = Path(__file__).parent / "pages"  # what stands on the page beside the tables, written by hand
TRAINING = "--data.train $PQQP_DATA/smollm2-135m-tokens/calibration.npy"

HALF = "--stages.prune SparseGPT --stages.prune.sparsity 0.5"
KEPT = "--stages.rotate QuaRot --stages.rotate.gains keep --stages.rotate.online true"
FOUR = "--stages.quantize {} --stages.quantize.bits 4"
THREE = "--stages.quantize {} --stages.quantize.group_size 64 --stages.quantize.symmetric false"
RECOVER = "--stages.recover {} --stages.recover.epochs 1 --stages.recover.learning_rate {}"
CLIP, PLAIN = "--stages.quantize.clip true", "--stages.quantize.clip false"
RTN, GPTQ = FOUR.format("RTN"), FOUR.format("GPTQ")
SPARSE24 = "--stages.prune SparseGPT --stages.prune.pattern 2:4"
CORRECT = (
    "--stages.correct LoRA --stages.correct.initialization eora --stages.correct.rank 64 --stages.correct.epochs 0 "
)
CORRECT += "--stages.correct.merge false"
GROUPS = f"{GPTQ} --stages.quantize.group_size 64"
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
        "sparsegpt-70": "--stages.prune SparseGPT --stages.prune.sparsity 0.7",
        "alps": "--stages.prune ALPS --stages.prune.sparsity 0.5",
        "alps-70": "--stages.prune ALPS --stages.prune.sparsity 0.7",
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
        "sparse24-gptq": f"{SPARSE24} {GROUPS}",
        "sparse24-gptq-eora": f"{SPARSE24} {GROUPS} {CORRECT}",
        "sparse24-gptq-eora-4": f"{SPARSE24} {GROUPS} {CORRECT} --stages.correct.adapter_bits 4",
        "gradual": "--stages.prune GradualPruning --stages.prune.sparsity 0.5 --stages.prune.epochs 1 "
        "--stages.prune.ramp 0.5 --stages.prune.learning_rate 0.00005 --trainer.limit_train_batches 12",
        "qat": "--stages.quantize QAT --stages.quantize.bits 4 --stages.quantize.learning_rate 0.00002 "
        "--stages.quantize.epochs 1 --trainer.limit_train_batches 12",
    },
    "Repair": {
        "sparsegpt-gptq-polish": f"{HALF} {GPTQ} --stages.polish Polish",
        "gptq-sparsegpt-polish": f"{HALF} {GPTQ} --stages.polish Polish --stage_order [quantize,prune,polish]",
        "gptq-polish": f"{GPTQ} --stages.polish Polish",
        "sparsegpt-gptq-match": f"{HALF} {GPTQ} --stages.match BlockMatching",
        "wanda-refit": "--stages.prune Wanda --stages.prune.sparsity 0.5 --stages.refit Refit",
        "sparsegpt-refit": f"{HALF} --stages.refit Refit",
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
    "alps": "pruning/alps.yaml",
    "alps-sparsegpt": "pruning/alps.yaml --stages.prune SparseGPT --stages.prune.sparsity 0.7",
    "sparse24-gptq4-eora": "recovery/sparse24-gptq4-eora.yaml",
    "prune-lora-quantize": "recovery/prune-lora-quantize.yaml --trainer.limit_train_batches 48",
    "sparsegpt-qlora": "recovery/sparsegpt-qlora.yaml",
    "qlora-sparsegpt": "recovery/sparsegpt-qlora.yaml --stage_order [recover,prune]",
    "basis-sharing-sparsegpt": "sharing/basis-sharing-sparsegpt.yaml",
    "sparsegpt-basis-sharing": "sharing/sparsegpt-basis-sharing.yaml",
    "digits-resnet-channels": "pruning/digits-resnet-channels.yaml",
    "digits-deit-heads": "pruning/digits-deit-heads.yaml",
    "digits-qat": "recovery/digits-qat.yaml",
    "digits-deit-match": "recovery/digits-deit-match.yaml",
    "digits-deit-match-last": "recovery/digits-deit-match.yaml --stage_order [quantize,prune,polish,match]",
    "cifar10-resnet-match": "recovery/cifar10-resnet-match.yaml",
    "cifar10-resnet-polish": "recovery/cifar10-resnet-match.yaml --stages.match Polish",
    "cifar10-deit-match": "recovery/cifar10-deit-match.yaml",
    "cifar10-deit-polish": "recovery/cifar10-deit-match.yaml --stages.match Polish",
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
    lines = [(PAGES / "methods.md").read_text()]
    for section, rows in METHODS.items():
        if any(map(records_of, rows)):
            repairs = section == "Repair"  # what counts is what they win back
            lines += [f"### {section}", "", *_table(rows, "options", "perplexity", every_stage=repairs), ""]
    recipes = {f"recipe-{name}": options for name, options in RECIPES.items()}
    lines += [(PAGES / "methods-recipes.md").read_text(), *_table(recipes, "recipe", "metric", every_stage=True), ""]
    return "\n".join([*lines, (PAGES / "methods-reading.md").read_text()])


def _table(rows: dict[str, str], first: str, metric: str, *, every_stage: bool) -> list[str]:
    """The rows that were run, with the metric after every stage or at the end."""
    lines = [f"| {first} | {metric} | zeros | bits/weight | size |", "| --- | --- | --- | --- | --- |"]
    for name, options in rows.items():
        if records := records_of(name):
            last = records[-1]
            measure = next(name for name in ("perplexity", "top1") if name in last["metrics"])
            values = [r["metrics"][measure] for r in records]
            walk = [f"{value:.2f}" if measure == "perplexity" else f"{value:.3f}" for value in values]
            cells = [
                f"`{options}`",
                " → ".join(walk if every_stage else walk[-1:]),
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
