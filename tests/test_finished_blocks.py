"""A stage that is killed in the middle resumes at the first block that it had not finished; nothing else differs."""

import json
import math
import signal
from collections import Counter

import pytest
import tiny
import torch
from composition import STAGES
from forked import run_forked
from interrupt import Died
from test_resume import write_recipe
from torch import nn

from pqqp_lightning import callbacks
from pqqp_lightning.__main__ import main
from pqqp_lightning.algorithms.grid import fit_grid, round_to_grid
from pqqp_lightning.calibration import walk
from pqqp_lightning.checkpoint import finished_blocks
from pqqp_lightning.checkpoint.finished_blocks import FinishedBlocks
from pqqp_lightning.network.constraints import Constraints, constraints_of, set_constraints
from pqqp_lightning.runs import stage_runner
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.stages import Compressed, Context, LayerwiseStage, SquaredNorm
from pqqp_lightning.storage.result_store import ResultStore
from pqqp_lightning.trials.prefix_tree import PrefixTree

BLOCKS = 4
RECORDED = ("elapsed_s", "peak_memory_bytes")  # what no two runs have in common


@pytest.fixture(autouse=True)
def every_block(monkeypatch):
    """Keep every block: tiny ones take less time than what is worth it."""
    monkeypatch.setattr(finished_blocks, "PAUSE_S", 0.0)
    monkeypatch.setattr(finished_blocks, "SHARE", math.inf)


class Solved:
    """The layers that stages solved, as (class of the stage, name); solving ``death`` ends the run."""

    def __init__(self, monkeypatch):
        self.layers: list[tuple[str, str]] = []
        self.death: tuple[str, str] | None = None
        original = LayerwiseStage._row_groups

        def counting(stage, name, *arguments):
            method = type(stage).__name__
            if self.death is not None and method == self.death[0] and self.death[1] in name:
                raise Died
            self.layers.append((method, name))
            return original(stage, name, *arguments)

        monkeypatch.setattr(LayerwiseStage, "_row_groups", counting)


@pytest.fixture
def solved(monkeypatch):
    return Solved(monkeypatch)


def fit(folder, stages, ckpt_path=None, kind="llama", **options):
    (folder.parent / "tokens").mkdir(exist_ok=True)
    data = tiny.make_data(kind, folder.parent / "tokens", **({"batch_size": 2} if kind in ("llama", "opt") else {}))
    tiny.trainer(folder, *stages, **options).fit(tiny.make_model(kind, BLOCKS), datamodule=data, ckpt_path=ckpt_path)


def die_and_resume(folder, stages, solved, death, **options):
    """Run ``stages()`` until ``death``, then to the end; the layers that the second run solved."""
    solved.death = death
    with pytest.raises(Died):
        fit(folder, stages(), **options)
    solved.death = None
    solved.layers.clear()
    fit(folder, stages(), "last", **options)
    return list(solved.layers)


def prune_convolutions():
    return [callbacks.SparseGPT(0.5), callbacks.GPTQ(8)]


def result(folder):
    """The stored weights, masks, scales and records of a finished run."""
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    plain = [{k: v for k, v in record.items() if k not in RECORDED} for record in records]
    return (folder / "model" / "model.safetensors").read_bytes(), plain


def in_block(layers, block):
    return [name for _, name in layers if f".{block}." in name]


def prune_then_quantize():
    return [callbacks.SparseGPT(0.5), callbacks.GPTQ(4, group_size=16)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    fit(folder, prune_then_quantize())
    return folder


@pytest.mark.parametrize("stage", ["SparseGPT", "GPTQ"])
def test_a_stage_that_dies_in_the_third_block_does_not_solve_the_first_two_again(tmp_path, undisturbed, solved, stage):
    again = die_and_resume(tmp_path / "run", prune_then_quantize, solved, (stage, "layers.2.mlp.up"))
    blocks = Counter(name.split(".")[3] for method, name in again if method == stage)
    assert blocks == {"2": 7, "3": 7}
    assert "SparseGPT" not in {method for method, _ in again} - {stage}
    assert result(tmp_path / "run") == result(undisturbed)
    assert not list((tmp_path / "run").rglob("blocks"))


def test_a_stage_that_dies_again_and_again_makes_progress(tmp_path, undisturbed, solved):
    for number, block in enumerate((1, 2, 2, 3)):
        solved.death = ("SparseGPT", f"layers.{block}")
        with pytest.raises(Died):
            fit(tmp_path / "run", prune_then_quantize(), "last" if number else None)
    solved.death = None
    fit(tmp_path / "run", prune_then_quantize(), "last")
    assert Counter(name for method, name in solved.layers if method == "SparseGPT").most_common(1)[0][1] == 1
    assert result(tmp_path / "run") == result(undisturbed)


class Draw(LayerwiseStage):
    """Draws numbers, keeps attributes of its own, and notes what it found."""

    source = "none"
    promises = ("grid",)
    statistic = SquaredNorm

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.drawn = []
        self.total = torch.zeros(1)

    def prepare(self, statistic, found):
        found("looked at")
        return list(statistic)

    def compress_layer(self, inputs):
        noise = torch.rand_like(inputs.weight)
        self.drawn.append(float(noise.sum()))
        self.total += noise.sum()
        grid = fit_grid(inputs.weight * noise, bits=8)
        return Compressed(round_to_grid(inputs.weight, grid), grid=grid)

    def compress(self, model, context):
        context.notes.append("before")
        plan = super().compress(model, context)
        context.notes.append(f"{self.drawn} {self.total.tolist()}")
        return plan


class Holds(Draw):
    """Has an attribute that cannot be kept."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.held = object()


LATER = {
    "an allocation": (lambda: [callbacks.SparseGPT(0.5, allocation="sensitivity")], ("SparseGPT", "layers.2"), "llama"),
    "another architecture": (prune_then_quantize, ("GPTQ", "layers.2.fc1"), "opt"),
    "repair": (
        lambda: [*prune_then_quantize(), callbacks.Polish(inputs="mixed", passes=1)],
        ("Polish", "layers.2.mlp.up"),
        "llama",
    ),
    "no statistic": (lambda: [callbacks.RTN(4, clip=True)], ("RTN", "layers.2.mlp.up"), "llama"),
    "random numbers, notes and attributes": (lambda: [Draw()], ("Draw", "layers.2.mlp.up"), "llama"),
    "a layer outside the blocks": (
        lambda: [callbacks.GPTQ(8, targets=["*proj", "lm_head"])],
        ("GPTQ", "lm_head"),
        "llama",
    ),
    "convolutions, which are calibrated as one": (prune_convolutions, ("GPTQ", "layer3"), "resnet"),
}


@pytest.mark.parametrize("case", LATER)
def test_every_kind_of_layerwise_stage_resumes(tmp_path, solved, case):
    stages, death, kind = LATER[case]
    fit(tmp_path / "whole", stages(), kind=kind)
    whole = list(solved.layers)
    again = die_and_resume(tmp_path / "run", stages, solved, death, kind=kind)
    assert len(again) < len(whole)
    assert not set(in_block(again, 1)) or kind == "resnet"
    assert result(tmp_path / "run") == result(tmp_path / "whole")


def test_mixed_precision_neither_measures_nor_quantizes_again(tmp_path, solved, monkeypatch):
    measured = []
    original = callbacks.mixed_precision.measure_costs
    monkeypatch.setattr(callbacks.mixed_precision, "measure_costs", lambda *a: (measured.append(1), original(*a))[1])

    def stages():
        return [callbacks.MixedPrecision(bits=[3, 4, 8], average_bits=5, group_size=16)]

    fit(tmp_path / "whole", stages())
    whole = [name for _, name in solved.layers]
    last = whole[-1]  # in the last part: the fewest bits
    again = die_and_resume(tmp_path / "run", stages, solved, ("GPTQ", last))
    assert len(measured) == 2  # of the undisturbed run and the one that died
    assert last in {name for _, name in again}
    assert len(again) < len(whole) / 2
    assert result(tmp_path / "run") == result(tmp_path / "whole")


def test_a_stage_with_attributes_that_cannot_be_kept_begins_anew(tmp_path, solved):
    again = die_and_resume(tmp_path / "run", lambda: [Holds()], solved, ("Holds", "layers.2"))
    assert len(again) == 7 * BLOCKS


def test_a_damaged_file_is_not_used(tmp_path, undisturbed, solved):
    solved.death = ("SparseGPT", "layers.3")
    with pytest.raises(Died):
        fit(tmp_path / "run", prune_then_quantize())
    (file,) = (tmp_path / "run/stages/1-sparsegpt/blocks").glob("1-1.*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # of a weight
    file.write_bytes(content)
    solved.death = None
    solved.layers.clear()
    fit(tmp_path / "run", prune_then_quantize(), "last")
    assert {name.split(".")[3] for method, name in solved.layers if method == "SparseGPT"} == {"1", "2", "3"}
    assert result(tmp_path / "run") == result(undisturbed)


LAYERWISE = [name for name, cls in STAGES.items() if issubclass(cls, LayerwiseStage) and name != "GradualPruning"]
"""GradualPruning prunes while it trains."""


@pytest.mark.parametrize("name", LAYERWISE)
def test_the_attributes_of_our_layerwise_stages_can_be_kept(tmp_path, name):
    layers = linear(0)
    context = Context(lambda blocks: None, finished=FinishedBlocks(tmp_path))
    kept = context.part(tiny.make_stage(STAGES[name]))
    assert not kept.restore(layers)
    kept.keep(layers)
    assert len(list((tmp_path / "blocks").iterdir())) == 1


def linear(seed):
    torch.manual_seed(seed)
    return {"layer": nn.Linear(8, 8)}


def part(folder, identity, state=None):
    blocks = FinishedBlocks(folder, {"stage": identity})
    return blocks.part(lambda: state, lambda kept: None)


def compress(layers):
    layers["layer"].weight.data.mul_(0.5)


def test_files_of_another_recipe_or_of_other_weights_are_not_used(tmp_path):
    layers = linear(0)
    first = part(tmp_path, "this")
    assert not first.restore(layers)
    compress(layers)
    first.keep(layers)
    for identity, seed, usable in (("this", 0, True), ("another", 0, False), ("this", 1, False)):
        copy = tmp_path / f"{identity}{seed}"
        (copy / "blocks").mkdir(parents=True)
        for file in (tmp_path / "blocks").iterdir():
            (copy / "blocks" / file.name).write_bytes(file.read_bytes())
        fresh = linear(seed)
        assert part(copy, identity).restore(fresh) is usable
        assert torch.equal(fresh["layer"].weight, layers["layer"].weight) is usable


def test_a_weight_that_breaks_its_constraints_is_not_packed(tmp_path):
    """Packed and unpacked, it would keep them, and the verification after the stage would not see it."""
    layers = linear(0)
    mask = torch.arange(64).view(8, 8) > 9
    set_constraints(layers["layer"], Constraints((8, 8)).with_mask(mask))
    kept = part(tmp_path, "this")
    assert not kept.restore(layers)
    kept.keep(layers)
    assert not part(tmp_path, "this").restore(linear(0))


def test_constraints_come_back(tmp_path):
    layers = linear(0)
    kept = part(tmp_path, "this")
    assert not kept.restore(layers)
    grid = fit_grid(layers["layer"].weight.data, bits=4)
    weight = round_to_grid(layers["layer"].weight.data, grid)
    mask = weight != 0
    layers["layer"].weight.data.copy_(weight)
    set_constraints(layers["layer"], Constraints((8, 8)).with_mask(mask).with_grid(grid))
    kept.keep(layers)
    fresh = linear(0)
    assert part(tmp_path, "this").restore(fresh)
    assert torch.equal(fresh["layer"].weight, weight)
    constraints = constraints_of(fresh["layer"])
    assert torch.equal(constraints.mask(), mask)
    assert torch.equal(constraints.grid.scale, grid.scale)


def test_a_stage_that_is_quick_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(finished_blocks, "PAUSE_S", 60.0)
    layers = linear(0)
    kept = part(tmp_path, "this")
    assert not kept.restore(layers)
    kept.keep(layers)
    kept.finish()
    assert not (tmp_path / "blocks").exists()


def test_a_disk_that_is_full_does_not_end_the_run(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(finished_blocks, "save_file", fail)
    layers = linear(0)
    kept = part(tmp_path, "this")
    assert not kept.restore(layers)
    with pytest.warns(UserWarning, match="finished blocks cannot be kept"):
        kept.keep(layers)
    kept.keep(layers)


def test_the_progress_bar_starts_at_the_block_that_is_not_finished(tmp_path, solved, monkeypatch):
    bars = []
    original = walk.tqdm

    def remember(*arguments, **options):
        bars.append(original(*arguments, **options | {"disable": False}))
        return bars[-1]

    monkeypatch.setattr(walk, "tqdm", remember)
    die_and_resume(tmp_path / "run", lambda: [callbacks.SparseGPT(0.5)], solved, ("SparseGPT", "layers.2"))
    assert [(bar.initial, bar.total) for bar in bars] == [(0, 4), (2, 4)]
    assert bars[-1].n == 4


@pytest.mark.parametrize("stage", ["SLEB", "SparseGPT"])
def test_a_run_that_dies_in_the_evaluation_does_not_compress_again(tmp_path, monkeypatch, stage):
    """Whatever the stage: its checkpoint is written before."""
    compressed = []
    died = []
    cls = callbacks.SLEB if stage == "SLEB" else callbacks.SparseGPT
    original = cls.compress
    monkeypatch.setattr(cls, "compress", lambda *a: (compressed.append(1), original(*a))[1])

    def stages():
        return [callbacks.SLEB(1) if stage == "SLEB" else callbacks.SparseGPT(0.5), callbacks.RTN(8)]

    fit(tmp_path / "whole", stages())
    evaluate = stage_runner.evaluate

    def dying(*arguments, **options):
        if len(compressed) == 2 and not died:
            died.append(1)
            raise Died
        return evaluate(*arguments, **options)

    monkeypatch.setattr(stage_runner, "evaluate", dying)
    with pytest.raises(Died):
        fit(tmp_path / "run", stages())
    fit(tmp_path / "run", stages(), "last")
    assert len(compressed) == 2
    assert result(tmp_path / "run") == result(tmp_path / "whole")


def test_a_search_that_dies_in_the_middle_of_a_stage_resumes_there(tmp_path, solved):
    def measure(name):
        stages = {"prune": callbacks.SparseGPT(0.5), "quantize": callbacks.GPTQ(4, group_size=16)}
        engine = tiny.trainer(tmp_path / name, *stages.values())
        source = RunData(tiny.make_model("llama", BLOCKS), datamodule=tiny.make_data("llama", tmp_path, batch_size=2))
        tree = PrefixTree(engine, source, stages, ResultStore(tmp_path / f"store-{name}"))
        tree.open()
        record = tree.measure(("prune", "quantize")).record
        weights = tree.snapshot(("prune", "quantize")) / "model.safetensors"
        return {k: v for k, v in record.items() if k not in RECORDED}, weights.read_bytes()

    whole = measure("whole")
    solved.death = ("GPTQ", "layers.2")
    with pytest.raises(Died):
        measure("run")
    solved.death = None
    solved.layers.clear()
    assert measure("run") == whole
    assert Counter(name.split(".")[3] for _, name in solved.layers) == {"2": 7, "3": 7}
    assert not list(tmp_path.rglob("blocks"))


def test_an_evaluation_that_is_stopped_early_leaves_no_blocks(tmp_path):
    stage = callbacks.SparseGPT(0.5)
    engine = tiny.trainer(tmp_path / "run", stage)
    source = RunData(tiny.make_model("llama"), datamodule=tiny.make_data("llama", tmp_path, batch_size=2))
    tree = PrefixTree(engine, source, {"prune": stage}, ResultStore(tmp_path / "store"))
    tree.open()
    tree.measure_unless(("prune",), "perplexity", lambda samples: True)
    assert not list(tmp_path.rglob("blocks"))


KILLER = """
import math, os, signal, sys
from pqqp_lightning.checkpoint import finished_blocks
from pqqp_lightning.__main__ import main

finished_blocks.PAUSE_S, finished_blocks.SHARE = 0.0, math.inf
original, calls = finished_blocks.sha256_of, 0

def killing(path):
    global calls
    calls += 1
    if calls == 5:  # the file of the second block of the second stage is written and has no name yet
        os.kill(os.getpid(), signal.SIGKILL)
    return original(path)

finished_blocks.sha256_of = killing
main(sys.argv[1:])
"""


def test_a_run_that_is_killed_while_it_writes_a_block_resumes_at_that_block(tmp_path, monkeypatch, solved):
    stages = {
        "prune": {"class_path": "SparseGPT", "init_args": {"sparsity": 0.5}},
        "quantize": {"class_path": "GPTQ", "init_args": {"bits": 4, "group_size": 16}},
    }
    write_recipe(tmp_path, stages=stages)
    (tmp_path / "killer.py").write_text(KILLER)
    words = ["fit", "--config", "recipe.yaml", "--run_dir"]
    killed = run_forked(["killer.py", *words, "killed"], tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    files = {path.name.partition(".")[0] for path in (tmp_path / "killed/stages/2-quantize/blocks").iterdir()}
    assert files == {"1-0", "unfinished"}
    monkeypatch.chdir(tmp_path)
    main([*words, "whole"])
    solved.layers.clear()
    main([*words, "killed", "--ckpt_path", "last"])
    assert {name.split(".")[3] for _, name in solved.layers} == {"1"}
    assert result(tmp_path / "killed") == result(tmp_path / "whole")
