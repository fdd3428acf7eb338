"""How many stage applications a search needs to come near the best pipeline of a whole grid.

    python benchmarks/search.py [recipe ...]

For each recipe the whole space under its budget is measured first, into a store that all searches share. Then
``search`` chooses with ten seeds of TPE and ten of random choice. Printed: the metric of the best pipeline after a
quarter of the applications that the whole grid takes, counted as if each search had an empty store. The recipes need
the networks of recipes/digits-resnet-train.yaml and recipes/digits-deit-train.yaml.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from pqqp_lightning.__main__ import main as command

REPOSITORY = Path(__file__).parents[1]
RECIPES = ["recipes/search/digits-resnet.yaml", "recipes/search/digits-deit.yaml"]
SEEDS = 10
NEAR = 0.02


def search(recipe: str, folder: Path, name: str, *options: str) -> dict[str, Any]:
    """The report of one search, which reads what the store has."""
    words = ["search", "--config", recipe, "--run_dir", str(folder / name), "--store", str(folder / "store")]
    command([*words, "--trainer.enable_progress_bar", "false", *options])
    return json.loads((folder / name / "search.json").read_text())


def best_within(report: dict[str, Any], applications: float) -> float | None:
    """The best metric among the pipelines that need at most so many applications together."""
    found = [
        entry["record"]["metrics"][report["metric"]]
        for entry in report["trials"]
        if entry["applications"] <= applications and entry["fits"] and entry["record"] is not None
    ]
    choose = max if report["higher_is_better"] else min
    return choose((value for value in found if value is not None), default=None)


def is_near(value: float | None, best: float, higher: bool) -> bool:
    """Whether the metric is within :data:`NEAR` of the best one."""
    if value is None:
        return False
    return value >= best * (1 - NEAR) if higher else value <= best * (1 + NEAR)


def measure(recipe: str, folder: Path, seeds: int) -> list[str]:
    """The rows of one recipe's table."""
    everything = ("--trials", "100000", "--sampler", "random", "--stop_early", "false")
    grid = search(recipe, folder, "grid", *everything)
    whole = grid["trials"][-1]["applications"]
    best = best_within(grid, whole)
    assert best is not None
    head = (
        f"| {Path(recipe).stem}: {len(grid['trials'])} pipelines, {whole} applications | whole grid | {best:.4f} | | |"
    )
    rows = [head]
    quarter = whole / 4
    for sampler in ("tpe", "random"):
        reached = []
        for seed in range(seeds):
            chosen = ("--sampler", sampler, "--sampler_seed", str(seed), "--trials", str(max(2, int(quarter))))
            reached.append(best_within(search(recipe, folder, f"{sampler}-{seed}", *chosen), quarter))
        near = sum(is_near(value, best, grid["higher_is_better"]) for value in reached)
        values = [value for value in reached if value is not None]
        worst = min(values) if grid["higher_is_better"] else max(values)
        rows.append(
            f"| | {sampler}, {quarter:.0f} applications | {median(values):.4f} | {worst:.4f} | {near} of {seeds} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--folder", help="where runs and results go; a temporary folder by default")
    options = parser.parse_args()
    print(
        "| space | what | median | worst | within 2% of the grid's best |\n| --- | --- | --- | --- | --- |", flush=True
    )
    with TemporaryDirectory() as temporary:
        for recipe in options.recipes:
            folder = Path(options.folder or temporary) / Path(recipe).stem
            for row in measure(recipe, folder, options.seeds):
                print(row, flush=True)


if __name__ == "__main__":
    sys.exit(main())
