"""The experiments of Kim et al. in their small size: one command of recipes/paper for each section of docs/results.md.

A pair on a language model is a sweep for each sparsity, which run side by side over one store, and one section.

    PQQP_DATA=... python benchmarks/results.py [name ...] [--jobs N] [-- options of every command]
    python benchmarks/results.py --page > docs/results.md     # the page, from what the runs recorded

What has its table already is not run again. The runs lie in runs/results, one folder for each. With
`--jobs 15 -- --trainer.accelerator gpu` all of them take about a quarter of an hour on one GPU; on two cores they
take most of a day.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pqqp_lightning.algorithms.rank_statistics import leaves_zero_out
from pqqp_lightning.experiments.sweep_pair import analyse, pair_notes
from pqqp_lightning.experiments.sweep_plan import Curve
from pqqp_lightning.report.blocks import Section
from pqqp_lightning.report.markdown import to_markdown
from pqqp_lightning.report.pages import read_page
from pqqp_lightning.report.pictures import draw_sweep
from pqqp_lightning.report.sweep import read_sweep_report
from pqqp_lightning.report.sweep_numbers import point_name
from pqqp_lightning.storage.files import write_json
from pqqp_lightning.storage.run_folder import RunFolder

REPOSITORY = Path(__file__).parents[1]
RUNS, PICTURES = REPOSITORY / "runs" / "results", REPOSITORY / "docs" / "results"
PAIR = "sweep --config recipes/paper/prune-quantize.yaml"
ARC = "--data.questions '{source: $PQQP_DATA/ai2_arc, config_name: ARC-Challenge, samples: 300}'"
ROTATION = "order --config recipes/paper/rotation.yaml"
FEW = "--data.calibration_samples 4 --data.evaluation_samples 10"
SPARSITIES = (0.5, 0.6, 0.7)
INT8 = "order --config recipes/paper/finetuned-int8.yaml"
GRANULARITY = "analyze --config recipes/paper/granularity.yaml"
TWO_OF_FOUR = "--stages.prune.sparsity null --stages.prune.pattern 2:4"
SHOWN = ("Points", "Orders", "What the layers say", "Errors")
"""Sections of a run's own page that are shown."""


@dataclass(frozen=True)
class Experiment:
    """One command.

    Attributes:
        title: of its section.
        command: what follows ``pqqp-lightning``.
        needs: another experiment's name that must have run, if any.
        sparsities: the command is run for each of them by itself, and what they found is put together.
    """

    title: str
    command: str
    needs: str | None = None
    sparsities: tuple[float, ...] = ()


EXPERIMENTS = {
    "reference-plain": Experiment(
        "SparseGPT and GPTQ, without the search of the range",
        "sweep --config recipes/reference/smollm2-135m.yaml --stages.prune SparseGPT --stages.quantize GPTQ "
        "--grid.quantize.bits [8,4,3] --stages.quantize.clip false",
        sparsities=SPARSITIES,
    ),
    "sparsegpt-gptq": Experiment("SparseGPT and GPTQ", f"{PAIR} {ARC}", sparsities=SPARSITIES),
    "wanda-gptq": Experiment("Wanda and GPTQ", f"{PAIR} --stages.prune Wanda {ARC}", sparsities=SPARSITIES),
    "sparsegpt-rtn": Experiment("SparseGPT and RTN", f"{PAIR} --stages.quantize RTN {ARC}", sparsities=SPARSITIES),
    "wanda-rtn": Experiment(
        "Wanda and RTN", f"{PAIR} --stages.prune Wanda --stages.quantize RTN", sparsities=SPARSITIES
    ),
    "magnitude-rtn": Experiment(
        "Magnitude and RTN", f"{PAIR} --stages.prune Magnitude --stages.quantize RTN", sparsities=SPARSITIES
    ),
    "sleb-rtn": Experiment("Blocks: SLEB and RTN", "sweep --config recipes/paper/block-pruning.yaml"),
    "sleb-gptq": Experiment(
        "Blocks: SLEB and GPTQ", "sweep --config recipes/paper/block-pruning.yaml --stages.quantize GPTQ"
    ),
    "rotation": Experiment("QuaRot, SparseGPT and GPTQ", ROTATION),
    "rotation-rtn": Experiment("QuaRot, SparseGPT and RTN", f"{ROTATION} --stages.quantize RTN"),
    "rotation-wanda": Experiment(
        "QuaRot, Wanda and GPTQ", f"{ROTATION} --stages.prune Wanda --stages.prune.sparsity 0.5 {FEW}"
    ),
    "rotation-wanda-rtn": Experiment(
        "QuaRot, Wanda and RTN",
        f"{ROTATION} --stages.prune Wanda --stages.prune.sparsity 0.5 "
        f"--stages.quantize RTN --stages.quantize.bits 4 {FEW}",
    ),
    "rotation-sleb": Experiment(
        "QuaRot, SLEB and GPTQ", f"{ROTATION} --stages.prune SLEB --stages.prune.amount 1 {FEW} --max_runs 2"
    ),
    "rotation-sleb-rtn": Experiment(
        "QuaRot, SLEB and RTN",
        f"{ROTATION} --stages.prune SLEB --stages.prune.amount 1 --stages.quantize RTN --stages.quantize.bits 4 {FEW} "
        "--max_runs 2",
    ),
    "granularity": Experiment("Interference: single weights", GRANULARITY),
    "granularity-2-4": Experiment("Interference: 2:4", f"{GRANULARITY} {TWO_OF_FOUR}"),
    "granularity-blocks": Experiment(
        "Interference: blocks", f"{GRANULARITY} --stages.prune SLEB --stages.prune.amount 3"
    ),
    "resnet-train": Experiment("", "fit --config recipes/paper/resnet-train.yaml --run_dir runs/resnet-train"),
    "deit-train": Experiment("", "fit --config recipes/paper/deit-train.yaml --run_dir runs/deit-train"),
    "resnet": Experiment("ResNet-18 on CIFAR-10", "sweep --config recipes/paper/resnet.yaml", "resnet-train"),
    "resnet-magnitude": Experiment(
        "ResNet-18 with magnitude pruning",
        "sweep --config recipes/paper/resnet.yaml --stages.prune Magnitude",
        "resnet-train",
    ),
    "deit": Experiment("DeiT on CIFAR-10", "sweep --config recipes/paper/deit.yaml", "deit-train"),
    "deit-magnitude": Experiment(
        "DeiT with magnitude pruning", "sweep --config recipes/paper/deit.yaml --stages.prune Magnitude", "deit-train"
    ),
    "multi-stage": Experiment("P1 -> Q -> P2", "order --config recipes/paper/multi-stage.yaml"),
    "peft": Experiment("SparseGPT against QLoRA", "order --config recipes/paper/peft.yaml"),
    "peft-wanda": Experiment(
        "Wanda against QLoRA",
        "order --config recipes/paper/peft.yaml --stages.prune Wanda --stages.prune.sparsity 0.5",
    ),
    "basis-sharing": Experiment("Basis Sharing and SparseGPT", "order --config recipes/paper/basis-sharing.yaml"),
    "mixed-precision": Experiment(
        "Mixed precision, many bits first or few",
        "sweep --config recipes/paper/mixed-precision.yaml --grid.quantize.average_bits [4,3.5,3]",
    ),
    "finetuned-int8": Experiment("Finetuned magnitude 50% and INT8", INT8),
    "finetuned-int8-2-4": Experiment("Finetuned magnitude 2:4 and INT8", f"{INT8} {TWO_OF_FOUR}"),
}


def folder_of(name: str) -> Path:
    """The run folder of an experiment."""
    words = shlex.split(EXPERIMENTS[name].command)
    return REPOSITORY / words[words.index("--run_dir") + 1] if "--run_dir" in words else RUNS / name / "run"


def parts_of(name: str) -> dict[float, Path]:
    """The run folder for each sparsity of an experiment that is run so."""
    return {sparsity: RUNS / f"{name}-{sparsity:.0%}".strip("%") / "run" for sparsity in EXPERIMENTS[name].sparsities}


def is_done(folder: Path) -> bool:
    """Whether its page was written, which comes last."""
    return (folder / "report.html").is_file()


def jobs(names: list[str]) -> Iterator[tuple[Path, list[str]]]:
    """The run folder and the command of all that is to be run."""
    for name in names:
        command, parts = shlex.split(os.path.expandvars(EXPERIMENTS[name].command)), parts_of(name)
        for sparsity, folder in parts.items():
            yield folder, [*command, "--grid.prune.sparsity", f"[{sparsity}]", "--store", str(RUNS / name / "store")]
        if not parts:
            yield folder_of(name), command


def run(folder: Path, command: list[str], options: list[str]) -> str:
    """Run a command, with what it prints in a file, and say how it went."""
    name = folder.parent.name if folder.name == "run" else folder.name
    if is_done(folder):
        return f"{name}: known"
    RUNS.mkdir(parents=True, exist_ok=True)
    words = [*command, "--run_dir", str(folder), "--trainer.enable_progress_bar", "false", *options]
    with (RUNS / f"{name}.log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "pqqp_lightning", *words], cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT
        )
    shutil.rmtree(RUNS / name / "store", ignore_errors=True)
    return f"{name}: {'done' if done.returncode == 0 else f'failed, see {log.name}'}"


def put_together(name: str) -> list[float]:
    """Make one sweep, in the experiment's run folder, of those for its sparsities; those that have been run."""
    done = {sparsity: folder for sparsity, folder in parts_of(name).items() if is_done(folder)}
    if done:
        reports = [read_sweep_report(RunFolder(folder)) for folder in done.values()]
        points = [point for report in reports for point in report["points"]]
        alone = {entry["step"]: entry for report in reports for entry in report["alone"]}
        whole = reports[0] | {"points": points, "alone": list(alone.values())}
        stages = Curve(whole["quantizing"], whole["pruning"], frozenset(), [])
        whole |= {"hypothesis": analyse(points, stages), "notes": pair_notes(points, whole["curves"], stages)}
        folder = folder_of(name)
        folder.mkdir(parents=True, exist_ok=True)
        draw_sweep(RunFolder(folder), whole)
        write_json(RunFolder(folder).sweep, whole)
        shutil.copy(next(iter(done.values())) / "recipe.yaml", folder)
    return list(done)


def page() -> str:
    """docs/results.md, with the runs' own pictures beside it."""
    found = {name: put_together(name) for name in EXPERIMENTS}
    parts = [INTRODUCTION.strip(), READING.strip(), "\n".join(_pairs())]
    for name, experiment in EXPERIMENTS.items():
        sparsities = found[name]
        if experiment.title and (sparsities or is_done(folder_of(name))):
            grid = f" --grid.prune.sparsity {json.dumps(sparsities)}" if sparsities else ""
            command = f"```\npqqp-lightning {experiment.command}{grid}\n```"
            parts += [f"## {experiment.title}", command, _machines(name), *_section(name)]
    return "\n\n".join(parts) + "\n"


def _pairs() -> Iterator[str]:
    """The hypothesis for each sweep of a pruning and a quantization, a line each."""
    yield "## Pairs at a glance\n"
    yield "How many points' intervals say that pruning first is better, or quantization, and the rank correlations:\n"
    yield "| pair | points | P → Q better | Q → P better | ρ(A, C\\*_P - C_Q) | ρ(A, G) |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for name, experiment in EXPERIMENTS.items():
        folder = RunFolder(folder_of(name))
        if folder.sweep.is_file() and (report := read_sweep_report(folder)).get("hypothesis"):
            advantages = [point["pair"]["advantage"] for point in report["points"]]
            clear = [a["value"] > 0 for a in advantages if leaves_zero_out(a["low"], a["high"])]
            ranks = [_rank(report["hypothesis"][which]) for which in ("ratio_difference", "gap")]
            counts = [str(len(advantages)), str(clear.count(False)), str(clear.count(True))]
            yield f"| {' | '.join([experiment.title, *counts, *ranks])} |"


def _rank(correlation: dict[str, Any]) -> str:
    """Spearman's with its interval, and of how many points."""
    if correlation["value"] is None:
        return "-"
    interval = f"{correlation['low']:.2f} to {correlation['high']:.2f}"
    return f"{correlation['value']:.2f} ({interval}; {correlation['points']})"


def _machines(name: str) -> str:
    """Where it was measured, from the runs' own records."""
    done = [folder for folder in parts_of(name).values() if is_done(folder)] or [folder_of(name)]
    found = [json.loads(file.read_text()) for folder in done for file in folder.glob("*.json")]
    machines = [report["hardware"] for report in found if "hardware" in report]
    words = [
        machine["gpu"] or f"{machine['threads']} CPU thread{'s' if machine['threads'] != 1 else ''}"
        for machine in machines
    ]
    return f"Measured on {' and '.join(dict.fromkeys(words))}."


def _section(name: str) -> Iterator[str]:
    """What the run's own page says, a level deeper, and its pictures."""
    whole = read_page(folder_of(name))
    shown = [
        Section(section.title, [block for block in section.blocks if not getattr(block, "folded", False)])
        for section in whole.sections
        if section.title in SHOWN
    ]
    text = to_markdown(replace(whole, sections=shown))
    yield text.split("\n\n", 2)[2].replace("\n## ", "\n### ").strip()
    folder = RunFolder(folder_of(name))
    if folder.sweep.is_file():
        yield from _accuracies(read_sweep_report(folder))
    PICTURES.mkdir(exist_ok=True)
    for picture in sorted(folder_of(name).glob("*.png")):
        copy = PICTURES / f"{name}-{picture.name}"
        shutil.copyfile(picture, copy)
        yield f"![{EXPERIMENTS[name].title}: drawn from the table above](results/{copy.name})"


def _accuracies(report: dict[str, Any]) -> Iterator[str]:
    """The questions that each model of a sweep of a pair answers rightly."""
    dense = report["dense"]["metrics"].get("acc_norm")
    if dense is None:
        return
    p, q = report["pruning"], report["quantizing"]
    alone = {entry["step"]: entry["record"] for entry in report["alone"]}
    lines = [f"| point | {p} | {q} | {p} -> {q} | {q} -> {p} |", "| --- | ---: | ---: | ---: | ---: |"]
    for point in report["points"]:
        orders = {tuple(order["order"]): order["record"] for order in point["orders"]}
        records = [alone[point["steps"][p]], alone[point["steps"][q]], orders[p, q], orders[q, p]]
        lines.append(
            " | ".join([f"| {point_name(point)}", *(f"{r['metrics']['acc_norm']:.1%}" for r in records)]) + " |"
        )
    yield f"### ARC-Challenge\n\nacc_norm, 300 questions; the dense model's is {dense:.1%}:"
    yield "\n".join(lines)


INTRODUCTION = """
# The paper's experiments, in a small size

What Kim et al. (*Prune-then-Quantize or Quantize-then-Prune?*, ICLR 2026) measured on LLaMA, ResNet and DeiT, on
models that two cores can carry: SmolLM2-135M on WikiText-2 (32 windows of 512 tokens for calibration, 40 for
evaluation, where the command does not say otherwise), a small ResNet-18 and a small DeiT on CIFAR-10. Each section is
one command: its verdict, its table, its pictures. All intervals are 95% paired bootstrap intervals over evaluation
samples, of more than two orders corrected for the comparisons with the best (Bonferroni); none is over seeds.
`python benchmarks/results.py` makes the runs, `--page` this page from what they recorded. CPUs are those of an AMD
EPYC; all is in float32.
"""

READING = """
## What agrees with the paper, and what does not

| the paper | here | |
| --- | --- | --- |
| A(Q→P) grows with C\\*_P - C_Q | SmolLM2, SparseGPT and GPTQ: Spearman 0.68 (0.02 to 0.98) | agrees |
| | SmolLM2, SparseGPT and RTN: 0.85 (0.46 to 0.97) | agrees |
| | Wanda and magnitude with RTN: 0.45 and 0.54, no evidence | open |
| | ResNet-18, DeiT: A falls with G, or there is no trend | does not |
| the weaker perturbation goes first | at 8 bits and moderate pruning | agrees |
| | at fewer bits, or more pruning, pruning first is better whatever is stronger | does not |
| whole blocks: A is 0 while the same ones go | 0 with RTN, -0.03 with GPTQ | agrees |
| the blocks' errors add up | to 0.93 to 1.08 times their sum | agrees, roughly |
| disjoint selectivity | holds with whole blocks, nowhere with single weights or 2:4 | in part |
| rotated weights are harder to prune | 96 against 69 with SparseGPT, 5590 against 61 with Wanda | agrees |
| P1 → Q → P2, weakest first | both prunings before the quantization are better | does not |
| many bits first | no difference | does not |
| the weaker of pruning and QLoRA first | QLoRA last is better, which makes up for the pruning | does not |
| Harma et al.: prune, finetune, INT8 | best by far, at 50% and with 2:4 | agrees |

- **The hypothesis in rank.** Over nine points of SparseGPT (50, 60, 70%) and GPTQ (8, 4, 3 bits) A(Q→P) grows with
  C\\*_P - C_Q: Spearman 0.68 (0.02 to 0.98), and pruning first is better at all nine. The methods' original
  implementations, chained on the same windows so that both constraints hold, give 0.6 to 0.7 and eight of nine. With
  RTN it is clearer, 0.85 (0.46 to 0.97). With the intensities themselves, G, there is no evidence for any pair; nor
  with either for Wanda or magnitude with RTN. Where GPTQ searches the range, 3 bits cost so little (73) that
  most prunings are worse than the end of its curve, and C\\*_P can be told of three points only.
- **The hypothesis in sign** holds at 8 bits for moderate pruning, where quantization is by far the weaker of the
  two: before SparseGPT 50% it gains 0.72 (0.34 to 1.14) with GPTQ and 1.34 (0.83 to 1.92) with RTN, before Wanda 60%
  3.4 (2.2 to 4.7) and 1.5 (0.4 to 2.6). With more pruning and with fewer bits it does not: at 4 and 3 bits pruning
  first is better at 29 of the 30 points of SparseGPT and Wanda (the last, where nothing is left of the model, is open),
  also where pruning is by far the stronger, and by more, the more of both there is; before Wanda 70% even 8 bits lose
  102 (63 to 151). Magnitude and RTN at 50% and 4 bits is the one point against that, by 36 (5 to 66) of 638.
- **Noise of the method.** The same sweep at 60% in another order of summation (the column sweep tensor by tensor
  instead of as one kernel) gave A = -4.3 (-6.3 to -2.9), -51 (-70 to -38), -601 (-874 to -401) at 8, 4 and 3 bits,
  where the table has -0.7, -58 and -243, and at 50% on two cores +0.5 (0.0 to 0.9), -7 (-10 to -5) and -115 (-163 to
  -78) where it has -0.9, -16 and -56: rounding errors that grow from block to block move A by more than the
  intervals, which are over evaluation samples alone. All signs stayed but the one whose interval held 0 on the two
  cores. SparseGPT 50% by itself came out at 53.7 and 53.8 on the GPU, 54.5 and 54.8 on CPUs, and at 53.4 and 53.7 in
  the original implementation. `order --repeats` is for that.
- **ResNet-18 on CIFAR-10** is against the hypothesis: SparseGPT first is better at 10 of 12 points and nowhere
  clearly worse, and A falls with G. Half the weights cost this network more than 3 bits, so that C\\*_P lies before
  the end of the curve nowhere.
- **DeiT on CIFAR-10** is, too: A falls with G (Spearman -0.78, -0.90 to -0.41). At 50% neither order matters; at 70 and
  80% SparseGPT first is better everywhere, by more with fewer bits, and already at 8 bits (by 5 points at 80%). There
  the grid is in the way, not its fineness: fitted before the pruning, it has no room for what SparseGPT adds to the
  weights that stay. 13.5% of them end at their row's largest magnitude, against 4.0% in the other order.
- **Magnitude pruning**, which adds nothing, bears that out: on the DeiT no order matters at 8 bits; pruning first is
  better at 3 bits (70 and 80%), quantization first by half a point at 70% and 6 bits. On ResNet-18 there is no trend: a
  gain for quantization first at 70% and 8 bits, losses at 3 bits at 50 and 70%. On SmolLM2 it breaks the model at 50%
  already (484), and there is no trend either, as with the original implementations.
- **Why pruning first.** The layers show it: after SparseGPT then RTN their errors add up to 15% less than the
  parts, the other way round to 15% more. A pruned weight is 0, which is on every grid, and is not rounded any more;
  a weight that was rounded before has its error already when the pruning makes up for it. So interference itself
  prefers pruning first here, whatever is stronger. Every quantization unit is pruned in part: disjoint selectivity,
  which the theorems assume, holds nowhere with single weights.
- **Granularity.** 2:4 is as single weights are: 10% less than the parts in the one order, 19% more in the other, and
  pruning first worth 90 (70 to 114) at 4 bits. With whole blocks disjoint selectivity holds: no unit is pruned in
  part, the layers' mean error is its parts' sum within 2% in both orders, and at 8 bits SLEB and RTN remove the same
  blocks in both orders, so that A is exactly 0, as the paper says. At 4 bits other blocks look least
  useful, and A is not 0, but no interval leaves 0 out. GPTQ reads its statistics from what the removal left, so that
  A is near 0 (-0.03, three blocks at 8 bits, the same ones in both orders) and not 0; where the 8-bit model loses
  block 17 instead of 14, A is -1.3.
- **Independence of the blocks' errors** holds roughly: together they move the output 0.93 (single weights), 0.95 (2:4)
  and 1.08 (blocks) times as far as the sum of each alone.
- **Rotation and pruning.** QuaRot, SparseGPT and GPTQ together are worse than SparseGPT and GPTQ alone (96 against
  69 on the same windows), while QuaRot helps GPTQ alone ([methods.md](methods.md)): rotated weights are harder to
  prune, as the paper found. With RTN, pruning before it is worth 350. Wanda breaks on rotated weights: 5590 at 50% (ten
  windows), where 61 is what it gives without the rotation (forty), which evens out the inputs' norms that it goes by;
  its two orders compare nothing. SLEB and RTN: 177 if the rotated model is rounded first, when block 13 looks least
  useful, and 274 if it loses block 14 first; with GPTQ 45.5 pruning first and 46.4 (block 5) the other way round.
- **P1 → Q → P2.** Both prunings before the quantization are best, the weaker first (64.3, against 68.6 with the
  stronger alone: a second pruning that finds its zeros made already changes nothing). The weakest-to-strongest
  order of all three, which ends with pruning, is behind by 9.7.
- **Mixed precision.** Many bits first or few makes no difference here: 31.99 and 31.97 at 4 bits on average, 34.97
  and 35.37 at 3.5, 43.94 and 43.90 at 3.
- **PEFT.** Pruning before QLoRA is better than after it, SparseGPT by 3.77 and Wanda, which makes up for nothing
  itself, by 9.98: adapters that are trained last make up for the pruning, too. The hypothesis would have the weaker
  perturbation, QLoRA, first.
- **Finetuning and INT8.** Magnitude pruning, finetuning, INT8 is the best order by far, as in Harma et al., at 50% and
  with 2:4: training after pruning is worth more than which of the two perturbations comes first. How far the other two
  orders of 2:4 are apart (930 and 6195) is chance: this model was 4 bits once, in 18% of its groups of four the second
  and the third magnitude are equal, and which of them goes decides more than any order. Keeping the first or the last
  of two equal ones gives 3364 or 1361 without any training (six windows); finetuning breaks the ties, INT8 ties them
  again.
- **Shared bases.** Pruning before Basis Sharing looks better, but loses its zeros in the factorization and ends
  larger: the two orders cannot be compared, and the report marks it.
- **Accuracy on ARC-Challenge** says nothing: the dense model answers 28% of 300 questions, guessing 25%, and the
  standard error is 2.6%.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="experiments to run; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--page", action="store_true", help="print the page instead")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, more = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    if options.page:
        print(page(), end="")
        return
    if unknown := [name for name in options.names if name not in EXPERIMENTS]:
        parser.error(f"no experiments: {', '.join(unknown)}. There are {', '.join(EXPERIMENTS)}.")
    names = options.names or list(EXPERIMENTS)
    needed = list(dict.fromkeys(need for name in names if (need := EXPERIMENTS[name].needs)))
    with ThreadPoolExecutor(options.jobs) as pool:
        for some in (needed, [name for name in names if name not in needed]):
            for words in pool.map(lambda job: run(*job, more), jobs(some)):
                print(words, flush=True)


if __name__ == "__main__":
    main()
