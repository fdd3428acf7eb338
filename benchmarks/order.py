"""What a search for the best order costs, and what the cheaper strategies miss.

    python benchmarks/order.py [recipe ...]

For each recipe, one after another and each from an empty store: ``order`` over all orders, ``--strategy progressive``,
``--strategy predict``, and one plain ``fit`` for each permutation. Wall time, stage applications and evaluations, the
metric of the order that each would choose, and the peak memory of the whole search beside that of one fit. The recipes
for digits need the networks of recipes/digits-resnet-train.yaml and recipes/digits-deit-train.yaml.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[1]
RECIPES = ["recipes/order/digits-resnet.yaml", "recipes/order/digits-deit.yaml"]


@dataclass
class Cost:
    """One command.

    Attributes:
        seconds: wall time.
        peak: resident bytes.
    """

    seconds: float
    peak: int


class Refused(SystemExit):
    """A command that did not end well; what it said."""


def command(name: str, recipe: str, run_dir: Path, *options: str) -> Cost:
    """Run a command in a process of its own."""
    words = [sys.executable, "-m", "pqqp_lightning", name, "--config", recipe, "--run_dir", str(run_dir)]
    words += ["--trainer.enable_progress_bar", "false", *options]
    start = time.perf_counter()
    with TemporaryFile("w+") as errors:
        child = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(child.pid, 0)  # the peak of this child alone
        if status:
            errors.seek(0)
            raise Refused(errors.read())
    return Cost(time.perf_counter() - start, usage.ru_maxrss * 1024)


def measure(recipe: str, folder: Path) -> Iterator[str]:
    """The table's rows for one recipe, each as soon as it is measured."""
    stages = list(yaml.safe_load((REPOSITORY / recipe).read_text())["stages"])
    orders = list(permutations(stages))
    whole = len(orders) * len(stages)
    exhaustive, cost = search(recipe, folder, "exhaustive")
    scores = {tuple(o["order"]): o["metrics"][exhaustive["metric"]] for o in exhaustive["orders"]}
    best = exhaustive["orders"][0]["metrics"][exhaustive["metric"]]
    yield row(recipe, f"exhaustive, {len(scores)} orders", cost, exhaustive["applications"], best, best)
    progressive, cost = search(recipe, folder, "progressive")
    found = progressive["orders"][0]["metrics"][progressive["metric"]]
    yield row("", f"progressive, {len(progressive['orders'])} orders", cost, progressive["applications"], found, best)
    yield predict(recipe, folder, scores, best)
    alone = [
        command("fit", recipe, folder / "fits" / "-".join(order), "--stage_order", f"[{','.join(order)}]")
        for order in orders
        if order in scores
    ]
    total = Cost(sum(one.seconds for one in alone), max(one.peak for one in alone))
    yield row("", f"{len(alone)} fits", total, len(alone) * len(stages), best, best)
    print(f"{recipe}: {exhaustive['applications']} applications of {whole}", file=sys.stderr, flush=True)


def predict(recipe: str, folder: Path, scores: dict[tuple[str, ...], float], best: float) -> str:
    """The row of the strategy that runs no order; it refuses stages after which layers cannot be compared."""
    run_dir = folder / "predict" / "run"
    try:
        cost = command("order", recipe, run_dir, "--strategy", "predict")
    except Refused as refused:
        print(refused, file=sys.stderr, flush=True)
        return "| | predict | refused | - | - | - |"
    order = tuple(json.loads((run_dir / "prediction.json").read_text())["predicted"])
    return row("", "predict, 0 orders", cost, len(order), scores.get(order), best)


def search(recipe: str, folder: Path, strategy: str) -> tuple[dict[str, Any], Cost]:
    """``order.json`` of a search from an empty store, and what it cost."""
    run_dir = folder / strategy / "run"
    cost = command("order", recipe, run_dir, "--strategy", strategy)
    return json.loads((run_dir / "order.json").read_text()), cost


def row(recipe: str, what: str, cost: Cost, applications: int, found: float | None, best: float) -> str:
    """A line of the table."""
    score = "-" if found is None else f"{found:.4f} ({found / best - 1:+.1%})"
    name = Path(recipe).stem
    return f"| {name} | {what} | {cost.seconds:.0f} | {applications} | {score} | {cost.peak / 1e6:.0f} MB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    options = parser.parse_args()
    print("| recipe | what | seconds | stage applications | metric (to the best) | peak |")
    print("| --- | --- | --- | --- | --- | --- |")
    for recipe in options.recipes:
        with TemporaryDirectory() as folder:
            for line in measure(recipe, Path(folder)):
                print(line, flush=True)


if __name__ == "__main__":
    main()
