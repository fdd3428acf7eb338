"""``sweep``: every point of a grid in both orders, what it shares with ``order``, and what it says of the pair."""

from __future__ import annotations

import csv
import html
import json
from itertools import pairwise, product
from pathlib import Path

import pytest
from command_line import RECIPE, prepare, run, write_recipe
from interrupt import Died
from tiny import RegressionData, Regressor, trainer

from pqqp_lightning.callbacks import RTN, Magnitude
from pqqp_lightning.cli.settings import Setting, merged_section, without_section
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.experiments import SweepOptions, sweep_grid
from pqqp_lightning.runs.stage_runner import StageRunner

TWO = RECIPE[RECIPE.index("stages:") :]
GRID = ["--grid.prune.sparsity", "[0.5,0.8]", "--grid.quantize.bits", "[8,4,3]"]
ORDERS = (["prune", "quantize"], ["quantize", "prune"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return prepare(tmp_path, monkeypatch)


@pytest.fixture
def applied(monkeypatch):
    """The address of every result, in the order in which stages were applied; none comes twice."""
    nodes: list[str] = []
    apply = StageRunner.apply

    def watch(self, stage, folder, **options):
        record = apply(self, stage, folder, **options)
        if folder.name == "model":  # in the store
            assert folder.parent.name not in nodes
            nodes.append(folder.parent.name)
        return record

    monkeypatch.setattr(StageRunner, "apply", watch)
    return nodes


def sweep(folder: Path, *arguments: str, grid: list[str] = GRID) -> dict:
    assert run("sweep", "--config", "recipe.yaml", "--run_dir", "sweep", *grid, *arguments) == 0
    return json.loads((folder / "sweep/sweep.json").read_text())


def rows(folder: Path, name: str = "sweep") -> list[dict[str, str]]:
    with (folder / f"sweep/{name}.csv").open() as file:
        return list(csv.DictReader(file))


def numbers(report: dict) -> list:
    """What two sweeps of the same must agree in."""
    return [[[order["order"], order["record"]["metrics"]] for order in point["orders"]] for point in report["points"]]


def test_every_point_is_what_plain_fits_give(folder, applied):
    report = sweep(folder)
    assert len(applied) == report["applications"] == 2 + 3 + 2 * 3 * 2
    assert [point["knobs"] for point in report["points"]] == [
        {"prune": {"sparsity": s}, "quantize": {"bits": b}} for s, b in product([0.5, 0.8], [8, 4, 3])
    ]
    point = report["points"][4]
    arguments = ["--stages.prune.sparsity", "0.8", "--stages.quantize.bits", "4", "--run_dir", "plain"]
    for order in ORDERS:
        assert run("fit", "--config", "recipe.yaml", *arguments, "--stage_order", f"[{','.join(order)}]") == 0
        expected = json.loads((folder / "plain/report.json").read_text())["stages"][-1]
        found = next(entry["record"] for entry in point["orders"] if entry["order"] == order)
        for name in ("metrics", "options", "size_bytes", "sparsity", "nominal_rate", "notes"):
            assert found[name] == expected[name]


def test_advantage_gap_and_ratios_are_by_their_definitions(folder):
    report = sweep(folder, "--curve_bits", "[6,5]")
    score = {entry["step"]: -entry["record"]["metrics"]["perplexity"] for entry in report["alone"]}
    dense = -report["dense"]["metrics"]["perplexity"]
    curve = [(1.0, dense)] + [(32 / b, score[f"quantize[bits={b}]"]) for b in (8, 6, 5, 4, 3)]
    for row in rows(folder):
        p, q = float(row["prune.sparsity"]), int(row["quantize.bits"])
        m = {name: float(row[f"M({name})"]) for name in ("prune", "quantize", "prune->quantize", "quantize->prune")}
        assert float(row["A(quantize->prune)"]) == m["quantize->prune"] - m["prune->quantize"]
        assert float(row["A low"]) < float(row["A(quantize->prune)"]) < float(row["A high"])
        assert float(row["G(quantize,prune)"]) == m["quantize"] - m["prune"]
        assert (m["prune"], m["quantize"]) == (score[f"prune[sparsity={p}]"], score[f"quantize[bits={q}]"])
        assert float(row["C_prune"]) == pytest.approx(1 / (1 - p), rel=1e-2)  # rounded to whole weights of a layer
        assert float(row["C_quantize"]) == pytest.approx(32 / q)
        if row["C*_prune"]:
            ratio = float(row["C*_prune"])
            (c0, m0), (c1, m1) = next((a, b) for a, b in pairwise(curve) if a[0] <= ratio <= b[0])
            assert m0 + (ratio - c0) / (c1 - c0) * (m1 - m0) == pytest.approx(m["prune"])
            assert float(row["C*_prune - C_quantize"]) == pytest.approx(ratio - 32 / q)
        else:
            assert row["C*_prune beyond the curve"] == "below"
            assert m["prune"] < curve[-1][1]
    drawn = [(float(row["C"]), float(row["M"])) for row in rows(folder, "curve")]
    assert drawn == [pytest.approx(point) for point in curve]


def test_the_figures_are_pictures(folder):
    report = sweep(folder)
    assert report["figures"] == ["curve.png", "advantage.png"]
    for name in report["figures"]:
        assert (folder / "sweep" / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_after_an_order_nothing_is_computed_twice_and_back(folder, applied):
    assert run("order", "--config", "recipe.yaml", "--run_dir", "search") == 0
    assert len(applied) == 4
    one = sweep(folder, grid=["--grid.prune.sparsity", "[0.5]", "--grid.quantize.bits", "[4]"])
    assert (one["applications"], len(applied)) == (0, 4)
    order = json.loads((folder / "search/order.json").read_text())
    advantage = {"value": order["advantage"]["quantize->prune"]["value"]}
    assert one["points"][0]["pair"]["advantage"] | advantage == one["points"][0]["pair"]["advantage"]


def test_a_wider_sweep_adds_only_what_is_new(folder, capsys):
    sweep(folder, grid=["--grid.prune.sparsity", "[0.5]", "--grid.quantize.bits", "[4]"])
    capsys.readouterr()
    wider = sweep(folder)
    # 13 results that nobody has measured, and two models that they go on from and that were dropped
    assert wider["applications"] == 17 - 4 + 2
    printed = capsys.readouterr().out
    assert "sweep: 6 points, 12 orders, 17 results, 4 of them already measured: 15 stage applications\n" in printed
    again = sweep(folder)
    assert again["applications"] == 0
    assert numbers(again) == numbers(wider)


@pytest.mark.parametrize("stop", [1, 4, 9, 17])
def test_after_a_kill_the_same_command_goes_on(stop, folder, applied, monkeypatch):
    watched = StageRunner.apply

    def broken(self, stage, node, **options):
        if len(applied) == stop - 1:
            raise Died
        return watched(self, stage, node, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StageRunner, "apply", broken)
        with pytest.raises(Died):
            sweep(folder)
    assert not (folder / "sweep/sweep.json").exists()
    resumed = sweep(folder, *(["--ckpt_path", "last"] if stop == 4 else []))
    assert len(applied) == 17
    assert resumed["applications"] == 17 - (stop - 1)
    assert resumed["status"] == "finished"


def test_no_model_is_left_in_the_store(folder):
    sweep(folder)
    assert not list((folder / "store").glob("*/model"))
    assert len(list((folder / "store").glob("*/record.json"))) == 18


def test_a_time_limit_ends_it_with_what_there_is(folder, capsys):
    report = sweep(folder, "--time_limit", "0.0000001")
    assert report["status"] == "stopped"
    assert report["notes"][0] == "stopped at time_limit=1e-07 minutes: 15 of 15 sequences of stages not measured"
    assert all(row["A(quantize->prune)"] == "" for row in rows(folder))
    assert "The sweep is not finished. Run the same command again" in capsys.readouterr().out
    whole = sweep(folder)
    assert whole["status"] == "finished"
    assert all(row["A(quantize->prune)"] for row in rows(folder))


def test_report_prints_it_again(folder, capsys):
    sweep(folder)
    first = capsys.readouterr().out
    assert run("report", "sweep") == 0
    printed, _, last = capsys.readouterr().out.partition("sweep/report.html")
    assert printed in first
    assert "sweep/report.md: as text." in last
    page, text = ((folder / "sweep" / name).read_text() for name in ("report.html", "report.md"))
    for words in (
        "A(quantize-&gt;prune)",
        "prune[sparsity=0.8],",
        "quantize[bits=3]",
        "bits 4",
        "8.00x",
        "curve.png",
        "in -perplexity",
    ):
        assert words in page
    assert "No evidence that A(quantize->prune) grows with G(quantize, prune)" in text.replace("\\", "")
    assert "Spearman" in printed
    assert "sweep: sweep.csv, curve.csv, curve.png, advantage.png\n" in printed


def test_the_grid_may_stand_in_the_recipe_and_the_resolved_one_runs_again(folder):
    grid = "grid: {prune: {sparsity: [0.5, 0.8]}, quantize: {bits: [8, 4, 3]}}\n"
    write_recipe(folder, {"run_dir: run\n": f"run_dir: run\n{grid}"})
    first = sweep(folder, grid=[])
    assert run("sweep", "--config", "sweep/recipe.yaml", "--run_dir", "again") == 0
    again = json.loads((folder / "again/sweep.json").read_text())
    assert (first["applications"], again["applications"]) == (17, 0)
    assert numbers(first) == numbers(again)
    narrower = sweep(folder, grid=["--grid.prune.sparsity", "[0.5]"])
    assert len(narrower["points"]) == 3


def test_settings_of_one_section_are_merged_key_by_key():
    given = {"grid": {"p": {"s": [1]}, "q": {"b": [1], "g": [2]}}, "grid.q.b": [8], "grid.r.x": [3], "other.p": 1}
    settings = [Setting("somewhere", key, value) for key, value in given.items()]
    assert merged_section(settings, "grid") == {"p": {"s": [1]}, "q": {"b": [8], "g": [2]}, "r": {"x": [3]}}
    again = [*settings, Setting("command line", "grid", {"p": {"s": [2]}})]
    assert merged_section(again, "grid") == {"p": {"s": [2]}}
    assert given["grid"]["q"]["b"] == [1]
    words = "-c a.yaml --grid.p.s [1] --x=2 --grid={} --flag --grid.r.x --run_dir r stray"
    assert " ".join(without_section(words.split(), "grid")) == "-c a.yaml --x=2 --flag --grid.r.x --run_dir r stray"


def test_bits_that_the_grid_has_are_not_on_the_curve_twice(folder):
    report = sweep(folder, "--curve_bits", "[8,4]", grid=["--grid.prune.sparsity", "[0.5,0.8]"])
    (curve,) = report["curves"]
    assert [point["rate"] for point in curve["points"]] == [1, 4, 8]
    assert report["quantizing"] == "quantize"
    assert report["applications"] == 2 + 2 + 2 * 2


def test_a_grid_in_another_sweeps_folder(folder, capsys):
    sweep(folder, grid=["--grid.quantize.bits", "[4]"])
    words = ["--config", "recipe.yaml", "--run_dir", "sweep", "--ckpt_path", "last"]
    assert run("sweep", *words, "--grid.quantize.bits", "[3]") == 2
    assert "holds a run of another recipe: grid.quantize.bits is [4] there and [3] here." in capsys.readouterr().err


def test_its_folder_is_named_after_the_recipe(folder):
    write_recipe(folder, {"run_dir: run\n": ""}, "small.yaml")
    assert run("sweep", "--config", "small.yaml", "--grid.quantize.bits", "[4]") == 0
    assert (folder / "runs/small-sweep/sweep.json").is_file()
    assert (folder / "runs/store").is_dir()


def test_each_choice_of_other_arguments_has_a_curve_of_its_own(folder):
    report = sweep(folder, grid=["--grid.quantize.bits", "[4,3]", "--grid.quantize.group_size", "[32,channel]"])
    curves = {curve["label"]: curve["points"] for curve in report["curves"]}
    assert list(curves) == ["group_size=32", "group_size=channel"]
    assert all([point["rate"] for point in points] == pytest.approx([1, 8, 32 / 3]) for points in curves.values())
    assert len(report["points"]) == 4


def test_three_stages_are_measured_in_all_orders_without_a_pair(folder, capsys):
    write_recipe(
        folder,
        {
            TWO: TWO + "  tune: {class_path: Finetune, init_args: {epochs: 1}}\n",
            ": evaluation.npy": ": evaluation.npy, train: train.npy",
        },
    )
    report = sweep(folder, grid=["--grid.tune.learning_rate", "[0.01,0.001]"])
    assert "hypothesis" not in report
    assert [len(point["orders"]) for point in report["points"]] == [3, 3]
    assert [len(point["refused"]) for point in report["points"]] == [3, 3]
    printed = capsys.readouterr().out
    assert "tune -> prune -> quantize" in printed or "prune -> tune -> quantize" in printed
    assert "cannot run: stages.tune (Finetune): epochs=1 would move" in printed
    assert run("report", "sweep") == 0
    assert "best order" in (folder / "sweep/report.html").read_text()
    (first, _) = rows(folder)
    assert first["tune.learning_rate"] == "0.01"
    assert first["M(prune->tune->quantize)"]


def test_a_stage_that_stays_last_ends_both_orders(folder):
    grid = ["--grid.prune.sparsity", "[0.5,0.8]", "--grid.quantize.bits", "[4]"]
    report = sweep(folder, "--stages.polish", "Polish", "--last", "[polish]", grid=grid)
    for point in report["points"]:
        metrics = {"->".join(order["order"]): order["record"]["metrics"] for order in point["orders"]}
        assert metrics.keys() == {"prune->quantize->polish", "quantize->prune->polish"}
        there, back = (metrics[order]["perplexity"] for order in ("quantize->prune->polish", "prune->quantize->polish"))
        assert point["pair"]["advantage"]["value"] == pytest.approx(back - there)
        assert not point["refused"]
    assert report["hypothesis"]["advantage"] == "A(quantize->prune)"
    assert "prune -> quantize -> polish" in html.unescape((folder / "sweep/report.html").read_text())


@pytest.mark.parametrize(("last", "reason"), [("[polsh]", "Did you mean"), ("[polish,polish]", "names polish twice")])
def test_what_stays_last_must_be_a_stage(folder, capsys, last, reason):
    grid = ["--grid.prune.sparsity", "[0.5,0.8]"]
    arguments = ["--run_dir", "sweep", *grid, "--stages.polish", "Polish", "--last", last]
    assert run("sweep", "--config", "recipe.yaml", *arguments) == 2
    assert reason in capsys.readouterr().err
    assert not (folder / "sweep").exists()


def test_one_stage_alone(folder):
    write_recipe(folder, {RECIPE[RECIPE.index("  quantize:") :]: ""})
    report = sweep(folder, grid=["--grid.prune.sparsity", "[0.2,0.4]"])
    assert [entry["knobs"] for entry in report["alone"]] == [{"sparsity": 0.2}, {"sparsity": 0.4}]
    dense = report["dense"]["metrics"]["perplexity"]
    for entry in report["alone"]:
        assert entry["intensity"] == entry["record"]["metrics"]["perplexity"] - dense


def test_from_python_with_a_module_of_ones_own(folder):
    grid = {"magnitude": {"sparsity": [0.3, 0.6]}, "rtn": {"bits": [4, 2]}}
    stages = (Magnitude(0.5), RTN(3))
    sweep_grid(trainer(folder / "sweep", *stages), Regressor(), RegressionData(), SweepOptions(grid=grid))
    report = json.loads((folder / "sweep/sweep.json").read_text())
    assert (report["metric"], report["higher_is_better"]) == ("mse", False)
    assert (report["pruning"], report["quantizing"]) == ("magnitude", "rtn")
    assert report["hypothesis"]["gap"]["points"] == 4
    assert (stages[0].sparsity, stages[1].bits) == (0.5, 3)  # the user's own stages stay as they are


def test_points_that_can_run_in_no_order_are_refused(folder):
    grid = {"rtn": {"group_size": [4, 3]}}
    engine = trainer(folder / "sweep", Magnitude(0.5), RTN(3))
    with pytest.raises(RecipeError) as caught:
        sweep_grid(engine, Regressor(), RegressionData(), SweepOptions(grid=grid))
    for problem, width in zip(caught.value.problems, (8, 16), strict=True):
        assert (problem.key, problem.value) == ("grid.rtn.group_size", 3)
        assert str(problem).startswith(f"grid.rtn (RTN): group_size=3 does not divide in_features={width} of")
    assert not (folder / "sweep").exists()
