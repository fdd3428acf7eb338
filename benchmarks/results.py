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
READING = Path(__file__).parent / "pages" / "results.md"  # what the runs taught, written by hand
PAIR = "sweep --config recipes/paper/prune-quantize.yaml"
ARC = "--data.questions '{source: $PQQP_DATA/ai2_arc, config_name: ARC-Challenge, samples: 300}'"
ROTATION = "order --config recipes/paper/rotation.yaml"
FEW = "--data.calibration_samples 4 --data.evaluation_samples 10"
SPARSITIES = (0.5, 0.6, 0.7)
KEEP = "--stages.prune.batch_norm keep --stages.quantize.batch_norm keep"
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
    "resnet-keep": Experiment(
        "ResNet-18 with the dense network's BatchNorm statistics",
        f"sweep --config recipes/paper/resnet.yaml {KEEP}",
        "resnet-train",
    ),
    "resnet-magnitude-keep": Experiment(
        "ResNet-18 with magnitude pruning and the dense network's BatchNorm statistics",
        f"sweep --config recipes/paper/resnet.yaml --stages.prune Magnitude {KEEP}",
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
    parts = [READING.read_text().strip(), "\n".join(_pairs())]
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
