"""A loaded model computes what the saved one did: the checkpoint's probe finds a module that does not."""

import json
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pqqp_lightning import load
from pqqp_lightning.callbacks import RTN, ActivationQuantization, Finetune, Magnitude
from pqqp_lightning.checkpoint.probe import MOST_BATCH_BYTES, read_probe, take_probe
from pqqp_lightning.checkpoint.save import save_checkpoint
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.storage.records import read_records
from pqqp_lightning.storage.run_folder import MANIFEST, PROBE, WEIGHTS


class Sloped(tiny.Regressor):
    """A user's module without save_hyperparameters, whose arguments all have defaults."""

    def __init__(self, slope: float = 0.01, residual: bool = False):
        super().__init__()
        self.slope, self.residual = slope, residual

    def forward(self, x):
        h = F.leaky_relu(self.inlet(x), self.slope)
        return self.head(self.blocks(h) + h if self.residual else self.blocks(h))


class Recorded(Sloped):
    def __init__(self, slope: float = 0.01, residual: bool = False):
        super().__init__(slope, residual)
        self.save_hyperparameters()


class Partly(Sloped):
    def __init__(self, slope: float = 0.01, residual: bool = False):
        super().__init__(slope, residual)
        self.save_hyperparameters(ignore=["residual"])


class Extended(Sloped):
    """Hyperparameters that are not arguments of the constructor."""

    def __init__(self, slope: float = 0.01):
        super().__init__(slope)
        self.save_hyperparameters()
        self.hparams.parameters = 123


class Configured(Sloped):
    """``save_hyperparameters(config)`` records what is in the argument."""

    def __init__(self, config):
        super().__init__(config["slope"], config.get("residual", False))
        self.save_hyperparameters(config)


class Around(tiny.Regressor):
    def __init__(self, backbone, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"])
        self.inlet = backbone


def fit(folder, module, *stages, evaluation=None, **options):
    evaluation = evaluation or tiny.regression_loader(16, seed=1)
    tiny.trainer(folder, *(stages or [Magnitude(0.5)]), **options).fit(module, tiny.regression_loader(), evaluation)
    return module


def assert_same(a, b):
    x = tiny.regression_data(4, seed=5)[:][0]
    assert torch.equal(a.eval()(x), b(x))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: Sloped(slope=0.3), r"defaults of slope, residual: it does not call save_hyperparameters"),
        (lambda: Sloped(residual=True), r"defaults of slope, residual: it does not call save_hyperparameters"),
        (lambda: Partly(0.3, residual=True), r"defaults of residual: save_hyperparameters leaves them out"),
    ],
)
def test_a_module_that_is_built_with_other_arguments_is_refused(tmp_path, module, message):
    saved = fit(tmp_path, module(), Magnitude(0.5), RTN(4))
    with pytest.raises(RecipeError, match=rf"was built computes something else .*largest difference .*{message}"):
        load(tmp_path)
    assert_same(saved, load(tmp_path, module()))
    with pytest.raises(RecipeError, match="module that was passed computes something else"):
        load(tmp_path, Sloped(0.7))


class Shaped(tiny.Regressor):
    """A user's module without save_hyperparameters, whose arguments decide shapes and names."""

    def __init__(self, width: int = 8, more: bool = False):
        super().__init__()
        self.aside = nn.Linear(width, 2)
        if more:
            self.more = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 9}, r"aside\.weight has shape \[2, 9\] instead of \[2, 8\]: it is of another model"),
        ({"more": True}, r"is of another model: 2 layers \(more\.bias, more\.weight\) in only one of the two"),
    ],
)
def test_a_module_that_is_built_in_other_shapes_is_to_be_passed(tmp_path, arguments, message):
    save_checkpoint(Shaped(**arguments), tmp_path / "model")
    with pytest.raises(RecipeError, match=rf"{message}.* defaults of width, more: .* Pass module="):
        load(tmp_path / "model")
    with pytest.raises(RecipeError, match=rf"{message}\. Use the recipe that made it"):
        load(tmp_path / "model", Shaped())
    load(tmp_path / "model", Shaped(**arguments))


def test_attributes_set_after_construction_are_found(tmp_path):
    module = Recorded()
    module.slope = 0.3
    fit(tmp_path, module)
    with pytest.raises(RecipeError, match="Attributes may have been set after construction"):
        load(tmp_path)


@pytest.mark.parametrize(
    "module",
    [
        lambda: Recorded(0.3, residual=True),
        lambda: Extended(0.3),
        lambda: Configured({"slope": 0.3}),
        Sloped,
    ],
)
def test_a_module_that_can_be_built_is_built(tmp_path, module, recwarn):
    assert_same(fit(tmp_path, module()), load(tmp_path))
    assert not [w for w in recwarn if "not known" in str(w.message)]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (
            lambda: Around(nn.Linear(8, 8)),
            "Around's constructor needs backbone, and save_hyperparameters leaves them out",
        ),
        (lambda: Configured({"slope": 0.3, 1: 2}), "arguments config of Configured are not plain data"),
    ],
)
def test_why_a_module_cannot_be_built_is_said(tmp_path, module, reason):
    saved = fit(tmp_path, module())
    with pytest.raises(RecipeError, match=rf"does not say how to build its module\. Pass one: .*{reason}"):
        load(tmp_path)
    assert_same(saved, load(tmp_path, module()))


def test_test_validate_and_a_resumed_run_compare_as_well(tmp_path):
    fit(tmp_path, Sloped(0.3), Magnitude(0.5), RTN(4))
    for command in ("validate", "test"):
        with pytest.raises(RecipeError, match="module that was passed computes something else"):
            getattr(tiny.trainer(tmp_path), command)(Sloped(), tiny.regression_loader(), ckpt_path=tmp_path)
    tiny.trainer(tmp_path).validate(Sloped(0.3), tiny.regression_loader(), ckpt_path=tmp_path, verbose=False)
    engine = tiny.trainer(tmp_path, Magnitude(0.5), RTN(4))
    with pytest.raises(RecipeError, match="module that was passed computes something else"):
        engine.fit(Sloped(), tiny.regression_loader(), tiny.regression_loader(16, seed=1), ckpt_path="last")


def test_a_checkpoint_of_an_earlier_version_loads_with_one_warning(tmp_path, recwarn):
    fit(tmp_path, Sloped(0.3))
    (tmp_path / "model" / PROBE).unlink()
    assert load(tmp_path).slope == 0.01
    warnings = [str(w.message) for w in recwarn if "not known" in str(w.message)]
    assert len(warnings) == 1
    assert "no outputs to compare with. Sloped was built with the defaults of slope, residual" in warnings[0]
    recwarn.clear()
    load(tmp_path, Sloped(0.3))
    assert not [w for w in recwarn if "not known" in str(w.message)]


def test_the_probe_is_small_and_no_part_of_the_size(tmp_path):
    fit(tmp_path, Sloped(0.3))
    model = tmp_path / "model"
    counted = sum((model / name).stat().st_size for name in (WEIGHTS, MANIFEST))
    assert json.loads((tmp_path / "report.json").read_text())["checkpoint"]["file_bytes"] == counted
    assert (model / PROBE).stat().st_size < 2000
    (model / PROBE).write_bytes((model / PROBE).read_bytes()[:-3])
    with pytest.raises(RecipeError, match=r"probe\.safetensors: is truncated or altered .* Delete it"):
        load(tmp_path, Sloped(0.3))


@dataclass
class Output:
    loss: torch.Tensor
    parts: tuple


FORMS = {
    "dataclass": lambda y: Output(y.sum(), (y, None)),
    "dictionary": lambda y: OrderedDict(logits=y, cache=object()),
    "nested": lambda y: [{"a": (y,)}, 3],
}


@pytest.mark.parametrize("form", FORMS)
def test_outputs_of_any_form_are_compared(tmp_path, form):
    class Formed(Sloped):
        def forward(self, x):
            return FORMS[form](super().forward(x))

        def validation_step(self, batch, batch_idx):
            self(batch[0])
            self.log("mse", 1.0)

    save_checkpoint(Formed(0.3), tmp_path / "model", probe=take_probe(Formed(0.3), batch()))
    load(tmp_path / "model", Formed(0.3))
    with pytest.raises(RecipeError, match="something else"):
        load(tmp_path / "model", Formed(0.1))


def batch():
    return tuple(tiny.regression_data(4, seed=1)[:])


class Piecewise(Sloped):
    """Its step calls parts of the model, with arithmetic between them."""

    def validation_step(self, batch, batch_idx):
        h = F.leaky_relu(self.inlet(batch[0]), self.slope)
        self.mse(self.head(self.blocks(h)), batch[1])
        self.log("mse", self.mse)


class NeedsTrainer(Sloped):
    """Its step works inside of a run alone, its forward anywhere."""

    def validation_step(self, batch, batch_idx):
        assert self.trainer.world_size
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [Piecewise, NeedsTrainer])
def test_steps_of_any_form_are_compared(tmp_path, kind):
    saved = fit(tmp_path, kind(0.3))
    assert read_probe(tmp_path / "model").outputs
    assert_same(saved, load(tmp_path, kind(0.3)))
    with pytest.raises(RecipeError, match="something else"):
        load(tmp_path)


class Random(Sloped):
    def forward(self, x):
        return super().forward(x) + torch.rand(2)


class Broken(Sloped):
    """Its forward works inside of a run alone."""

    def forward(self, x):
        assert self.trainer is not None
        return super().forward(x)


@pytest.mark.parametrize(("kind", "reason"), [(Random, "something else in every pass"), (Broken, "not attached to a")])
def test_what_cannot_be_recorded_is_said_at_load(tmp_path, kind, reason):
    saved = fit(tmp_path, kind(0.3))
    assert read_records(tmp_path)[-1]["name"] == "magnitude"
    with pytest.warns(UserWarning, match=rf"is not known: its outputs could not be recorded \(.*{reason}"):
        loaded = load(tmp_path, kind(0.3))
    assert torch.equal(saved.head.weight, loaded.head.weight)


def test_dropout_modes_buffers_and_random_state_stay(tmp_path):
    class Counting(tiny.Regressor):
        def __init__(self):
            super().__init__(dropout=0.5)
            self.register_buffer("passes", torch.zeros(()))
            self.blocks[0].eval()

        def forward(self, x):
            self.passes += 1
            return super().forward(x)

    module = Counting()
    modes = [part.training for part in module.modules()]
    state = torch.get_rng_state()
    probe = take_probe(module, batch())
    assert probe.outputs
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(state, torch.get_rng_state())
    assert module.passes == 0
    assert module.mse._update_count == 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
@pytest.mark.parametrize("stages", [lambda: [RTN(4)], lambda: [ActivationQuantization(4), Finetune(1)]])
def test_other_precisions_load(tmp_path, precision, stages, recwarn):
    if precision == "16-true" and len(stages()) > 1:
        pytest.skip("AdamW's eps vanishes in float16")
    fit(tmp_path, Recorded(0.3), *stages(), precision=precision)
    load(tmp_path)
    assert not [w for w in recwarn if "not known" in str(w.message)]
    with pytest.raises(RecipeError, match="something else"):
        load(tmp_path, Recorded(0.9))


class Wide(tiny.Regressor):
    """Its outputs are as large as its images."""

    def validation_step(self, batch, batch_idx):
        self.log("mse", self(batch[0].mean((1, 2)).repeat(1, 8)[:, :8].float()).mean())
        return batch[0].flatten(1)


def test_large_batches_and_outputs_are_kept_small(tmp_path):
    images = DataLoader(TensorDataset(torch.rand(4, 400, 300, 3)), batch_size=4)  # 1.4 MB each
    fit(tmp_path, Wide(), evaluation=images)
    probe = load_file(tmp_path / "model" / PROBE)
    assert sum(t.nbytes for t in probe.values()) < MOST_BATCH_BYTES
    assert probe["input.0"].dtype == torch.float16
    assert max(t.numel() for name, t in probe.items() if name.startswith("output")) <= 4096
    load(tmp_path)
    larger = take_probe(Wide(), (torch.rand(1, 900, 900, 3),))  # the call of the model in the step is small
    assert larger.form["run"] == "call"
    assert larger.outputs


def test_long_texts_are_cut(tmp_path):
    module = tiny.make_model("llama")
    data = {"input_ids": tiny.token_rows(1).repeat(1, 4)[:, :50].repeat(1, 4), "attention_mask": torch.ones(1, 200)}
    probe = take_probe(module, data)
    assert [tuple(t.shape) for t in probe.inputs] == [(1, 64), (1, 64)]
    assert len(probe.outputs[0]) == 64 * 64
