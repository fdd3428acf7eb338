"""SLEB against a brute force that deletes blocks, its number of evaluations, and the models that it returns."""

import copy
import json
import re
import weakref

import pytest
import tiny
import torch
import yaml
from forked import run_forked
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from pqqp_lightning import load
from pqqp_lightning.__main__ import main
from pqqp_lightning.algorithms.sleb import count_evaluations, remove_greedily
from pqqp_lightning.calibration.walk import Walk
from pqqp_lightning.callbacks import GPTQ, RTN, SLEB, Magnitude
from pqqp_lightning.checkpoint.size import measure_size
from pqqp_lightning.data import ImageData, TokenData
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.models import CausalLM, ImageClassifier
from pqqp_lightning.network.constraints import collect_constraints
from pqqp_lightning.stages.stage import Context

BATCHES = [{"input_ids": tiny.token_rows(3, seed)} for seed in range(2)]
RESNET = {"model": "resnet18", "model_args": {"stem_width": 8, "channels": [8, 8, 16, 16]}}
DEIT = {"model": "deit_tiny_patch16_224", "image_size": 32}
DEIT["model_args"] = {"patch_size": 8, "depth": 4, "embed_dim": 48, "init_values": 0.1}


def language_model(settings=tiny.LLAMA, layers=6, seed=0):
    """Random blocks of different strength, so that it matters which one goes."""
    torch.manual_seed(seed)
    module = CausalLM(settings | {"num_hidden_layers": layers})
    strengths = 2 + 10 * torch.rand(layers, 2)
    with torch.no_grad():
        module.model.get_input_embeddings().weight.mul_(20)
        for block, pair in zip(decoder(module), strengths, strict=True):
            for name, parameter in block.named_parameters():
                if parameter.dim() == 2:
                    parameter.mul_(pair[0] if "attn" in name else pair[1])
    return module


def decoder(module):
    base = module.model.base_model
    return (base.decoder if hasattr(base, "decoder") else base).layers


def image_model(kind):
    torch.manual_seed(0)
    return ImageClassifier(**(RESNET if kind == "resnet" else DEIT), pretrained=False, num_classes=10)


def make(kind):
    if kind in ("llama", "opt"):
        return language_model(tiny.LLAMA if kind == "llama" else tiny.OPT, layers=4)
    return image_model(kind)


def data(kind, folder):
    if kind in ("llama", "opt"):
        return TokenData(**tiny.write_tokens(folder))
    return ImageData(train_samples=64, calibration_samples=32, evaluation_samples=32, batch_size=16)


def fit(folder, kind, *stages, module=None, name="run", **options):
    module = module or make(kind)
    tiny.trainer(folder / name, *stages, **options).fit(module, datamodule=data(kind, folder))
    return module, json.loads((folder / name / "report.json").read_text())["stages"]


def loss_of(module, batch):
    ids = batch["input_ids"]
    return F.cross_entropy(module(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def context(module, batches=BATCHES, loss=loss_of):
    """What the engine gives a stage, with the loss written out here."""

    def walk(blocks):
        probe = {key: value[:1] for key, value in batches[0].items()}
        run = lambda batch: loss(module, batch)  # noqa: E731
        return Walk(module, blocks, batches, probe, run, progress=False, loss=run)

    return Context(walk, title="shorten", progress=False)


@torch.no_grad()
def mean_loss(module, loss=loss_of):
    module.eval()
    return sum(float(loss(module, batch)) for batch in BATCHES) / len(BATCHES)


def without_block(module, index):
    """A copy without the block."""
    other = copy.deepcopy(module)
    del decoder(other)[index]
    other.model.config.num_hidden_layers -= 1
    return other


def without_sublayer(module, name):
    """A copy whose branch adds zeros, since the weights of its last layer are zero."""
    other = copy.deepcopy(module)
    last = {"self_attn": ("o_proj", "out_proj"), "mlp": ("down_proj",), "fc2": ("",)}[name.rsplit(".", 1)[-1]]
    for layer_name, layer in other.get_submodule(name).named_modules():
        if layer_name in last:
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return other


def brute_force(module, amount, names, without):
    """(names, losses) of the greedy choices: every candidate's model is built and run whole."""
    chosen, losses, left = [], [], list(names)
    for _ in range(amount):
        models = [without(module, name, left) for name in left]
        found = [mean_loss(model) for model in models]
        best = min(range(len(left)), key=found.__getitem__)
        module = models[best]
        chosen.append(left.pop(best))
        losses.append(found[best])
    return chosen, losses


def choices(notes):
    """(names, losses) as the record tells them."""
    told = next(note for note in notes if note.startswith("removed, in this order"))
    pairs = re.findall(r"(\S+) \(([\d.]+)\)", told.partition(":")[2])
    return [name for name, _ in pairs], [float(loss) for _, loss in pairs]


def evaluations(notes):
    told = next(note for note in notes if "evaluations a batch" in note)
    ours, naive = (re.findall(r"\d+", part) for part in told.split(";"))
    return [int(n) for n in ours], [int(n) for n in naive]


@pytest.mark.parametrize("settings", [tiny.LLAMA, tiny.OPT], ids=["llama", "opt"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_choices_and_losses_equal_a_brute_force(granularity, seed, settings):
    module = language_model(settings, seed=seed)
    stack = "model.model.layers" if settings is tiny.LLAMA else "model.model.decoder.layers"
    if granularity == "block":
        names = [f"{stack}.{i}" for i in range(6)]
        without = lambda model, name, left: without_block(model, left.index(name))  # noqa: E731
    else:
        branches = ("self_attn", "mlp" if settings is tiny.LLAMA else "fc2")
        names = [f"{stack}.{i}.{branch}" for i in range(6) for branch in branches]
        without = lambda model, name, left: without_sublayer(model, name)  # noqa: E731
    chosen, losses = brute_force(module, 3, names, without)
    seen, given = [], context(module)

    def spy(*args):
        seen.extend(remove_greedily(*args))
        return seen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pqqp_lightning.callbacks.sleb.remove_greedily", spy)
        plan = SLEB(3, granularity).compress(module, given)
    assert plan["removed"] == chosen
    assert choices(given.notes)[0] == chosen
    assert [removal.loss for removal in seen] == pytest.approx(losses, abs=1e-5)
    assert mean_loss(module) == pytest.approx(losses[-1], abs=1e-5)


@pytest.mark.parametrize(("granularity", "inside"), [("block", ["q_proj"]), ("sublayer", ["q_proj", "down_proj"])])
def test_a_round_evaluates_near_half_of_the_blocks_of_whole_passes(granularity, inside):
    module, layers = language_model(layers=12), 12
    calls = []
    for name, layer in module.named_modules():
        if name.endswith(tuple(inside)):
            layer.register_forward_hook(lambda _, args, out: calls.append(len(args[0])))
    given = context(module)
    SLEB(2, granularity).compress(module, given)
    ours, naive = evaluations(given.notes)
    full = calls.count(3)  # the checks that the blocks form a chain run on a probe of one sample
    assert full == sum(ours) * len(BATCHES)
    units = layers if granularity == "block" else 2 * layers
    assert naive == [units * (units - 1), (units - 1) * (units - 2)]
    if granularity == "block":
        assert ours == [n * (n - 1) // 2 + n - 1 for n in (12, 11)]
    assert sum(ours) <= 0.6 * sum(naive)


def test_hidden_states_do_not_pile_up():
    module, seen, alive = language_model(), [], []

    def count(_, args):
        alive.append(len({id(hidden) for ref in seen if (hidden := ref()) is not None}))
        seen.append(weakref.ref(args[0]))

    for block in decoder(module):
        block.register_forward_pre_hook(count)
    SLEB(1).compress(module, context(module, [{"input_ids": tiny.token_rows(3, seed)} for seed in range(6)]))
    assert max(alive) <= 4  # the prefix's, and what one pass is at work on


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
@pytest.mark.parametrize("kind", ["llama", "opt", "deit", "resnet"])
def test_a_loaded_checkpoint_gives_the_same_logits(tmp_path, kind, granularity):
    if (kind, granularity) == ("resnet", "sublayer"):
        with pytest.raises(RecipeError, match=r"those of class BasicBlock are built otherwise"):
            fit(tmp_path, kind, SLEB(1, granularity))
        return
    dense = sum(p.numel() for p in make(kind).parameters())
    module, (_, record) = fit(tmp_path, kind, SLEB(2, granularity))
    inputs = tiny.token_rows(2) if kind in ("llama", "opt") else torch.randn(2, 3, 32, 32)
    loaded = load(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(module.eval()(inputs), loaded(inputs))
    assert sum(p.numel() for p in loaded.parameters()) < dense
    assert record["metrics"]
    if kind == "resnet":  # only blocks without a downsample can go
        assert set(choices(record["notes"])[0]) <= {f"model.layer{i}.1" for i in (1, 2, 3, 4)} | {"model.layer1.0"}


def test_a_model_of_fewer_layers_is_a_stock_model():
    module = language_model()
    SLEB(2).compress(module, context(module))
    config = module.model.config
    assert config.num_hidden_layers == 4
    assert [layer.self_attn.layer_idx for layer in decoder(module)] == [0, 1, 2, 3]
    stock = LlamaForCausalLM(copy.deepcopy(config)).eval()
    stock.load_state_dict(module.model.state_dict(), strict=True)
    ids = tiny.token_rows(2)
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, module.eval()(ids))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = module.model.generate(ids[:1], use_cache=True, **options)
    assert torch.equal(cached, module.model.generate(ids[:1], use_cache=False, **options))


def test_kinds_of_layers_are_cut_with_the_layers():
    settings = tiny.LLAMA | {"model_type": "qwen3", "head_dim": 8, "num_hidden_layers": 4, "sliding_window": 4}
    kinds = ["sliding_attention", "full_attention"] * 2
    torch.manual_seed(0)
    module = CausalLM(settings | {"layer_types": kinds, "use_sliding_window": True, "max_window_layers": 0})
    plan = SLEB(1).compress(module, context(module))
    gone = int(plan["removed"][0][-1])
    assert module.model.config.layer_types == kinds[:gone] + kinds[gone + 1 :]
    stock = AutoModelForCausalLM.from_config(copy.deepcopy(module.model.config)).eval()
    stock.load_state_dict(module.model.state_dict(), strict=True)
    ids = tiny.token_rows(2)
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, module.eval()(ids))


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_it_commutes_with_rounding_where_both_remove_the_same(tmp_path, granularity):
    first, records = fit(tmp_path, "llama", SLEB(1, granularity), RTN(8), name="a")
    second, others = fit(tmp_path, "llama", RTN(8), SLEB(1, granularity), name="b")
    assert choices(records[1]["notes"])[0] == choices(others[2]["notes"])[0]
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert records[2]["size_bytes"] == others[2]["size_bytes"]


def test_masks_and_grids_of_what_remains_are_kept(tmp_path):
    module, records = fit(tmp_path, "llama", Magnitude(0.5), GPTQ(4), SLEB(1))
    found = collect_constraints(module)
    inside = [c for name, c in found.items() if "layers" in name]
    assert len(inside) == 3 * 7
    assert all(c.grid is not None and 2 * c.kept() == c.shape[0] * c.shape[1] for c in inside)
    assert all(record["constraints_verified"] for record in records)


def test_a_removed_block_counts_as_removed(tmp_path):
    module, (dense, record) = fit(tmp_path, "llama", stage := SLEB(1))
    assert record["sparsity"] == pytest.approx(0.25)
    assert record["bits_per_weight"] == pytest.approx(24.0)
    assert record["nominal_rate"] == pytest.approx(4 / 3)
    assert record["size_bytes"] < dense["size_bytes"]
    assert (
        measure_size(module, stage.find_layers(module)).entries * 4
        == 3 * measure_size(make("llama"), stage.find_layers(make("llama"))).entries
    )


def trained_model():
    """Each token is the sum of the two before it: several blocks work on that."""
    torch.manual_seed(0)
    module, generator = CausalLM(tiny.LLAMA | {"num_hidden_layers": 4}), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    for _ in range(150):
        loss = loss_of(module, {"input_ids": sums(32, generator)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module, [{"input_ids": sums(16, generator)} for _ in range(2)]


def sums(rows, generator):
    ids = [torch.randint(0, 8, (rows,), generator=generator) for _ in range(2)]
    while len(ids) < tiny.TOKENS:
        ids.append((ids[-1] + ids[-2]) % 8)
    return torch.stack(ids, dim=1)


@pytest.fixture(scope="module")
def trained():
    return trained_model()


@pytest.mark.parametrize(("granularity", "amount"), [("block", 1), ("block", 2), ("sublayer", 2), ("sublayer", 3)])
def test_it_hurts_less_than_removing_the_first_ones(trained, granularity, amount):
    dense, batches = trained
    losses = []
    for targets in (None, ["layers.[01]"]):
        module = copy.deepcopy(dense)
        if targets and granularity == "block":
            targets = [f"layers.{i}" for i in range(amount)]
        SLEB(amount, granularity, targets=targets).compress(module, context(module, batches))
        with torch.no_grad():
            losses.append(float(sum(loss_of(module, batch) for batch in batches)))
    assert losses[0] < losses[1]


def test_targets_and_ignore_say_what_may_go():
    module = language_model()
    removed = SLEB(2, targets=["layers.[0-3]"], ignore=["layers.0"]).compress(module, context(module))["removed"]
    assert {name[-1] for name in removed} <= set("123")
    module = language_model()
    removed = SLEB(3, "sublayer", targets=["self_attn"]).compress(module, context(module))["removed"]
    assert all(name.endswith("self_attn") for name in removed)


def test_sublayers_leave_no_weights_behind():
    module = language_model()
    plan = SLEB(12 - 1, "sublayer").compress(module, context(module))
    assert sum(1 for _ in decoder(module).parameters()) in (5, 4)  # four projections or three, and the norm
    left = set(SLEB(1, "sublayer").find_layers(module))
    assert len(left) in (4, 3)
    assert len(plan["removed"]) == 11
    assert torch.isfinite(module(tiny.token_rows(1))).all()


def test_blocks_are_still_known_when_one_is_left(tmp_path):
    module, records = fit(tmp_path, "llama", SLEB(2), SLEB(1, ignore=["layers.1"]), RTN(4))
    assert len(decoder(module)) == 1
    assert {name.split(".")[2] for name in collect_constraints(module)} == {"layers"}  # and not the head
    loaded = load(tmp_path / "run")
    assert set(collect_constraints(loaded)) == set(collect_constraints(module))
    assert records[2]["sparsity"] == pytest.approx(0.75)


class Pooled(tiny.Regressor):
    """Its head reads what passes between the blocks."""

    def forward(self, x):
        states = [self.inlet(x)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return self.head(sum(states))


class Listed(Pooled):
    """The same with a list of names of its blocks."""

    compression_blocks = ("blocks.0", "blocks.1", "blocks.2", "blocks.3")


@pytest.mark.parametrize("kind", [tiny.Regressor, Pooled, Listed])
def test_a_model_that_reads_between_its_blocks_is_run_whole(tmp_path, kind):
    module, stage = kind(blocks=4), SLEB(1)
    expected = []
    for index in range(4):
        other = copy.deepcopy(module)
        other.blocks[index].forward = lambda x: x
        expected.append(float(F.mse_loss(other(tiny.regression_data().tensors[0]), tiny.regression_data().tensors[1])))
    module.calibration_dataloader = lambda: tiny.regression_loader(batch_size=24)
    trainer = tiny.trainer(tmp_path, stage, RTN(4))
    trainer.fit(module, tiny.regression_loader(), tiny.regression_loader(seed=1))
    notes = json.loads((tmp_path / "report.json").read_text())["stages"][1]["notes"]
    names, losses = choices(notes)
    assert losses == [pytest.approx(min(expected), abs=1e-4)]
    assert names == [f"blocks.{expected.index(min(expected))}"]
    whole = any("whole forward passes for each candidate" in note for note in notes)
    assert whole == (kind is not tiny.Regressor)
    ours, naive = evaluations(notes)
    assert (ours, naive) == ([12] if whole else [9], [12])
    assert len(collect_constraints(module)) == 3 * 2


def test_everything_is_put_back():
    module = language_model().train()
    decoder(module)[1].eval()
    modes = {name: m.training for name, m in module.named_modules()}
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    given = context(module, loss=lambda model, batch: loss_of(model, batch) * float("nan"))
    with pytest.raises(RecipeError, match=r"stages\.shorten: the loss is NaN or infinite without any of the cand"):
        SLEB(1).compress(module, given)
    assert {name: m.training for name, m in module.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert module.model.config.use_cache


def test_it_runs_in_mixed_precision_and_finetunes(tmp_path):
    module, records = fit(tmp_path, "llama", SLEB(1, epochs=1), precision="bf16-mixed")
    assert len(decoder(module)) == 3
    assert records[1]["metrics_before_finetuning"]
    assert load(tmp_path / "run").model.config.num_hidden_layers == 3


def test_ranks_decide_together(monkeypatch):
    """The losses of another rank are added before anything is chosen."""
    module, added = language_model(), torch.tensor([0.0, 0, 0, 0, 0, -1e6, 0])  # of block 5, and of no further batch
    monkeypatch.setattr("pqqp_lightning.calibration.removal_losses.sum_over_ranks", lambda totals: totals + added)
    assert SLEB(1).compress(module, context(module))["removed"] == ["model.model.layers.5"]


def test_a_fraction_is_of_all_blocks():
    for amount, removed in ((0.1, 1), (0.25, 2), (0.5, 3), (0.4, 2)):
        module = language_model()
        assert len(SLEB(amount).compress(module, context(module))["removed"]) == removed


class Untrained(CausalLM):
    training_step = LightningModule.training_step


@pytest.mark.parametrize(
    ("stage", "kind", "message"),
    [
        (SLEB(0), "llama", r"amount=0 removes nothing. Use 3 for three of them, or 0\.1 for a tenth\."),
        (SLEB(-1), "llama", r"amount=-1 is neither a whole number above 0 nor a fraction"),
        (SLEB(1.5), "llama", r"amount=1\.5 is neither a whole number above 0 nor a fraction"),
        (SLEB(4), "llama", r"amount=4 would remove 4 of 4 blocks and leave none\. Use at most 3\."),
        (SLEB(8, "sublayer"), "llama", r"amount=8 would remove 8 of 8 sublayers and leave none\. Use at most 7\."),
        (SLEB(0.95), "llama", r"amount=0\.95 would remove 4 of 4 blocks and leave none"),
        (SLEB(0.1), "llama", r"amount=0\.1 of 4 blocks rounds to none\. Use a whole number, or a larger fraction"),
        (
            SLEB(6),
            "resnet",
            r"amount=6 would remove 6 blocks, but only 4 of 8 can be removed.* change the shape\. Use at most 4\.",
        ),
        (
            SLEB(3, ignore=["layers.[0-1]"]),
            "llama",
            r"only 2 of 4 can be removed: the others match.*Use at most 2",
        ),
        (SLEB(1, "layer"), "llama", r"granularity='layer' is unknown\. Use block or sublayer\."),
        (SLEB(1, targets=["q_proj"]), "llama", r"targets='q_proj' matches no block \(model\.model\.layers\.0, "),
        (SLEB(1, ignore=["layers.9"]), "llama", r"ignore='layers\.9' matches no layer that stages compress"),
        (
            SLEB(1, blocks=["self_attn"]),
            "llama",
            r"blocks='model\.model\.layers\.0\.self_attn' is not an element of a ModuleList or Sequential",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(tmp_path, stage, kind, message):
    with pytest.raises(RecipeError, match=message):
        fit(tmp_path, kind, stage)
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_loss_or_without_blocks_is_refused():
    (problem,) = SLEB(1).check(Untrained(tiny.LLAMA), None, [])
    assert str(problem) == "needs a training_step in Untrained: its loss decides what is removed. Define one."
    module = tiny.Regressor(blocks=1)
    module.blocks = module.blocks[0]
    (problem,) = SLEB(1).check(module, None, [])
    assert problem.text == "the model has no row of blocks"
    module = tiny.Regressor(blocks=3)
    module.automatic_optimization = False
    assert "optimizes by hand" in SLEB(1).check(module, None, [])[0].text


def test_later_stages_are_checked_against_fewer_blocks(tmp_path):
    with pytest.raises(RecipeError, match=r"targets='layers\.3' matches no layer that stages compress"):
        fit(tmp_path, "llama", SLEB(1), RTN(4, targets=["layers.3"]))
    with pytest.raises(RecipeError, match=r"amount=3 would remove 3 of 3 blocks"):
        fit(tmp_path, "llama", SLEB(1), SLEB(3))


def test_greedy_choice_prefers_the_first_of_equals_and_never_takes_nan():
    losses = {(): [2.0, 1.0, 1.0, float("nan")], (1,): [3.0, float("inf"), 2.5]}
    first, second = remove_greedily(2, 4, lambda removed, left: losses[tuple(removed)])
    assert (first.unit, first.loss, first.refused) == (1, 1.0, (3,))
    assert (second.unit, second.loss, second.refused) == (3, 2.5, (2,))
    with pytest.raises(ArithmeticError, match="NaN or infinite without any"):
        remove_greedily(1, 1, lambda removed, left: [float("nan")])
    with pytest.raises(ValueError, match=r"`amount` to be between 1 and 2, but got 3"):
        remove_greedily(3, 2, lambda removed, left: [0.0] * len(left))


def test_evaluations_are_counted_as_they_are_made():
    def walk_through(units, candidates):
        done = sum(units[: max(candidates)])  # the prefix is carried up to the last candidate's block
        return done + sum(sum(units[i] for i in range(block, len(units))) - 1 for block in candidates)

    for units, candidates in (([1] * 8, range(8)), ([1] * 8, [0, 1, 3, 7]), ([2, 0, 1, 2], [0, 0, 2, 3, 3])):
        assert count_evaluations(units, list(candidates)) == walk_through(units, list(candidates))
    assert count_evaluations([1] * 30, range(30)) == 30 * 29 // 2 + 29
    assert count_evaluations([1] * 30, range(30), shared=False) == 30 * 29


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {
        "seed_everything": 3,
        "model": {"class_path": "CausalLM", "init_args": {"model": tiny.LLAMA | {"num_hidden_layers": 4}}},
        "data": {"class_path": "TokenData", "init_args": tiny.write_tokens(tmp_path, calibration=8)},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "stages": {"shorten": {"class_path": "SLEB", "init_args": {"amount": 2}}, "quantize": {"class_path": "RTN"}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path


def test_two_processes_choose_as_one_does(recipe):
    """Four sequences each: their mean losses, added up, are those of all eight."""
    main(["fit", "--config", "recipe.yaml", "--run_dir", "one"])
    arguments = ["fit", "--config", "recipe.yaml", "--run_dir", "two"]
    arguments += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    result = run_forked(["-m", "pqqp_lightning", *arguments], recipe)
    assert result.returncode == 0, result.stderr
    found = [json.loads((recipe / run / "report.json").read_text())["stages"][1]["notes"] for run in ("one", "two")]
    assert choices(found[0])[0] == choices(found[1])[0]
    assert choices(found[0])[1] == pytest.approx(choices(found[1])[1], abs=2e-4)


def test_an_order_search_starts_each_order_from_all_blocks(recipe):
    main(["order", "--config", "recipe.yaml", "--run_dir", "search"])
    main(["fit", "--config", "recipe.yaml", "--run_dir", "plain", "--stage_order", "[quantize,shorten]"])
    plain = json.loads((recipe / "plain/report.json").read_text())["stages"]
    orders = json.loads((recipe / "search/order.json").read_text())["orders"]
    assert len(orders) == 2
    same = next(order for order in orders if order["order"] == ["quantize", "shorten"])
    assert same["stages"][-1]["notes"] == plain[-1]["notes"]
    assert same["stages"][-1]["metrics"] == plain[-1]["metrics"]
    assert all(order["stages"][-1]["sparsity"] >= 0.5 for order in orders)
