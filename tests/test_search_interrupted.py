"""``search`` that is killed again and again, or started twice in one run folder, ends as if undisturbed."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import forked
import numpy as np
import pytest
from command_line import prepare, run
from interrupt import kill
from test_search import same

from pqqp_lightning.storage.result_store import RECORD
from pqqp_lightning.storage.run_folder import WEIGHTS

SEARCH = ["search", "--config", "recipe.yaml", "--space.prune.optional", "true", "--target_rate", "1.8"]
SPACE = ["--space.prune.sparsity", "[0.3,0.4,0.5,0.6,0.7,0.8]", "--space.quantize.bits", "[2,3,4,8]"]
MOST_NEW = 2
"""Results that a search may write before it is killed."""
LONGEST_S = 0.7
"""A kill comes at most so long after the last of these results."""
GIVE_UP_S = 300


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    prepare(tmp_path, monkeypatch)
    # enough samples for a pipeline to be stopped early
    np.save(tmp_path / "evaluation.npy", np.random.default_rng(0).integers(0, 300, (64, 16)).astype("int32"))
    return tmp_path


def results(folder: Path) -> int:
    """How many results the store has."""
    return len(list(folder.glob(f"store/*/{RECORD}")))


def kill_again_and_again(words: list[str], folder: Path, seed: int, kills: int) -> None:
    """Start the search ``kills`` times, and kill it once it has written a few results more; then let it end."""
    chance = random.Random(seed)
    for _ in range(kills):
        enough = results(folder) + chance.randint(0, MOST_NEW)
        resumes = chance.random() < 0.5 and (folder / "killed/run.json").is_file()
        process = forked.start([*words, *(["--ckpt_path", "last"] if resumes else [])], folder)
        until = time.monotonic() + GIVE_UP_S
        while results(folder) < enough and process.exitcode is None:
            assert time.monotonic() < until, "no result"
            time.sleep(0.02)
        process.join(chance.random() * LONGEST_S)
        assert process.exitcode is None, "ended before it was killed"
        kill(process)
    process = forked.start([*words, "--ckpt_path", "last"], folder)
    process.join()
    assert process.exitcode == 0


@pytest.mark.long  # in test_search.py resuming a search that came to its end is quicker
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("executor", "kills"), [("local", 20), ("ray", 5)])  # Ray takes long to start
def test_killed_again_and_again_the_search_ends_with_the_same_front(executor, kills, folder):
    if executor == "ray":
        pytest.importorskip("ray", reason='Ray is not installed: pip install "pqqp-lightning[ray]"')
    words = [*SEARCH, *SPACE, "--trials", "30"]
    # evaluations with Ray are never stopped early
    words += ["--at_once", "1"] if executor == "local" else ["--at_once", "4", "--stop_early", "false"]
    assert run(*words, "--run_dir", "undisturbed", "--store", "other") == 0
    ours = ["-m", "pqqp_lightning", *words, "--run_dir", "killed", "--executor", executor]
    kill_again_and_again(ours, folder, seed=0, kills=kills)
    reports = [json.loads((folder / name / "search.json").read_text()) for name in ("undisturbed", "killed")]
    assert same(reports[0]) == same(reports[1])
    weights = [(folder / name / "model" / WEIGHTS).read_bytes() for name in ("undisturbed", "killed")]
    assert weights[0] == weights[1]
    recipes = [(folder / name / "best.yaml").read_text() for name in ("undisturbed", "killed")]
    assert recipes[0] == recipes[1]


def test_two_processes_in_one_folder_do_nothing_twice(folder):
    words = ["-m", "pqqp_lightning", *SEARCH, *SPACE, "--trials", "4", "--stop_early", "false", "--run_dir"]
    running = [forked.start([*words, name], folder) for name in ("a", "a", "b")]
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0, 0]
    reports = [json.loads((folder / name / "search.json").read_text()) for name in ("a", "b", "a.1")]
    assert same(reports[0]) == same(reports[1]) == same(reports[2])
    assert sum(report["applications"] for report in reports) == reports[0]["trials"][-1]["applications"]
