"""What ``search`` finds on SmolLM2-135M, beside pipelines that a person would choose, at the same counted size.

    python benchmarks/search_by_hand.py [--trials 12] [--folder runs/by-hand]

Each pipeline that was chosen by hand is measured first. Then the space of recipes/search/smollm2.yaml is searched under
its counted size, with the recipe's data and one store for all. Printed: both, and the difference of their perplexities
on the same windows with its 95% interval.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from pqqp_lightning.callbacks import GPTQ, SparseGPT
from pqqp_lightning.data import TextData
from pqqp_lightning.experiments import PipelineOptions, search_pipelines
from pqqp_lightning.models import CausalLM
from pqqp_lightning.report.formatting import human_bytes
from pqqp_lightning.runs.preparation import prepare
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.trainer import Trainer
from pqqp_lightning.stages.stage import Stage
from pqqp_lightning.storage.result_store import ResultStore
from pqqp_lightning.trials.prefix_tree import Order, PrefixTree
from pqqp_lightning.trials.verdict import Judge

RECIPE = yaml.safe_load((Path(__file__).parents[1] / "recipes/search/smollm2.yaml").read_text())
METRIC = "perplexity"
KINDS: dict[str, type[Stage]] = {"prune": SparseGPT, "quantize": GPTQ}
"""The recipe's stages, by the names that results are looked up by."""
BY_HAND: dict[str, dict[str, dict[str, Any]]] = {
    "GPTQ 3 bits": {"quantize": {"bits": 3, "group_size": 64}},
    "SparseGPT 50%, GPTQ 4 bits": {"prune": {"sparsity": 0.5}, "quantize": {"bits": 4, "group_size": 64}},
    "SparseGPT 2:4, GPTQ 4 bits": {"prune": {"pattern": "2:4"}, "quantize": {"bits": 4, "group_size": 64}},
}
"""The arguments of each stage of a pipeline, in the order of compression."""


def make(arguments: dict[str, dict[str, Any]]) -> list[Stage]:
    """The stages of a pipeline."""
    stages = []
    for name, own in arguments.items():
        stage = KINDS[name](**own)
        stage.name = name
        stages.append(stage)
    return stages


def open_session(folder: Path, stages: list[Stage]) -> tuple[Trainer, CausalLM, TextData]:
    """The trainer, the dense model and the recipe's data."""
    engine = Trainer(accelerator="cpu", enable_progress_bar=False, default_root_dir=str(folder), callbacks=stages)
    return engine, CausalLM("smollm2-135m"), TextData(**RECIPE["data"]["init_args"])


def open_tree(folder: Path, pipelines: dict[str, list[Stage]]) -> tuple[PrefixTree, dict[str, Order]]:
    """A tree that measures the pipelines, and each one's place in it."""
    steps: dict[str, Stage] = {}
    orders: dict[str, Order] = {}
    for pipeline, stages in pipelines.items():
        own = {f"{stage.name} of {pipeline}": stage for stage in stages}
        orders[pipeline] = tuple(own)
        steps.update(own)
    engine, module, datamodule = open_session(folder / "by-hand", list(steps.values()))
    data = RunData(module, datamodule=datamodule)
    prepare(engine, data)
    data.read(engine)
    tree = PrefixTree(engine, data, steps, ResultStore(folder / "store"))
    tree.open()
    return tree, orders


def search(folder: Path, size_bytes: int, trials: int) -> dict[str, dict[str, Any]]:
    """The arguments of the search's best pipeline of at most so many bytes."""
    space, store = RECIPE["space"], str(folder / "store")
    options = PipelineOptions(space=space, target_size=size_bytes, trials=trials, store=store)
    run = folder / f"search-{size_bytes}"
    stages = [KINDS[name](**stage["init_args"]) for name, stage in RECIPE["stages"].items()]
    for name, stage in zip(RECIPE["stages"], stages, strict=True):
        stage.name = name
    search_pipelines(*open_session(run, stages), options)
    report = json.loads((run / "search.json").read_text())
    print(report["verdict"], flush=True)
    return next(entry["arguments"] for entry in report["trials"] if entry["number"] == report["best"])


def words(arguments: dict[str, dict[str, Any]]) -> str:
    """``"prune sparsity=0.4, quantize bits=3 group_size=64"``."""
    shown = []
    for name, own in arguments.items():
        shown.append(" ".join([name, *(f"{argument}={value}" for argument, value in own.items())]))
    return ", ".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=RECIPE["trials"])
    parser.add_argument("--folder", type=Path, default=Path("runs/by-hand"))
    options = parser.parse_args()
    pipelines = {name: make(arguments) for name, arguments in BY_HAND.items()}
    tree, orders = open_tree(options.folder, pipelines)
    found = {}
    for name, order in orders.items():
        size_bytes = tree.measure(order).record["size_bytes"]
        found[name] = search(options.folder, size_bytes, options.trials)
        pipelines[f"search for {name}"] = make(found[name])
    judge_tree, orders = open_tree(options.folder, pipelines)
    judge = Judge(judge_tree, METRIC, higher=False)
    print("| by hand | size | perplexity | search | size | perplexity | lower by |\n| - | - | - | - | - | - | - |")
    for name, best in found.items():
        cells = [name]
        for order in (orders[name], orders[f"search for {name}"]):
            record = judge_tree.measure(order).record
            cells += [human_bytes(record["size_bytes"]), f"{record['metrics'][METRIC]:.2f}"]
        lead = judge.difference(orders[f"search for {name}"], orders[name])
        cells.insert(3, words(best))
        cells.append(f"{lead.value:.2f} ({lead.low:.2f} to {lead.high:.2f})")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
