"""The contract that every installed stage keeps; a new stage is tested without anyone writing a test."""

import copy
import itertools

import pytest
import tiny
import torch

from pqqp_lightning import Stage, load
from pqqp_lightning.data import ImageData, TokenData
from pqqp_lightning.data_source import DataSource
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.metrics.size import measure_size
from pqqp_lightning.models import CausalLM, ImageClassifier
from pqqp_lightning.modules.constraints import broken_constraints, collect_constraints
from pqqp_lightning.pruning import PruningStage
from pqqp_lightning.quantization import QuantizationStage
from pqqp_lightning.recipe_check import check_stages
from pqqp_lightning.stages import knobs, known_stages, load_installed

load_installed()
STAGES = {n: c for n, c in known_stages().items() if c.__module__.startswith("pqqp_lightning.callbacks")}
COMPRESSING = [name for name, cls in STAGES.items() if cls.compresses]
MODELS = ["llama", "opt", "resnet", "deit"]


def make(name):
    """A stage with its defaults, and half of the weights removed if it prunes."""
    return STAGES[name](0.5) if issubclass(STAGES[name], PruningStage) else STAGES[name]()


def make_model(kind):
    torch.manual_seed(0)
    if kind in ("llama", "opt"):
        return CausalLM(tiny.LLAMA if kind == "llama" else tiny.OPT)
    if kind == "resnet":
        network = {"model": "resnet18", "model_args": {"stem_width": 8, "channels": [8, 8, 16, 16]}}
    else:
        network = {"model": "deit_tiny_patch16_224", "image_size": 32}
        network["model_args"] = {"patch_size": 8, "depth": 2, "embed_dim": 48}
    return ImageClassifier(**network, pretrained=False, num_classes=10)


def make_data(kind, tmp_path):
    if kind in ("llama", "opt"):
        return TokenData(**tiny.write_tokens(tmp_path))
    return ImageData(train_samples=64, calibration_samples=32, evaluation_samples=32, batch_size=32)


def run(tmp_path, kind, *stages, folder="run"):
    module = make_model(kind)
    trainer = tiny.trainer(tmp_path / folder, *stages)
    trainer.fit(module, datamodule=make_data(kind, tmp_path))
    return module, trainer


def problems_of(tmp_path, kind, stages):
    data = DataSource(make_model(kind), datamodule=make_data(kind, tmp_path))
    return [problem for problems in check_stages(stages, data) for problem in problems]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", COMPRESSING)
def test_a_stage_keeps_its_promises_and_its_checkpoint_loads(tmp_path, name, kind):
    module, trainer = run(tmp_path, kind, stage := make(name))
    layers = stage.find_layers(module)
    constraints = collect_constraints(module)
    assert set(constraints) == set(layers)
    assert not broken_constraints(module, constraints)
    size = measure_size(module, layers)
    if isinstance(stage, PruningStage):
        assert size.pruned == pytest.approx(0.5, abs=0.02)  # Wanda rounds per row
        assert size.sparsity >= size.pruned
    if isinstance(stage, QuantizationStage):
        average = sum(layer.bits * layer.entries for layer in size.layers) / size.entries
        assert 3.8 < average <= 4  # bits that differ by layer leave a remainder
    loaded = load(tmp_path / "run")
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert all(not m.training for m in loaded.modules())
    assert trainer.callbacks  # the stages are ordinary callbacks


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_deterministic(tmp_path, name):
    first, _ = run(tmp_path, "llama", make(name), folder="a")
    second, _ = run(tmp_path, "llama", make(name), folder="b")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(STAGES, 2)))
def test_every_ordered_pair_runs_with_both_constraints_or_is_refused_with_the_way_out(tmp_path, first, second, kind):
    stages = [make(first), make(second)]
    if refused := problems_of(tmp_path, kind, stages):
        assert all("Finetune before quantizing" in p or "Give the stages disjoint targets" in p for p in refused)
        with pytest.raises(RecipeError, match=f"stages.{second.lower()} \\({second}\\): "):
            run(tmp_path, kind, *stages)
        assert not (tmp_path / "run").exists()
        return
    module, _ = run(tmp_path, kind, *stages)
    for stage in stages:
        constraints = {name: collect_constraints(module)[name] for name in stage.find_layers(module)}
        if isinstance(stage, PruningStage):
            assert all(c.mask_bits is not None for c in constraints.values())
        if isinstance(stage, QuantizationStage):
            assert all(c.grid is not None for c in constraints.values())
        assert not broken_constraints(module, constraints)


def test_pruned_fraction_is_exact_in_both_orders(tmp_path):
    for order in (("SparseGPT", "GPTQ"), ("GPTQ", "SparseGPT")):
        module, _ = run(tmp_path, "llama", *map(make, order), folder="-".join(order))
        for name, constraints in collect_constraints(module).items():
            assert constraints.kept() * 2 == constraints.shape[0] * constraints.shape[1], name


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_explains_itself(name):
    from pqqp_lightning.listing import documentation

    cls = STAGES[name]
    assert cls.__doc__
    assert cls.source
    assert "Example" in cls.__doc__
    missing = set(knobs(cls)) - set(documentation(cls))
    assert not missing


@pytest.mark.parametrize("name", COMPRESSING)
@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("targets", ["q_prj"], r"targets: 'q_prj' matches no Linear or Conv2d layer. Did you mean 'q_proj'\?"),
        ("ignore", ["*"], r"leave no layer"),
        ("epochs", -1, r"epochs=-1 is negative"),
    ],
)
def test_bad_values_give_worded_errors(tmp_path, name, knob, value, message):
    stage = make(name)
    setattr(stage, knob, value)
    with pytest.raises(RecipeError, match=message):
        run(tmp_path, "llama", stage)


@pytest.mark.parametrize("name", COMPRESSING)
def test_targets_and_ignore_choose_layers(tmp_path, name):
    stage = make(name)
    stage.targets, stage.ignore = ["self_attn"], ["layers.1"]
    module, _ = run(tmp_path, "llama", stage)
    changed = set(collect_constraints(module))
    assert changed == {f"model.model.layers.0.self_attn.{p}_proj" for p in "qkvo"}
    dense = make_model("llama").state_dict()
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
