"""``search``: the best pipeline under a size, which is known before anything runs."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from command_line import prepare, run
from tiny import RegressionData, Regressor, trainer

from pqqp_lightning.callbacks import RTN, Magnitude
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.experiments import PipelineOptions, search_pipelines
from pqqp_lightning.experiments.search_budget import find_candidates
from pqqp_lightning.experiments.search_choice import SAMPLERS, Chooser
from pqqp_lightning.experiments.search_prior import count_weaker
from pqqp_lightning.experiments.search_space import read_space
from pqqp_lightning.runs.early_stop import StoppedEarly
from pqqp_lightning.runs.evaluation import evaluate
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.stage_runner import StageRunner
from pqqp_lightning.stages.discovery import known_stages, load_installed
from pqqp_lightning.storage.run_folder import WEIGHTS

SPACE = ["--space.prune.sparsity", "[0.3,0.5,0.7]", "--space.quantize.bits", "[3,4,8]"]
SEARCHED = (
    "Magnitude",
    "Wanda",
    "SparseGPT",
    "SLEB",
    "ChannelPruning",
    "BasisSharing",
    "RTN",
    "GPTQ",
    "MixedPrecision",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return prepare(tmp_path, monkeypatch)


@pytest.fixture
def applied(monkeypatch):
    """The nodes whose last stage was applied."""
    nodes: list[str] = []
    apply = StageRunner.apply

    def watch(self, stage, folder, **options):
        nodes.append(folder.parent.name)
        return apply(self, stage, folder, **options)

    monkeypatch.setattr(StageRunner, "apply", watch)
    return nodes


def search(folder: Path, *arguments: str, name: str = "search") -> dict:
    assert run("search", "--config", "recipe.yaml", "--run_dir", name, *arguments) == 0
    return json.loads((folder / name / "search.json").read_text())


def best_of(report: dict) -> dict:
    return next(entry for entry in report["trials"] if entry["number"] == report["best"])


def same(report: dict) -> list:
    """What two searches of the same must agree in."""
    trials = [
        [e["steps"], e["values"], e["behind"], e["record"] and e["record"]["metrics"], e["stopped"], e["applications"]]
        for e in report["trials"]
    ]
    return [trials, report["front"], report["best"], report["verdict"], report["importance"]]


def test_no_pipeline_over_the_budget_runs_and_sizes_are_as_predicted(folder, applied):
    report = search(folder, *SPACE, "--target_rate", "2.2", "--trials", "8", "--stop_early", "false")
    limit = report["dense"]["size_bytes"] / 2.2
    assert report["over"] > 0
    assert len(report["trials"]) == 8
    for entry in report["trials"]:
        assert entry["exact"]
        assert entry["record"]["size_bytes"] == entry["expected_bytes"] <= limit
    assert len(applied) == len(set(applied)) == report["trials"][-1]["applications"] == report["applications"]
    metrics = [entry["record"]["metrics"]["perplexity"] for entry in report["trials"]]
    assert best_of(report)["record"]["metrics"]["perplexity"] == min(metrics)
    assert report["verdict"].startswith("Under ")
    with (folder / "search/search.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["perplexity"]) for row in rows] == metrics
    page = (folder / "search/report.html").read_text()
    assert "budget" in page
    assert "dense" in page
    assert (folder / "search/front.png").is_file()


def test_the_best_recipe_gives_the_same_numbers(folder):
    space = [*SPACE, "--space.prune.optional", "true", "--target_rate", "2.2"]
    best = best_of(search(folder, *space, "--trials", "4"))
    assert run("fit", "--config", "search/best.yaml") == 0
    fitted = json.loads((folder / "runs/best/report.json").read_text())["stages"][-1]
    assert list(yaml.safe_load((folder / "search/best.yaml").read_text())["stages"]) == best["order"]
    for name in ("metrics", "size_bytes", "sparsity"):
        assert fitted[name] == best["record"][name]
    ours, theirs = folder / "search/model" / WEIGHTS, folder / "runs/best/model" / WEIGHTS
    assert ours.read_bytes() == theirs.read_bytes()


def test_without_a_budget_the_front_is_what_nothing_beats(folder):
    report = search(folder, *SPACE, "--trials", "6", "--space.order", "fixed")
    assert report["objectives"] == ["perplexity", "size"]
    points = {e["number"]: (e["record"]["metrics"]["perplexity"], e["record"]["size_bytes"]) for e in report["trials"]}
    for number, (value, size) in points.items():
        beaten = any(v <= value and s <= size and (v, s) != (value, size) for v, s in points.values())
        assert (number in report["front"]) == (not beaten)
    assert [points[n][1] for n in report["front"]] == sorted(points[n][1] for n in report["front"])


def test_latency_is_measured_once_and_kept(folder):
    asked = [*SPACE, "--trials", "3", "--objectives", "[perplexity,latency_ms]"]
    report = search(folder, *asked)
    assert all(entry["values"]["latency_ms"] > 0 for entry in report["trials"])
    assert any("shape [[1, 16]]" in note for note in report["notes"])
    assert same(search(folder, *asked, "--ckpt_path", "last")) == same(report)


def test_a_pipeline_clearly_behind_is_stopped_and_the_answer_stays(folder):
    np.save(folder / "evaluation.npy", np.random.default_rng(0).integers(0, 300, (64, 16)).astype("int32"))
    space = ["--space.prune.sparsity", "[0.1,0.5,0.9]", "--space.quantize.bits", "[2,8]", "--target_rate", "1.5"]
    short = search(folder, *space, "--trials", "8", "--store", "one")
    stopped = [entry for entry in short["trials"] if entry["stopped"]]
    assert stopped
    assert all(entry["record"] is None and entry["behind"]["low"] > 0 for entry in stopped)
    assert f"({len(stopped)} stopped early)" in short["verdict"]
    again = search(folder, *space, "--trials", "8", "--store", "one", name="again")
    assert same(again) == same(short)  # stopped ones are known too
    assert again["applications"] == 0
    # every pipeline that was stopped is behind on all samples as well
    whole = search(folder, *space, "--trials", "100", "--sampler", "random", "--stop_early", "false", name="whole")
    full = {tuple(e["steps"]): e["record"]["metrics"]["perplexity"] for e in whole["trials"]}
    best = min(full[tuple(e["steps"])] for e in short["trials"] if not e["stopped"])
    assert all(full[tuple(entry["steps"])] > best for entry in stopped)


def test_metrics_may_be_replaced_after_an_evaluation_that_was_stopped(tmp_path):
    module = tiny.make_model("resnet")
    data = RunData(module, datamodule=tiny.make_data("resnet", tmp_path))
    engine = trainer(tmp_path / "run")
    with pytest.raises(StoppedEarly):
        evaluate(engine, data, keep_samples=True, watch=lambda states: True)
    module.top1 = copy.deepcopy(module.top1)  # as where a stage's structure is restored
    assert evaluate(engine, data, keep_samples=True).samples["top1"].states.shape[0] == 32


def test_from_python_with_a_module_of_ones_own_in_any_order(folder):
    options = PipelineOptions(space={"magnitude": {"sparsity": [0.3, 0.6]}}, target_bits=4.5, trials=3)
    search_pipelines(trainer(folder / "run", Magnitude(0.5), RTN(3)), Regressor(), RegressionData(), options)
    report = json.loads((folder / "run/search.json").read_text())
    assert all(entry["record"]["bits_per_weight"] <= 4.5 for entry in report["trials"])
    assert not (folder / "run/best.yaml").exists()  # there is no recipe to write


def candidates_of(folder: Path, given: dict, **options):
    stages = [Magnitude(0.5), RTN(4)]
    for stage, name in zip(stages, ("prune", "quantize"), strict=True):
        stage.name = name
    space = read_space(stages, given)
    data = RunData(tiny.make_model("llama"), datamodule=tiny.make_data("llama", folder))
    return space, find_candidates(space, data, PipelineOptions(**options))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_pipeline_is_chosen_once_and_each_strength_first_from_weak_to_strong(sampler, tmp_path):
    given = {
        "prune": {"sparsity": {"low": 0.3, "high": 0.7, "step": 0.2}, "optional": True},
        "quantize": {"bits": [3, 8]},
    }
    space, found = candidates_of(tmp_path, given)
    assert len(found.fitting) == space.count() == 2 * 3 * 2 + 2
    chooser = Chooser(space, found.fitting, sampler, 0, 1, None)
    chosen = []
    while chooser.left:
        for choice in chooser.choose(3, lambda steps: [len(step) for step in steps]):
            chosen.append(choice.candidate.steps)
            chooser.tell(choice, [float(len(chosen))])
    assert sorted(chosen) == sorted(found.fitting)
    if sampler == "random":
        return
    first = {}
    for steps in chosen:
        first.setdefault(frozenset(steps), steps)
    assert all(list(steps) == sorted(steps, key=len) for steps in first.values())


def test_choices_depend_on_the_seed_and_the_results_alone(tmp_path):
    space, found = candidates_of(
        tmp_path, {"prune": {"sparsity": [0.2, 0.4, 0.6, 0.8]}, "quantize": {"bits": [2, 3, 4]}}
    )

    def choose(seed):
        chooser = Chooser(space, found.fitting, "tpe", seed, 1, tmp_path / "optuna.log")
        chosen = []
        for _ in range(12):
            (choice,) = chooser.choose(1, lambda steps: [0.0 for _ in steps])
            chosen.append(choice.candidate.steps)
            chooser.tell(choice, [-float(len(choice.candidate.steps[0]))])
        return chosen

    assert choose(0) == choose(0) != choose(1)


def test_pipelines_with_the_fewest_weaker_ones_that_fit_come_first(tmp_path):
    given = {
        "prune": {"sparsity": {"low": 0.1, "high": 0.9, "step": 0.1}, "optional": True},
        "quantize": {"bits": [2, 3, 4, 8], "group_size": ["channel", 32]},
    }
    space, found = candidates_of(tmp_path, given, target_bits=3)
    ranks = count_weaker(space, list(found.fitting), found.savings)
    names = {steps: [space.steps[step].name for step in steps] for steps in found.fitting}
    saved = {steps: dict(zip(names[steps], map(found.savings.get, steps), strict=True)) for steps in found.fitting}
    for steps, own in saved.items():
        weaker = 0
        for other, less in saved.items():
            within = [name for name in names[steps] if name in less] == names[other]
            weaker += within and less != own and all(less[name] <= own[name] for name in less)
        assert ranks[steps] == weaker, steps
    firsts = [steps for steps in ranks if ranks[steps] == 0]
    assert len({frozenset(steps) for steps in firsts}) == 4
    chooser = Chooser(space, found.fitting, "tpe", 0, 1, None, ranks)
    chosen = [chooser.choose(1, lambda steps: [0.0 for _ in steps])[0].candidate.steps for _ in range(5)]
    assert set(chosen[:4]) <= set(firsts)
    assert len({frozenset(steps) for steps in chosen}) == 5
    assert ranks[chosen[4]] == min(rank for rank in ranks.values() if rank)


def test_a_budget_in_any_unit(tmp_path):
    _, whole = candidates_of(tmp_path, {"prune": {"sparsity": [0.3, 0.7]}})
    sizes = sorted(c.expected.size_bytes for c in whole.fitting.values())
    for size in (sizes[-1], f"{sizes[-1] / 1e3}kB", f"{sizes[-1]} B"):
        assert len(candidates_of(tmp_path, {"prune": {"sparsity": [0.3, 0.7]}}, target_size=size)[1].fitting) == 4
    with pytest.raises(RecipeError, match="below the smallest pipeline's size"):
        candidates_of(tmp_path, {"prune": {"sparsity": [0.3, 0.7]}}, target_size=sizes[0] - 1)


def test_the_stages_of_the_issue_have_a_search_space_that_they_accept():
    load_installed()
    known = known_stages()
    for name in SEARCHED:
        stage = tiny.make_stage(known[name])
        stage.name = "one"
        space = read_space([stage], {})
        assert len(space.variants["one"]) > 1, name


def test_a_stage_with_a_pattern_keeps_it(folder):
    stage = Magnitude(pattern="2:4")
    space = read_space([stage, RTN(4)], {})
    assert [variant.stage.pattern for variant in space.variants["magnitude"].values()] == ["2:4"]
    assert len(space.variants["rtn"]) > 1


def test_a_budget_of_the_command_line_replaces_the_recipes(folder, capsys):
    with (folder / "recipe.yaml").open("a") as recipe:
        recipe.write("target_bits: 3\n")
    assert run("search", "--config", "recipe.yaml", *SPACE, "--target_size", "1kB") == 2
    assert "target_size='1kB' is below the smallest pipeline's size" in capsys.readouterr().err
