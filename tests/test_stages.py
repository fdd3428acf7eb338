"""The contract that every installed stage keeps; a new stage is tested without anyone writing a test."""

import copy
import functools
import itertools
import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from composition import STAGES, stages_named

from pqqp_lightning import Stage, load
from pqqp_lightning.checkpoint.size import measure_size
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.models import CausalLM
from pqqp_lightning.network.constraints import broken_constraints, collect_constraints
from pqqp_lightning.runs.checks import check_stages
from pqqp_lightning.runs.forecast import Forecast
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.runs.stage_runner import StageRunner
from pqqp_lightning.stages.arguments import arguments_of, documentation
from pqqp_lightning.stages.pruning import PruningStage
from pqqp_lightning.stages.quantization import QuantizationStage

COMPRESSING = [name for name, cls in STAGES.items() if cls.compresses]
PROMISING = [name for name, cls in STAGES.items() if cls.promises]
PAIR_MODELS = ["llama", "deit", "resnet"]


def make(name):
    return tiny.make_stage(STAGES[name])


def run(tmp_path, kind, *stages, folder="run"):
    module = tiny.make_model(kind)
    trainer = tiny.trainer(tmp_path / folder, *stages)
    trainer.fit(module, datamodule=tiny.make_data(kind, tmp_path))
    return module, trainer


def problems_of(tmp_path, kind, stages):
    data = RunData(tiny.make_model(kind), datamodule=tiny.make_data(kind, tmp_path))
    return [problem for problems in check_stages(stages, data) for problem in problems]


@functools.cache
def runs_alone(name, kind):
    """Asked once for all pairs."""
    with tempfile.TemporaryDirectory() as folder:
        return not problems_of(Path(folder), kind, stages_named(name))


def outputs(module, kind):
    batch = (
        tiny.token_rows(2) if kind in ("llama", "opt") else torch.randn(2, 3, 32, 32, generator=torch.manual_seed(1))
    )
    with torch.no_grad():
        return module.eval()(batch)


def check_refusal(tmp_path, kind, stages, problems):
    """Every problem has a reason and a way out, and nothing is written."""
    assert all(problem.text and problem.way_out.endswith(".") for problem in problems)
    with pytest.raises(RecipeError, match=rf"stages\.{stages[-1].name} \({type(stages[-1]).__name__}\): "):
        run(tmp_path, kind, *stages)
    assert not (tmp_path / "run").exists()


def check_promises(module, stages):
    """What each of ``stages`` promises holds on every layer that it acts on."""
    constraints = collect_constraints(module)
    assert not broken_constraints(module, constraints)
    for stage in stages:
        for name in stage.find_layers(module):
            if "mask" in stage.promises:
                assert constraints[name].mask_bits is not None, name
            if "grid" in stage.promises:
                assert constraints[name].grid is not None, name


ROUNDED = 0.002
"""What whole bytes make of a total that the data spreads over the layers, as a fraction."""


def check_expected_size(module, kind, tmp_path, stages):
    """The size is known before anything runs: exactly, or as a bound where the data decides."""
    data = RunData(tiny.make_model(kind), datamodule=tiny.make_data(kind, tmp_path))
    turn = Forecast(data, stages).after(stages)
    assert not turn.problems
    targeted = dict.fromkeys(name for stage in stages for name in stage.find_layers(data.module))
    counted = measure_size(module, targeted)
    layer_bytes = sum(layer.size_bytes for layer in counted.layers)
    print(turn.size, counted.size_bytes, layer_bytes)
    if turn.size.exact:
        assert (turn.size.size_bytes, turn.size.layer_bytes) == (counted.size_bytes, layer_bytes)
    else:
        assert counted.size_bytes <= turn.size.size_bytes * (1 + ROUNDED)


def check_loads(folder, module, kind):
    """The checkpoint alone gives the same weights, constraints and outputs, bit for bit."""
    loaded = load(folder)
    own, again = module.state_dict(), loaded.state_dict()
    assert list(own) == list(again)
    assert all(torch.equal(own[key], again[key]) for key in own)
    kept = {name: c.kept() for name, c in collect_constraints(module).items()}
    assert {name: c.kept() for name, c in collect_constraints(loaded).items()} == kept
    assert all(not m.training for m in loaded.modules())
    assert torch.equal(outputs(module, kind), outputs(loaded, kind))


@pytest.mark.parametrize("kind", tiny.MODELS)
@pytest.mark.parametrize("name", COMPRESSING)
def test_a_stage_keeps_its_promises_and_its_checkpoint_loads(tmp_path, name, kind):
    stages = stages_named(name)
    stage = stages[-1]
    if problems := problems_of(tmp_path, kind, stages):
        check_refusal(tmp_path, kind, stages, problems)
        return
    module, trainer = run(tmp_path, kind, *stages)
    check_promises(module, stages)
    layers = stage.find_layers(module)
    if stage.promises:
        assert set(collect_constraints(module)) == set(layers)
    size = measure_size(module, layers)
    if isinstance(stage, PruningStage):
        assert size.pruned == pytest.approx(stage.sparsity, abs=0.02)  # Wanda rounds per row
        assert size.sparsity >= size.pruned
    if isinstance(stage, QuantizationStage):
        average = sum(layer.bits * layer.entries for layer in size.layers) / size.entries
        asked = collect_constraints(module)[next(iter(layers))].grid.bits if name == "INT8" else 4
        assert asked - 0.2 < average <= asked  # bits that differ by layer leave a remainder
    check_expected_size(module, kind, tmp_path, stages_named(name))
    check_loads(tmp_path / "run", module, kind)
    assert trainer.callbacks  # the stages are ordinary callbacks


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_keeps_its_arguments_as_they_are(name):
    """So that a sweep can make it again with other arguments, and a record repeats it."""
    stage = make(name)
    again = type(stage)(**{name: vars(stage)[name] for name in arguments_of(type(stage))})
    assert again.arguments() == stage.arguments()


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_deterministic(tmp_path, name):
    first, _ = run(tmp_path, "llama", *stages_named(name), folder="a")
    second, _ = run(tmp_path, "llama", *stages_named(name), folder="b")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


OFTEN = {"SparseGPT", "GPTQ"}
"""The stages that pairs with every other one are tried with on each change."""


def pairs():
    """Every ordered pair on every model.

    Those of a ring over the stages, and on LLaMA those with the stages of :data:`OFTEN`, stand for the long rest.
    """
    ring = [*STAGES]
    neighbours = set(itertools.pairwise([*ring, ring[0]]))
    found = []
    for kind, first, second in itertools.product(PAIR_MODELS, STAGES, STAGES):
        if first == second:
            continue
        marks = [pytest.mark.xdist_group(f"pairs {kind} {first}")]  # one process, which applies the first stage once
        often = kind == "llama" and OFTEN & {first, second}
        if not often and (first, second) not in neighbours:
            marks.append(pytest.mark.long)
        found.append(pytest.param(first, second, kind, marks=marks))
    return found


@functools.lru_cache(maxsize=1)
def after_first(name, kind):
    """A runner whose model has gone through one stage and those that it needs, for every second one to start from."""
    with tempfile.TemporaryDirectory() as folder:
        stages = stages_named(name)
        trainer = tiny.trainer(Path(folder) / "run", *stages)
        data = RunData(tiny.make_model(kind), datamodule=tiny.make_data(kind, Path(folder)))
        data.read(trainer)
        runner = StageRunner(trainer, data)
        runner.measure_dense([other for other in stages_named(*STAGES) if runs_alone(type(other).__name__, kind)])
        for position, stage in enumerate(stages, start=1):
            runner.apply(stage, Path(folder) / "run" / "stages" / str(position))
    runner.module.trainer = None  # a copy of the model must not copy the trainer
    return runner


def run_second(tmp_path, kind, first, stages):
    """The model after all ``stages``; a copy of the shared runner's model has gone through all but the last."""
    shared = after_first(first, kind)
    runner = copy.copy(shared)
    runner.applied = [*shared.applied]
    runner.data = RunData(copy.deepcopy(shared.module), datamodule=tiny.make_data(kind, tmp_path))
    runner.trainer = tiny.trainer(tmp_path / "run", *stages)
    runner.data.read(runner.trainer)
    runner.apply(stages[-1], tmp_path / "run" / "model")
    return runner.module


@pytest.mark.parametrize(("first", "second", "kind"), pairs())
def test_every_ordered_pair_runs_with_both_constraints_or_is_refused_with_the_way_out(tmp_path, first, second, kind):
    if not (runs_alone(first, kind) and runs_alone(second, kind)):
        return  # refused alone, which has a test of its own
    stages = stages_named(first, second)
    if problems := problems_of(tmp_path, kind, stages):
        check_refusal(tmp_path, kind, stages, problems)
        return
    module = run_second(tmp_path, kind, first, stages)
    check_promises(module, stages)
    check_expected_size(module, kind, tmp_path, stages_named(first, second))
    check_loads(tmp_path / "run", module, kind)


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        ("SparseGPT", "GPTQ", "llama"),
        ("ChannelPruning", "LoRA", "llama"),  # a structure of its own, and training
        ("Finetune", "GPTQ", "deit"),
        ("QAT", "SparseGPT", "resnet"),
    ],
)
def test_a_pair_from_a_shared_first_stage_is_what_a_whole_fit_gives(tmp_path, first, second, kind):
    """Bit for bit, so that what holds for a pair above holds for ``Trainer.fit``."""
    stages = stages_named(first, second)
    assert not problems_of(tmp_path, kind, stages)
    module, _ = run(tmp_path, kind, *stages, folder="fit")
    check_promises(module, stages)
    check_loads(tmp_path / "fit", module, kind)
    ours, theirs = run_second(tmp_path, kind, first, stages_named(first, second)).state_dict(), module.state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


PRUNING = ["SparseGPT", "SLEB", "ChannelPruning"]
QUANTIZING = ["GPTQ", "MixedPrecision", "RTN"]
RECOVERING = ["LoRA"]
TRIPLES = [
    order for chosen in itertools.product(PRUNING, QUANTIZING, RECOVERING) for order in itertools.permutations(chosen)
]


QUICK_TRIPLES = [{"SparseGPT", "GPTQ", "LoRA"}, {"SLEB", "RTN", "LoRA"}, {"ChannelPruning", "MixedPrecision", "LoRA"}]
"""Each stage in one triple stands for the long rest."""


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(names, id=">".join(names), marks=[] if set(names) in QUICK_TRIPLES else [pytest.mark.long])
        for names in TRIPLES
    ],
)
def test_every_order_of_pruning_quantizing_and_recovering_runs(tmp_path, names):
    stages = stages_named(*names)
    module, _ = run(tmp_path, "llama", *stages)
    check_promises(module, stages)
    check_expected_size(module, "llama", tmp_path, stages_named(*names))
    check_loads(tmp_path / "run", module, "llama")


def test_pruned_fraction_is_exact_in_both_orders(tmp_path):
    for order in (("SparseGPT", "GPTQ"), ("GPTQ", "SparseGPT")):
        module, _ = run(tmp_path, "llama", *map(make, order), folder="-".join(order))
        for name, constraints in collect_constraints(module).items():
            assert constraints.kept() * 2 == constraints.shape[0] * constraints.shape[1], name


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_explains_itself(name):
    cls = STAGES[name]
    assert cls.__doc__
    assert cls.source
    assert "Example" in cls.__doc__
    missing = set(arguments_of(cls)) - set(documentation(cls))
    assert not missing


@pytest.mark.parametrize("name", PROMISING)
@pytest.mark.parametrize(
    ("argument", "value", "key", "blamed"),
    [
        ("targets", ["q_prj"], "targets", "q_prj"),
        ("ignore", ["*"], "ignore", ["*"]),
        ("epochs", -1, "epochs", -1),
    ],
)
def test_bad_values_give_worded_errors(tmp_path, name, argument, value, key, blamed):
    stage = make(name)
    setattr(stage, argument, value)
    with pytest.raises(RecipeError) as caught:
        run(tmp_path, "llama", stage)
    found = [(p.section, p.owner, p.argument, p.value) for p in caught.value.problems]
    assert (f"stages.{stage.name}", type(stage).__name__, key, blamed) in found


@pytest.mark.parametrize("name", [name for name in PROMISING if not make(name).epochs])
def test_targets_and_ignore_choose_layers(tmp_path, name):
    stage = make(name)
    stage.targets, stage.ignore = ["self_attn"], ["layers.1"]
    module, _ = run(tmp_path, "llama", stage)
    changed = set(collect_constraints(module))
    assert changed == {f"model.model.layers.0.self_attn.{p}_proj" for p in "qkvo"}
    dense = tiny.make_model("llama").state_dict()
    for key, value in module.state_dict().items():
        assert torch.equal(value, dense[key]) == (key.removesuffix(".weight") not in changed), key


def test_stages_act_on_a_layer_outside_of_the_blocks_when_named(tmp_path):
    stage = make("GPTQ")
    stage.targets = ["fc", "layer4.1.conv2"]
    module, _ = run(tmp_path, "resnet", stage)
    assert set(collect_constraints(module)) == {"model.fc", "model.layer4.1.conv2"}


def test_a_bare_stage_compresses_nothing():
    module = CausalLM(tiny.LLAMA)
    before = copy.deepcopy(module.state_dict())
    assert Stage().compress(module, None) == {}
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
