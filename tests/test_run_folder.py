"""What lies in a run folder: nothing of the user's is overwritten, and what is there can be used and repaired."""

import json

import pytest
from command_line import prepare, run, write_recipe

from pqqp_lightning.errors import RecipeError
from pqqp_lightning.storage.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return prepare(tmp_path, monkeypatch)


@pytest.mark.parametrize("command", ["fit", "order"])
@pytest.mark.parametrize("name", ["recipe.yaml", "model/config.json", "notes.txt"])
def test_files_of_the_users_are_neither_overwritten_nor_moved(command, name, folder, capfd):
    mine = folder / "mine" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert run(command, "--config", "recipe.yaml", "--run_dir", "mine") == 2
    found = name.split("/")[0]
    assert f"run_dir='mine' is not a run folder (contains {found}). Give the run a folder" in capfd.readouterr().err
    assert mine.read_text() == "mine"
    assert [f.name for f in (folder / "mine").iterdir()] == [found]


def test_folders_of_loggers_are_in_nobodys_way(folder):
    (folder / "mine" / "lightning_logs").mkdir(parents=True)
    assert run("fit", "--config", "recipe.yaml", "--run_dir", "mine") == 0


def test_a_run_that_was_killed_before_its_recipe_was_written_gets_it(folder):
    assert run("fit", "--config", "recipe.yaml", "--run_dir", "mine") == 0
    recipe = (folder / "mine/recipe.yaml").read_text()
    (folder / "mine/recipe.yaml").unlink()
    assert run("fit", "--config", "recipe.yaml", "--run_dir", "mine", "--ckpt_path", "last") == 0
    assert (folder / "mine/recipe.yaml").read_text() == recipe


def test_the_model_of_a_search_is_measured_by_its_folder_alone(folder, capfd):
    assert run("order", "--config", "recipe.yaml", "--run_dir", "found") == 0
    best = json.loads((folder / "found/order.json").read_text())["orders"][0]["metrics"]["perplexity"]
    capfd.readouterr()
    assert run("test", "--run_dir", "found") == 0
    assert f"{best:.2f}" in capfd.readouterr().out


def test_stages_are_refused_when_a_saved_model_is_tested(folder, capfd):
    assert run("fit", "--config", "recipe.yaml", "--run_dir", "mine") == 0
    assert run("test", "--run_dir", "mine", "--stages.prune.sparsity", "0.9") == 2
    assert (
        "stages.prune.sparsity has no effect: test measures the model in mine as it was saved" in capfd.readouterr().err
    )
    assert run("test", "--config", "recipe.yaml", "--run_dir", "mine") == 0
    assert "test: measures the recipe's model, not compressed. Leave --config out for the one in mine." in (
        capfd.readouterr().out
    )


@pytest.mark.parametrize("file", ["record.json", "samples.safetensors"])
def test_a_damaged_result_is_measured_again(file, folder, capfd):
    assert run("order", "--config", "recipe.yaml", "--run_dir", "found") == 0
    first = json.loads((folder / "found/order.json").read_text())
    (damaged,) = folder.glob(f"store/prune+quantize-*/{file}")
    damaged.write_bytes(damaged.read_bytes()[:20])
    assert run("order", "--config", "recipe.yaml", "--run_dir", "found") == 0
    assert f"{damaged.parent.relative_to(folder)}: is damaged; measuring it again." in capfd.readouterr().out
    again = json.loads((folder / "found/order.json").read_text())
    assert [order["metrics"] for order in again["orders"]] == [order["metrics"] for order in first["orders"]]
    assert again["lead"] == first["lead"]


def test_going_on_with_fewer_runs_forgets_none_that_is_known(folder):
    assert run("order", "--config", "recipe.yaml", "--run_dir", "found") == 0
    assert run("order", "--config", "recipe.yaml", "--run_dir", "found", "--ckpt_path", "last", "--max_runs", "1") == 0
    assert len(json.loads((folder / "found/order.json").read_text())["orders"]) == 2


def test_one_evaluation_sample_makes_nothing_sure(folder, capfd):
    write_recipe(folder, {"evaluation: evaluation.npy": "evaluation: evaluation.npy, evaluation_samples: 1"})
    assert run("order", "--config", "recipe.yaml", "--run_dir", "found") == 0
    report = json.loads((folder / "found/order.json").read_text())
    assert report["lead"]["low"] is None
    assert "needs a torchmetrics metric that sums over two samples or more" in capfd.readouterr().out


def test_names_that_yaml_takes_for_numbers_are_names(folder):
    write_recipe(folder, {"  prune: ": "  1: ", "  quantize: ": "  2: "})
    assert run("order", "--config", "recipe.yaml", "--run_dir", "found") == 0
    names = json.loads((folder / "found/order.json").read_text())["orders"][0]["order"]
    assert sorted(names) == ["1", "2"]


def test_a_run_folder_is_opened_once_and_resumed_by_the_same_run_alone(tmp_path, capsys):
    folder = RunFolder(tmp_path / "run")
    identity = {"seed": 0, "stages": {"prune": {"sparsity": 0.5}}}
    with pytest.raises(RecipeError, match="there is no run to resume"):
        folder.resume(identity)
    assert not folder.open(identity, "a recipe")
    assert folder.holds_run
    assert folder.recipe.read_text() == "a recipe"
    folder.resume(identity)
    with pytest.raises(RecipeError, match=r"stages\.prune\.sparsity is 0\.5 there and 0\.7 here"):
        folder.resume({"seed": 0, "stages": {"prune": {"sparsity": 0.7}}})
    assert folder.open(identity)
    assert capsys.readouterr().out == f"{folder.path} held an earlier run; it is now {folder.path}.1.\n"
    assert RunFolder(tmp_path / "run.1").recipe.read_text() == "a recipe"
    assert not folder.recipe.exists()
    assert folder.model_bytes() is None


def test_no_two_files_of_a_run_folder_have_one_name(tmp_path):
    folder = RunFolder(tmp_path)
    names = [name for name in vars(RunFolder) if not name.startswith("_")]
    files = [value for name in names if isinstance(value := getattr(folder, name), type(tmp_path))]
    assert len(files) == len(set(files)) > 15
    assert {file.parent for file in files} == {tmp_path}
