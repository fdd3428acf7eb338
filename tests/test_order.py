"""``order``: every order of the stages from the same dense model, each as a plain ``fit`` in that order would be."""

from __future__ import annotations

import json
from itertools import combinations, permutations
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from command_line import RECIPE, prepare, run, write_recipe
from interrupt import Died, run_with_kills
from tiny import RegressionData, Regressor, trainer

import pqqp_lightning
from pqqp_lightning.callbacks import RTN, Magnitude
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.experiments import OrderOptions, search_orders
from pqqp_lightning.experiments.session import exclusive_run_folder
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.stage_runner import StageRunner
from pqqp_lightning.storage.result_store import ResultStore
from pqqp_lightning.storage.run_folder import WEIGHTS
from pqqp_lightning.trials.prefix_tree import PrefixTree

TWO = RECIPE[RECIPE.index("stages:") :]
THREE = """\
stages:
  prune: {class_path: SparseGPT, init_args: {sparsity: 0.5}}
  quantize: {class_path: GPTQ, init_args: {bits: 3}}
  more: {class_path: Magnitude, init_args: {sparsity: 0.7, targets: [mlp]}}
"""
WITH_FINETUNING = """\
stages:
  prune: {class_path: Magnitude, init_args: {sparsity: 0.5}}
  tune: {class_path: Finetune, init_args: {epochs: 1, learning_rate: 0.01}}
  quantize: {class_path: RTN, init_args: {bits: 4}}
"""
SAME = ("name", "method", "options", "metrics", "size_bytes", "sparsity", "bits_per_weight", "nominal_rate", "notes")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return prepare(tmp_path, monkeypatch)


@pytest.fixture
def applied(monkeypatch):
    """The weights file of every node, in the order in which the stages were applied."""
    nodes: dict[str, bytes] = {}
    apply = StageRunner.apply

    def watch(self, stage, folder, **options):
        record = apply(self, stage, folder, **options)
        node = folder.parent.name.rpartition("-")[0] or folder.name  # in a store, or in a run
        assert node not in nodes
        nodes[node] = (folder / WEIGHTS).read_bytes()
        return record

    monkeypatch.setattr(StageRunner, "apply", watch)
    return nodes


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a search over three stages that was not interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        search(prepare(folder, monkeypatch), THREE)
    return folder / "search"


def search(folder: Path, stages: str = TWO, *arguments: str) -> dict:
    write_recipe(folder, {TWO: stages, "evaluation: ": "train: train.npy, evaluation: "})
    assert run("order", "--config", "recipe.yaml", "--run_dir", "search", *arguments) == 0
    return json.loads((folder / "search/order.json").read_text())


def plain_fit(folder: Path, order: list[str]) -> tuple[list[dict], bytes]:
    """The stages' records and the weights of a plain fit in this order."""
    assert run("fit", "--config", "recipe.yaml", "--run_dir", "plain", "--stage_order", f"[{','.join(order)}]") == 0
    stages = json.loads((folder / "plain/report.json").read_text())["stages"]
    return stages, (folder / "plain/model" / WEIGHTS).read_bytes()


def same(stages: list[dict]) -> list[list]:
    return [[stage[name] for name in SAME] for stage in stages]


@pytest.mark.parametrize(
    ("stages", "count"), [(TWO, 2), (THREE, 6), (WITH_FINETUNING, 3)], ids=["two", "three", "tune"]
)
def test_every_order_is_what_a_plain_fit_gives(stages, count, folder, applied):
    report = search(folder, stages)
    nodes = dict(applied)
    assert len(report["orders"]) == len({tuple(entry["order"]) for entry in report["orders"]}) == count
    for entry in report["orders"]:
        applied.clear()
        records, weights = plain_fit(folder, entry["order"])
        assert same(entry["stages"]) == same(records)
        assert entry["metrics"] == records[-1]["metrics"]
        assert nodes["+".join(entry["order"])] == weights  # bit for bit
        assert all(stage["constraints_verified"] for stage in entry["stages"])


def test_the_orders_differ(folder):
    report = search(folder, THREE)
    assert len({entry["metrics"]["perplexity"] for entry in report["orders"]}) == 6


@pytest.mark.parametrize(("stages", "count"), [(TWO, 4), (THREE, 15)], ids=["two", "three"])
def test_shared_prefixes_are_computed_once(stages, count, folder, applied, monkeypatch):
    dense = []
    measure = StageRunner.measure_dense
    monkeypatch.setattr(StageRunner, "measure_dense", lambda self, stages: dense.append(1) or measure(self, stages))
    search(folder, stages)
    names = [line.split(":")[0].strip() for line in stages.splitlines()[1:]]
    prefixes = {"+".join(p) for n in range(1, len(names) + 1) for p in permutations(names, n)}
    assert set(applied) == prefixes
    assert (len(applied), len(dense)) == (count, 1)


def test_the_best_orders_model_is_kept(folder):
    report = search(folder, THREE)
    scores = {tuple(entry["order"]): entry["metrics"]["perplexity"] for entry in report["orders"]}
    assert tuple(report["best"]) == min(scores, key=scores.get) == tuple(report["orders"][0]["order"])
    assert list(scores.values()) == sorted(scores.values())
    _, weights = plain_fit(folder, report["best"])
    assert (folder / "search/model" / WEIGHTS).read_bytes() == weights
    found, expected = (pqqp_lightning.load(folder / name).state_dict() for name in ("search", "plain"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (folder / "search/nodes").exists()


def test_advantage_is_antisymmetric_and_the_difference_of_the_scores(folder):
    report = search(folder)
    score = {tuple(entry["order"]): -entry["metrics"]["perplexity"] for entry in report["orders"]}
    there, back = score["prune", "quantize"], score["quantize", "prune"]
    advantage = {pair: found["value"] for pair, found in report["advantage"].items()}
    assert advantage == {"prune->quantize": there - back, "quantize->prune": back - there}
    assert advantage["prune->quantize"] != 0
    forth, back = report["advantage"].values()
    assert forth["low"] < forth["value"] < forth["high"]
    assert (back["low"], back["high"]) == pytest.approx((-forth["high"], -forth["low"]))


def test_advantages_of_three_stages_are_those_of_each_pair_alone(folder):
    report = search(folder, THREE)
    assert set(report["advantage"]) == {f"{a}->{b}" for a, b in permutations(["prune", "quantize", "more"], 2)}
    for first, second in combinations(["prune", "quantize", "more"], 2):
        advantage = report["advantage"][f"{first}->{second}"]["value"]
        assert advantage == -report["advantage"][f"{second}->{first}"]["value"]
        alone = [line for line in THREE.splitlines() if line.split(":")[0].strip() in ("stages", first, second)]
        write_recipe(folder, {TWO: "\n".join(alone)})
        score = [
            -plain_fit(folder, order)[0][-1]["metrics"]["perplexity"] for order in ([first, second], [second, first])
        ]
        assert advantage == score[0] - score[1]


@pytest.mark.parametrize("higher", ["true", "false"])
def test_higher_or_lower_is_better(higher, folder):
    report = search(folder, TWO, "--metric", "perplexity", "--higher_is_better", higher)
    values = [entry["metrics"]["perplexity"] for entry in report["orders"]]
    assert report["best"] == report["orders"][0]["order"]
    assert values[0] == (max(values) if higher == "true" else min(values))
    sign = 1 if higher == "true" else -1
    assert report["advantage"]["->".join(report["best"])]["value"] == sign * (values[0] - values[1]) > 0
    assert (report["metric"], report["higher_is_better"]) == ("perplexity", higher == "true")


def test_refused_orders_are_listed_with_their_reasons(folder, capsys):
    report = search(folder, WITH_FINETUNING)
    assert {tuple(entry["order"]) for entry in report["orders"]} == {
        ("prune", "tune", "quantize"),
        ("tune", "prune", "quantize"),
        ("tune", "quantize", "prune"),
    }
    assert {tuple(entry["order"]) for entry in report["refused"]} == {
        ("prune", "quantize", "tune"),
        ("quantize", "prune", "tune"),
        ("quantize", "tune", "prune"),
    }
    for refused in report["refused"]:
        (problem,) = refused["problems"]
        assert problem.startswith("stages.tune (Finetune): epochs=1 would move 14 layers (")
        assert "off the grid of stage 'quantize'. Finetune before quantizing" in problem
    printed = capsys.readouterr().out
    for refused in report["refused"]:
        assert " -> ".join(refused["order"]) in printed
        assert f": cannot run: {refused['problems'][0]}\n" in printed
    assert list(report["advantage"]) == ["prune->tune", "tune->prune"]  # of the pairs that orders can begin with


def test_no_order_can_run(folder, capsys):
    write_recipe(folder, {"Magnitude, init_args: {sparsity: 0.5}": "RTN, init_args: {bits: 3}"})
    assert run("order", "--config", "recipe.yaml") == 2
    problems = capsys.readouterr().err.splitlines()
    assert [problem.split(" (RTN): ")[0] for problem in problems] == [
        "recipe.yaml: stages.quantize",
        "recipe.yaml: stages.prune",
    ]
    assert not (folder / "run").exists()


@pytest.mark.parametrize("stop", [1, 2, 4, 9, 15])
def test_a_search_that_broke_off_goes_on_where_it_was(stop, finished, folder, applied, monkeypatch):
    whole = json.loads((finished / "order.json").read_text())
    watched = StageRunner.apply

    def broken(self, stage, node, **options):
        if len(applied) == stop - 1:
            raise Died
        return watched(self, stage, node, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StageRunner, "apply", broken)
        with pytest.raises(Died):
            search(folder, THREE)
    assert len(applied) == stop - 1
    assert not (folder / "search/order.json").exists()
    resumed = search(folder, THREE, "--ckpt_path", "last")
    assert len(applied) == 15  # none was applied again
    assert [same(e["stages"]) for e in resumed["orders"]] == [same(e["stages"]) for e in whole["orders"]]
    assert (resumed["best"], resumed["advantage"]) == (whole["best"], whole["advantage"])
    assert (folder / "search/model" / WEIGHTS).read_bytes() == (finished / "model" / WEIGHTS).read_bytes()


def test_a_finished_search_goes_on_without_doing_anything(folder, applied):
    before = search(folder)
    applied.clear()
    again = search(folder, TWO, "--ckpt_path", "last")
    assert (before.pop("applications"), again.pop("applications")) == (4, 0)
    assert again == before
    assert not applied


def test_the_order_in_the_file_does_not_matter(folder):
    forth = search(folder)
    back = search(folder, TWO, "--stage_order", "[quantize,prune]")
    assert [same(entry["stages"]) for entry in forth["orders"]] == [same(entry["stages"]) for entry in back["orders"]]
    assert forth["best"] == back["best"]


# Strategies, limits, and results that searches share.


def test_another_search_uses_what_is_known(folder, applied):
    search(folder, TWO)
    applied.clear()
    assert run("order", "--config", "recipe.yaml", "--run_dir", "second") == 0
    assert not applied
    first, second = (json.loads((folder / name / "order.json").read_text()) for name in ("search", "second"))
    assert [same(e["stages"]) for e in first["orders"]] == [same(e["stages"]) for e in second["orders"]]
    assert (folder / "search/model" / WEIGHTS).read_bytes() == (folder / "second/model" / WEIGHTS).read_bytes()
    narrower = TWO.replace("sparsity: 0.5", "sparsity: 0.5, targets: [mlp]").replace(
        "bits: 4", "bits: 4, targets: [mlp]"
    )
    assert search(folder, narrower)["applications"] == 4  # fractions are taken of other layers


@pytest.mark.parametrize(
    "option", [["--stages.prune.sparsity", "0.6"], ["--seed_everything", "7"], ["--data.calibration_samples", "2"]]
)
def test_what_decides_the_numbers_is_part_of_the_address(option, folder):
    search(folder)
    assert search(folder, TWO, *option)["applications"] == 4


def test_other_data_or_weights_have_another_address(folder):
    search(folder)
    np.save(folder / "evaluation.npy", np.roll(np.load(folder / "evaluation.npy"), 1, axis=0))
    assert search(folder)["applications"] == 4


def test_progressive_measures_the_stages_alone_and_goes_on_from_their_order(folder, applied):
    report = search(folder, THREE, "--strategy", "progressive")
    intensity = report["intensity"]
    dense = report["orders"][0]["stages"][0]["metrics"]["perplexity"]
    measured = {tuple(e["order"]): e for e in report["orders"]}
    assert set(intensity) == {"prune", "quantize", "more"}
    for order, entry in measured.items():
        assert intensity[order[0]] == pytest.approx(entry["stages"][1]["metrics"]["perplexity"] - dense)
    assert tuple(report["hypothesis"]["order"]) == tuple(sorted(intensity, key=intensity.get))
    assert tuple(report["hypothesis"]["order"]) in measured
    best = tuple(report["best"])
    for i in range(2):  # no swap of neighbours helps
        swapped = (*best[:i], best[i + 1], best[i], *best[i + 2 :])
        assert swapped in measured
    assert len(applied) == report["applications"] <= 3 + 6 * 2


def test_limits_end_a_search_with_what_there_is(folder, capsys):
    report = search(folder, THREE, "--max_runs", "2")
    assert len(report["orders"]) == 2
    assert report["notes"] == ["stopped after 2 orders: max_runs=2"]
    report = search(folder, THREE, "--time_limit", "0.00001", "--store", "another")
    assert len(report["orders"]) == 1
    assert "time_limit" in report["notes"][0]
    assert "stopped after 1 orders" in capsys.readouterr().out


def test_orders_that_lose_a_constraint_are_marked_and_can_be_left_out(folder):
    undo = TWO.replace("RTN, init_args: {bits: 4}", "BasisSharing, init_args: {ratio: 0.2, allow_undo: true}")
    assert undo != TWO
    report = search(folder, undo)
    marks = {tuple(e["order"]): e["marks"] for e in report["orders"]}
    assert "lost a constraint" in marks["prune", "quantize"]
    assert "lost a constraint" not in marks["quantize", "prune"]
    assert report["best"] == ["prune", "quantize"]
    assert report["verdict"].endswith("lost a constraint. --comparable_only true leaves such orders out.")
    assert "on disk (" in (folder / "search" / "report.md").read_text()
    report = search(folder, undo, "--comparable_only", "true")
    assert [e["order"] for e in report["orders"]] == [["quantize", "prune"]]
    assert report["left_out"] == [{"order": ["prune", "quantize"], "marks": marks["prune", "quantize"]}]
    assert "Left out: prune → quantize: " in (folder / "search" / "report.md").read_text()


def test_a_search_that_goes_on_from_anothers_model_still_has_the_dense_one(tmp_path):
    """What begins with the dense model was measured by another search, so that this one never was there itself."""

    def tree(name: str, store: str) -> PrefixTree:
        stages = {"prune": Magnitude(0.8), "quantize": RTN(2)}
        data = RunData(Regressor(), datamodule=RegressionData())
        found = PrefixTree(trainer(tmp_path / name, *stages.values()), data, stages, ResultStore(tmp_path / store))
        found.open()
        return found

    tree("other", "shared").measure(("prune",))
    second = tree("own", "shared")
    second.measure(("prune",))
    assert second.applications == 0
    second.measure(("prune", "quantize"))
    expected = tree("alone", "fresh").measure(("quantize",)).record["metrics"]
    assert second.measure(("quantize",)).record["metrics"] == expected


def test_two_processes_in_one_folder_do_nothing_twice(folder):
    write_recipe(folder, {TWO: THREE, "evaluation: ": "train: train.npy, evaluation: "})
    words = ["-m", "pqqp_lightning", "order", "--config", "recipe.yaml", "--run_dir"]
    running = [forked.start([*words, name], folder) for name in ("a", "a", "b")]
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0, 0]
    reports = [json.loads((folder / name / "order.json").read_text()) for name in ("a", "b", "a.1")]
    assert sum(report["applications"] for report in reports) == 15
    tables = [[same(e["stages"]) for e in report["orders"]] for report in reports]
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.timeout(60)
def test_run_folders_of_one_name_share_a_store_without_waiting(tmp_path):
    """a/run and b/run are two searches: only the second process in one folder has to wait."""
    store = ResultStore(tmp_path / "store")
    with (
        exclusive_run_folder(trainer(tmp_path / "a/run", RTN(4)), store, None),
        exclusive_run_folder(trainer(tmp_path / "b/run", RTN(4)), store, None),
    ):
        pass


def test_another_search_that_ends_takes_nothing_that_is_still_needed(folder):
    """It drops its dense model; one search that stands elsewhere in its tree must find its own."""

    def tree(name: str, store: str) -> PrefixTree:
        stages = {"prune": Magnitude(0.5), "round": RTN(3)}
        engine = trainer(folder / name, *stages.values())
        found = PrefixTree(
            engine, RunData(Regressor(), datamodule=RegressionData()), stages, ResultStore(folder / store)
        )
        found.open()
        return found

    mine, other = tree("mine", "store"), tree("other", "store")
    mine.measure(("prune",))
    other.measure(("prune",))
    other.drop(())
    alone = tree("alone", "store-of-its-own")
    assert mine.measure(("round",)).record["metrics"] == alone.measure(("round",)).record["metrics"]
    mine.drop(())
    assert [path.name for path in (folder / "store").glob("dense-*") if path.is_dir()] == [mine.key(())]


@pytest.fixture
def dropped(tmp_path):
    """A tree that has measured a stage that trains, and dropped its model; another in the same store; a fresh one."""

    def tree(name: str, store: str) -> PrefixTree:
        stages = {"prune": Magnitude(0.5, epochs=1), "round": RTN(3)}
        data = RunData(Regressor(), datamodule=RegressionData())
        found = PrefixTree(trainer(tmp_path / name, *stages.values()), data, stages, ResultStore(tmp_path / store))
        found.open()
        return found

    first = tree("first", "store")
    first.measure(("prune",))
    first.drop(("prune",))
    return tree("second", "store"), tree("third", "store"), tree("alone", "fresh")


def test_a_dropped_model_is_made_again_without_measuring_it_again(dropped, monkeypatch):
    second, _, alone = dropped
    evaluations, evaluate = [], StageRunner.evaluate
    monkeypatch.setattr(StageRunner, "evaluate", lambda *given: evaluations.append(1) or evaluate(*given))
    again = second.measure(("prune", "round"))
    assert len(evaluations) == 1  # of what is new
    alone.measure(("prune",))
    assert again.record["metrics"] == alone.measure(("prune", "round")).record["metrics"]


def test_a_search_killed_while_it_trains_a_dropped_model_again_leaves_no_untrained_one(dropped, monkeypatch):
    second, third, alone = dropped

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pqqp_lightning.runs.stage_runner.train_segment", killed)
        with pytest.raises(KeyboardInterrupt):
            second.measure(("prune", "round"))
    assert not third.has_model(("prune",))
    alone.measure(("prune",))
    expected = alone.measure(("prune", "round")).record["metrics"]
    assert third.measure(("prune", "round")).record["metrics"] == expected


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_killed_at_random_moments_the_search_ends_with_the_same_table(seed, finished, folder):
    write_recipe(folder, {TWO: THREE, "evaluation: ": "train: train.npy, evaluation: "})
    words = ["-m", "pqqp_lightning", "order", "--config", "recipe.yaml", "--run_dir", "search"]
    run_with_kills(words, folder, seed, kills=4, longest=6)
    whole, resumed = (json.loads((f / "order.json").read_text()) for f in (finished, folder / "search"))
    assert [same(e["stages"]) for e in resumed["orders"]] == [same(e["stages"]) for e in whole["orders"]]
    assert (resumed["best"], resumed["advantage"]) == (whole["best"], whole["advantage"])
    assert (folder / "search/model" / WEIGHTS).read_bytes() == (finished / "model" / WEIGHTS).read_bytes()


# From Python, with a module and data of one's own.


def regression_search(folder: Path, *stages, **options) -> dict:
    search_orders(trainer(folder, *stages), Regressor(), RegressionData(), OrderOptions(**options))
    return json.loads((folder / "order.json").read_text())


def test_a_module_of_ones_own(folder):
    report = regression_search(folder / "run", Magnitude(0.5), RTN(3))
    assert (report["metric"], report["higher_is_better"]) == ("mse", False)
    assert {tuple(entry["order"]) for entry in report["orders"]} == {("magnitude", "rtn"), ("rtn", "magnitude")}


def test_a_metric_whose_direction_is_unknown(folder, monkeypatch):
    seen = []

    def validation_step(self, batch, batch_idx):
        seen.append(batch_idx)
        self.log("oddness", self(batch[0]).sum())

    monkeypatch.setattr(Regressor, "validation_step", validation_step)
    words = "metric='oddness' is unknown: higher values may be better or worse"
    with pytest.raises(RecipeError, match=words):
        regression_search(folder / "run", Magnitude(0.5), RTN(3))
    assert seen == [0]  # and not a whole evaluation
    assert not (folder / "run/run.json").exists()
    assert regression_search(folder / "run", Magnitude(0.5), RTN(3), higher_is_better=True)["higher_is_better"] is True


@pytest.mark.parametrize("count", [1, 5])
def test_two_to_four_stages(count, folder):
    with pytest.raises(RecipeError, match=f"order needs 2 to 4 stages, but the recipe has {count}"):
        regression_search(folder / "run", *[Magnitude(0.1 * (i + 1)) for i in range(count)])


def test_four_stages(folder, applied):
    stages = [Magnitude(0.1 * (i + 3)) for i in range(3)]
    report = regression_search(folder / "run", *stages, RTN(4))
    assert len(report["orders"]) == 24
    assert len(applied) == 4 + 12 + 24 + 24


def test_the_earlier_search_is_moved_aside(folder):
    first = search(folder)
    search(folder, TWO, "--seed_everything", "3")
    assert json.loads((folder / "search.1/order.json").read_text()) == first


def test_repeats_are_the_same_orders_with_other_calibration_samples(folder, capsys):
    three = "{class_path: SparseGPT, init_args: {sparsity: 0.5}}"
    files = "{calibration: calibration.npy, evaluation: evaluation.npy"
    changed = {"{class_path: Magnitude, init_args: {sparsity: 0.5}}": three, files: f"{files}, calibration_samples: 2"}
    write_recipe(folder, changed)
    assert run("order", "--config", "recipe.yaml", "--run_dir", "search", "--repeats", "3") == 0
    printed = capsys.readouterr().out
    report = json.loads((folder / "search/order.json").read_text())
    repeats = report["repeats"]
    assert repeats["seeds"] == [0, 1, 2]
    assert repeats["verdict"] in printed.replace("\n", " ")
    for entry in repeats["orders"]:
        expected = []
        for seed in repeats["seeds"]:
            seeded = ["--data.calibration_samples", "2", "--data.seed", str(seed), "--run_dir", f"plain-{seed}"]
            order = f"[{','.join(entry['order'])}]"
            assert run("fit", "--config", "recipe.yaml", *seeded, "--stage_order", order) == 0
            plain = json.loads((folder / f"plain-{seed}/report.json").read_text())
            expected.append(plain["stages"][-1]["metrics"]["perplexity"])
        assert entry["values"] == expected
        assert len(set(expected)) > 1
    assert len(list((folder / "store").glob("*/model"))) == 1  # the best one's alone
    again = run("order", "--config", "recipe.yaml", "--run_dir", "again", "--repeats", "3")
    assert again == 0
    assert json.loads((folder / "again/order.json").read_text())["repeats"] == repeats
    short = ["--run_dir", "short", "--store", "another", "--repeats", "3", "--time_limit", "0.00001"]
    assert run("order", "--config", "recipe.yaml", *short) == 0
    report = json.loads((folder / "short/order.json").read_text())
    assert report["repeats"]["seeds"] == [0]
    assert report["notes"][-1].startswith("stopped after 1 of 3 draws: time_limit=1e-05 minutes")


@pytest.mark.parametrize(
    ("replaced", "count", "words"),
    [
        ({}, "0", "repeats=0 measures nothing"),
        ({}, "2", "no stage reads calibration samples"),
        ({"class_path: Magnitude": "class_path: Wanda"}, "2", "every draw has the same calibration samples"),
    ],
)
def test_repeats_that_say_nothing_are_refused(folder, capsys, replaced, count, words):
    write_recipe(folder, replaced)
    assert run("order", "--config", "recipe.yaml", "--run_dir", "search", "--repeats", count) == 2
    assert words in capsys.readouterr().err
    assert not (folder / "search").exists()
