"""``--executor ray``: what Ray's tasks measure is what this process would have, whoever is killed on the way."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from command_line import RECIPE, prepare, run, write_recipe
from interrupt import run_with_kills
from tiny import RegressionData, Regressor, trainer

from pqqp_lightning.callbacks import RTN, Magnitude
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.experiments import OrderOptions, search_orders
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.storage.result_store import ResultStore
from pqqp_lightning.storage.run_folder import WEIGHTS
from pqqp_lightning.trials import executors as executor
from pqqp_lightning.trials.prefix_tree import PrefixTree

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "pqqp-lightning[ray]"')

from pqqp_lightning.trials import ray_executor as executor_ray  # noqa: E402
from pqqp_lightning.trials import ray_worker  # noqa: E402

STAGES = RECIPE[RECIPE.index("stages:") :]
WITH_TRAINING = """\
stages:
  prune: {class_path: SparseGPT, init_args: {sparsity: 0.5}}
  tune: {class_path: Finetune, init_args: {epochs: 1, learning_rate: 0.01}}
  quantize: {class_path: GPTQ, init_args: {bits: 3}}
"""
MINE = """\
import os
import signal
from pathlib import Path

from pqqp_lightning.callbacks import RTN
from pqqp_lightning.errors import RecipeError


class Mine(RTN):
    def compress(self, model, context):
        if Path("refuse").exists():
            raise RecipeError("stages.quantize (Mine): does not want to. Take it out.")
        if os.getpid() != int(Path("driver").read_text()) and not Path("killed").exists():
            Path("once").rename("killed") if Path("once").exists() else None
            os.kill(os.getpid(), signal.SIGKILL)
        return super().compress(model, context)
"""
pytestmark = pytest.mark.xdist_group("ray")  # one process, and so one Ray, for all of them
DIFFERENT = {"elapsed_s", "peak_memory_bytes", "hardware"}
"""What two runs of the same may differ in."""


@pytest.fixture(scope="module", autouse=True)
def _ray():
    """One Ray for the module, so that its processes import torch once; the kills start Rays of their own."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return prepare(tmp_path, monkeypatch)


@pytest.fixture
def own_stage(folder):
    """A recipe with a stage in the working folder, whose first task is killed in the middle."""
    (folder / "mine.py").write_text(MINE)
    (folder / "driver").write_text(str(os.getpid()))
    (folder / "once").touch()
    write_recipe(folder, {"RTN": "Mine"})
    return folder


def plain(value):
    """A report without what two runs of the same may differ in."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if key not in DIFFERENT}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def both(folder: Path, command: str, *arguments: str) -> tuple[dict, dict]:
    """The reports of this process and of Ray, each with a store of its own."""
    reports = []
    for name in ("local", "ray"):
        words = ["--config", "recipe.yaml", "--run_dir", f"{name}/search", "--executor", name, *arguments]
        assert run(command, *words) == 0
        reports.append(plain(json.loads((folder / name / f"search/{command}.json").read_text())))
    return reports[0], reports[1]


def models(folder: Path) -> list[str]:
    return [path.parent.name.rpartition("-")[0] for path in folder.glob("store/*/model")]


def test_an_order_is_the_same_bit_for_bit(folder):
    write_recipe(folder, {STAGES: WITH_TRAINING, "evaluation: ": "train: train.npy, evaluation: "})
    local, remote = both(folder, "order")
    assert remote == local
    assert local["applications"] == 8
    weights = [(folder / name / "search/model" / WEIGHTS).read_bytes() for name in ("local", "ray")]
    assert weights[0] == weights[1]
    assert models(folder / "ray") == models(folder / "local") == ["+".join(local["best"])]


def test_a_search_is_the_same_bit_for_bit(folder):
    space = ["--space.prune.sparsity", "[0.5,0.8]", "--space.quantize.bits", "[4,3]", "--target_rate", "2.2"]
    local, remote = both(folder, "search", *space, "--at_once", "2", "--stop_early", "false", "--trials", "4")
    assert remote == local
    assert len(local["trials"]) == 4
    assert models(folder / "ray") == models(folder / "local")


def test_a_sweep_is_the_same_bit_for_bit(folder):
    local, remote = both(folder, "sweep", "--grid.prune.sparsity", "[0.5,0.8]", "--grid.quantize.bits", "[4,3]")
    assert remote == local
    assert local["applications"] == 2 + 2 + 2 * 2 * 2
    assert models(folder / "ray") == []
    tables = [(folder / name / "search/sweep.csv").read_text() for name in ("local", "ray")]
    assert tables[0] == tables[1]


def test_a_worker_that_is_killed_in_the_middle_is_made_up_for(own_stage, capsys):
    local, remote = both(own_stage, "order")
    assert (own_stage / "killed").exists()
    assert capsys.readouterr().out.count("ray: a worker was lost; ") == 1
    assert remote == local
    assert remote["applications"] == 4


def test_a_result_that_a_lost_worker_left_is_counted_once(folder):
    tree = PrefixTree(
        trainer(folder / "run", Magnitude(0.5)),
        RunData(Regressor(), datamodule=RegressionData()),
        {"prune": Magnitude(0.5)},
        ResultStore(folder / "store"),
    )
    tree.open()
    settings = ray_worker.read_settings("counted", tree.base)
    ray_worker._trees["counted"] = tree
    done = [ray_worker.run_node(settings, [], ("prune",), False, again) for again in (False, False, True)]
    assert [outcome.applications for outcome in done] == [1, 0, 1]


@pytest.mark.long  # the test of one lost worker is quicker
def test_a_node_that_kills_every_worker_ends_the_search(own_stage, monkeypatch, capsys):
    monkeypatch.setattr(executor_ray, "MAX_LOST_WORKERS", 2)
    (own_stage / "once").unlink()
    assert run("order", "--config", "recipe.yaml", "--executor", "ray") == 2
    (problem,) = capsys.readouterr().err.splitlines()
    assert problem.startswith("command line: executor='ray' lost 2 workers over ")
    assert "quantize: The worker died unexpectedly" in problem
    assert "or use --executor local." in problem


def test_what_a_stage_refuses_on_the_way_is_said_as_ever(own_stage, capsys):
    (own_stage / "refuse").touch()
    assert run("order", "--config", "recipe.yaml", "--executor", "ray") == 2
    assert capsys.readouterr().err == "recipe.yaml: stages.quantize (Mine): does not want to. Take it out.\n"


def test_progressive_and_limits_with_a_module_of_ones_own(folder, capsys):
    """The module is in a file that this process has on its path, and the workers not on theirs."""

    def search(name: str, **options) -> dict:
        stages = [Magnitude(0.5), RTN(3), Magnitude(0.7, targets=["blocks.0"])]
        engine = trainer(folder / name / "run", *stages, enable_progress_bar=True)
        search_orders(engine, Regressor(), RegressionData(), OrderOptions(**options))
        return plain(json.loads((folder / name / "run/order.json").read_text()))

    options = {"strategy": "progressive", "max_runs": 2}
    heeded = signal.getsignal(signal.SIGTERM)
    assert search("ray", executor="ray", **options) == search("local", **options)
    assert signal.getsignal(signal.SIGTERM) == heeded  # Ray would take it, and end the process with 15
    printed = capsys.readouterr().out
    assert "ray: 2 at a time, each with " in printed
    assert "order: magnitude measured; at most " in printed
    late = search("late", executor="ray", time_limit=1e-6)
    assert 1 <= len(late["orders"]) < 6
    assert late["notes"] == [f"stopped after {len(late['orders'])} orders: time_limit=1e-06 minutes"]


def test_a_worker_that_would_measure_something_else_is_refused(folder, monkeypatch):
    monkeypatch.setattr(
        executor_ray, "read_settings", lambda search, base: ray_worker.read_settings(search, ("another", ""))
    )
    engine = trainer(folder / "run", Magnitude(0.5), RTN(3))
    with pytest.raises(RecipeError, match="needs the same model, data, packages and code on every machine"):
        search_orders(engine, Regressor(), RegressionData(), OrderOptions(executor="ray"))


def test_what_cannot_be_sent_is_refused_before_any_work(folder):
    data = RegressionData()
    data.lock = threading.Lock()
    engine = trainer(folder / "run", Magnitude(0.5), RTN(3))
    with pytest.raises(RecipeError, match="executor='ray' cannot send the model, data or trainer to other processes"):
        search_orders(engine, Regressor(), data, OrderOptions(executor="ray"))
    assert not list(folder.glob("store/*/record.json"))


@pytest.mark.parametrize("command", ["order", "sweep"])
def test_bad_executors(command, folder, monkeypatch, capsys):
    words = [command, "--config", "recipe.yaml", *(["--grid.quantize.bits", "[4]"] if command == "sweep" else [])]
    assert run(*words, "--executor", "rey") == 2
    assert capsys.readouterr().err == "command line: executor='rey' is unknown. Did you mean 'ray'?\n"
    assert run(*words, "--executor", "ray", "--trainer.devices", "2") == 2
    assert "executor='ray' gives every task one device, but the trainer has 2 with" in capsys.readouterr().err
    monkeypatch.setattr(executor, "find_spec", lambda name: None if name == "ray" else importlib.util.find_spec(name))
    assert run(*words, "--executor", "ray") == 2
    assert capsys.readouterr().err == (
        "command line: executor='ray' needs Ray, which is not installed. "
        'Run pip install "pqqp-lightning[ray]", or use --executor local.\n'
    )
    assert not (folder / "run").exists()


def test_a_cluster_that_is_not_there(folder, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert run("order", "--config", "recipe.yaml", "--executor", "ray") == 2
    (problem,) = capsys.readouterr().err.splitlines()
    assert (
        "executor='ray' cannot reach or start Ray (RAY_ADDRESS=127.0.0.1:1): [Errno 111] Connection refused." in problem
    )
    assert not (folder / "run").exists()
    assert not list(folder.glob("store/*/record.json"))


def test_ray_is_imported_where_it_is_asked_for(folder):
    text = "import sys, pqqp_lightning.cli.commands; sys.exit('ray' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", text]) == 0


@pytest.mark.long  # a worker that is killed, above, and a killed search without Ray, in test_resume.py, are quicker
@pytest.mark.parametrize("command", ["order", "sweep"])
def test_a_driver_that_is_killed_again_and_again_ends_with_the_same_table(command, folder):
    """And no process of Ray's outlives it, which run_with_kills sees to."""
    grid = ["--grid.prune.sparsity", "[0.5,0.8]"] if command == "sweep" else []
    words = ["--config", "recipe.yaml", *grid]
    assert run(command, *words, "--run_dir", "local/search") == 0
    ours = ["-m", "pqqp_lightning", command, *words, "--run_dir", "ray/search", "--executor", "ray"]
    run_with_kills(ours, folder, seed=1, kills=3, longest=12)
    reports = [plain(json.loads((folder / n / f"search/{command}.json").read_text())) for n in ("local", "ray")]
    for report in reports:
        del report["applications"]  # of the last run alone
    assert reports[0] == reports[1]
