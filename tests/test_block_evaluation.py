"""Evaluation block by block gives the numbers of a plain validation, whatever the model and its step look like."""

from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from test_multiple_choice import make_data as make_questions
from test_multiple_choice import make_model as make_answerer
from test_multiple_choice import make_rows, make_tokenizer, write_rows
from test_offload import all_sizes  # noqa: F401 - a fixture
from tiny import Regressor, make_data, make_model, regression_loader, trainer
from torch import nn
from torchmetrics.classification import BinaryAUROC

from pqqp_lightning.calibration.hidden_states import HiddenStates
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.metrics.samples import recording
from pqqp_lightning.models import causal_lm
from pqqp_lightning.network import offload
from pqqp_lightning.network.blocks import model_blocks
from pqqp_lightning.network.offload import Offload, offload_model
from pqqp_lightning.runs.block_evaluation import evaluate_by_blocks
from pqqp_lightning.runs.early_stop import StoppedEarly, WatchSamples
from pqqp_lightning.runs.evaluation import evaluate
from pqqp_lightning.runs.run_data import RunData


def plain(run, module, command="validate", **data):
    return getattr(pl.Trainer, command)(run, module, verbose=False, **data)


def by_blocks(run, module, command="validate", **data):
    return evaluate_by_blocks(run, module, partial(getattr(pl.Trainer, command), run, module, **data))


def count_calls(module):
    """A list that gets the position of each block whose forward pass has run."""
    calls = []
    for number, block in enumerate(model_blocks(module).values()):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    return calls


def require_the_same(run, module, command="validate", **data):
    """The metrics are those of a plain evaluation, and each block ran after the block before had run for all."""
    calls = count_calls(module)
    expected = plain(run, module, command, **data)
    passes, blocks = calls.count(0), len(model_blocks(module))
    assert blocks > 1
    calls.clear()
    assert by_blocks(run, module, command, **data) == expected
    require_turns(calls, passes, blocks)
    return expected, passes


def require_turns(calls, passes, blocks):
    """Each block ran for all forward passes after the block before; the first run of the first block was a trial."""
    assert calls == [0, *(number for number in range(blocks) for _ in range(passes))]


@pytest.mark.parametrize("command", ["validate", "test"])
@pytest.mark.parametrize("kind", ["llama", "opt", "deit", "resnet"])
def test_the_metrics_are_those_of_a_plain_validation(kind, command, tmp_path, monkeypatch):
    monkeypatch.setattr(causal_lm, "LOGITS_AT_ONCE", 2 * 16 * 64)  # a language model's batch runs in two parts
    options = {"batch_size": 3} if kind in ("llama", "opt") else {}
    data = make_data(kind, tmp_path, **options)
    _, passes = require_the_same(trainer(tmp_path), make_model(kind, layers=3), command, datamodule=data)
    assert passes == (3 if options else 1)


def test_multiple_choice_is_that_of_a_plain_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(causal_lm, "LOGITS_AT_ONCE", 2**17)
    write_rows(tmp_path / "questions", make_rows())
    data = make_questions(tmp_path, make_tokenizer(tmp_path / "tokenizer"), batch_size=4)
    expected, passes = require_the_same(trainer(tmp_path), make_answerer(), datamodule=data)
    assert {name for loader in expected for name in loader} == {"acc", "acc_norm", "perplexity"}
    assert passes > 7  # of three texts and 13 questions in batches of 4, some in parts


@pytest.mark.parametrize("command", ["validate", "test"])
@pytest.mark.parametrize("kind", ["llama", "resnet"])
@pytest.mark.usefixtures("all_sizes")
def test_an_offloaded_model_is_evaluated_by_blocks_with_its_states_in_a_file(kind, command, tmp_path, monkeypatch):
    run, data = trainer(tmp_path), make_data(kind, tmp_path)
    expected = getattr(run, command)(make_model(kind), datamodule=data, verbose=False)
    module = make_model(kind)
    offload._OFFLOADS.pop(module, None)  # a language model has chosen "auto"
    offload_model(module, "disk")
    calls, writes = count_calls(module), []
    monkeypatch.setattr(HiddenStates, "_write", watched(HiddenStates._write, writes))
    assert getattr(run, command)(module, datamodule=data, verbose=False) == expected
    blocks = len(model_blocks(module))
    passes = (len(calls) - 1) // blocks
    require_turns(calls, passes, blocks)
    assert len(writes) == passes * (blocks + 1)


@pytest.mark.usefixtures("all_sizes")
def test_samples_of_an_offloaded_model_are_kept_and_may_stop_it(tmp_path):
    run, loader = trainer(tmp_path), regression_loader()
    expected = evaluate(run, RunData(Regressor(), validation=loader), keep_samples=True)
    module = Regressor()
    offload_model(module, "disk")
    data = RunData(module, validation=loader)
    found = evaluate(run, data, keep_samples=True)
    assert found.metrics == expected.metrics
    assert torch.equal(found.samples["mse"].states, expected.samples["mse"].states)
    with pytest.raises(StoppedEarly) as stopped:
        evaluate(run, data, keep_samples=True, watch=lambda states: len(states["mse"]) >= 16)
    assert torch.equal(stopped.value.states["mse"], expected.samples["mse"].states[:16])
    assert module.training


def watched(method, calls):
    def watching(*args):
        calls.append(args)
        return method(*args)

    return watching


def on_disk(folder):
    """How a model would be offloaded that is on disk."""
    chosen = Offload()
    chosen.mode, chosen._files.folder = "disk", folder
    return chosen


def test_a_state_keeps_its_values_strides_and_dtype_in_a_file(tmp_path):
    states = HiddenStates(on_disk(tmp_path))
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    kept = [images, torch.randn(4, 6).T, torch.randn(3, 5, dtype=torch.bfloat16), torch.randn(4, 6)[:, 1:3]]
    for state in kept:
        states.append(state)
    for index in (1, 0, 3, 2):
        assert torch.equal(states[index], kept[index])
        assert states[index].dtype == kept[index].dtype
    assert states[0].stride() == images.stride()
    assert states[1].stride() == kept[1].stride()
    states[1], states[2] = kept[1] + 1, torch.ones(7)  # as large as before, and larger
    assert torch.equal(states[1], kept[1] + 1)
    assert torch.equal(states[2], torch.ones(7))
    assert torch.equal(states[0], images)


def test_states_on_a_gpu_fill_half_of_its_memory_then_half_of_the_hosts_then_a_file(tmp_path, monkeypatch):
    place = "pqqp_lightning.calibration.hidden_states."
    monkeypatch.setattr(f"{place}_is_on_gpu", lambda state: True)
    monkeypatch.setattr(f"{place}_free_bytes", lambda where, device: {"device": 2 * 80, "host": 2 * 40}[where])
    states = HiddenStates(on_disk(tmp_path))
    kept = [torch.randn(10) for _ in range(5)]
    for state in kept:
        states.append(state)
    assert [place for place, _ in states._homes] == ["device", "device", "host", "disk", "disk"]
    assert all(torch.equal(states[i], kept[i]) for i in range(5))


def test_a_disk_without_space_is_named(tmp_path):
    states = HiddenStates(on_disk(tmp_path))
    states.append(torch.ones(3))
    states._file.close()
    states._file = Path("/dev/full").open("r+b", buffering=0)  # noqa: SIM115
    with pytest.raises(RecipeError, match="hidden states cannot be stored: No space left on device"):
        states.append(torch.ones(3))


def test_a_head_computes_once_per_forward_pass(tmp_path):
    module = Regressor()
    run = trainer(tmp_path)
    seen = {"inlet": [], "head": []}
    for name, calls in seen.items():
        layer = getattr(module, name)
        real = layer.forward
        layer.forward = lambda x, real=real, calls=calls: calls.append(0) or real(x)
    by_blocks(run, module, dataloaders=regression_loader())
    assert {name: len(calls) for name, calls in seen.items()} == {"inlet": 6, "head": 3}


class Heard(DummyLogger):
    def __init__(self):
        super().__init__()
        self.metrics = []

    def log_metrics(self, metrics, step=None):
        self.metrics.append(metrics)


class Hooks(Callback):
    def __init__(self):
        self.batches = self.ends = 0

    def on_validation_batch_end(self, *_, **__):
        self.batches += 1

    def on_validation_epoch_end(self, *_):
        self.ends += 1


def test_callbacks_loggers_samples_and_the_random_state_see_one_evaluation(tmp_path):
    module, hooks, heard = Regressor(), Hooks(), Heard()
    run = trainer(tmp_path, callbacks=[hooks], logger=heard)
    states = []
    for measure in (plain, by_blocks):
        torch.manual_seed(0)
        with recording(module) as found:
            measure(run, module, dataloaders=regression_loader())
        states.append((found["mse"].states, torch.get_rng_state()))
    (samples, random), (samples_by_blocks, random_by_blocks) = states
    assert torch.equal(samples_by_blocks, samples)
    assert torch.equal(random_by_blocks, random)
    assert (hooks.batches, hooks.ends) == (6, 2)
    assert heard.metrics[0] == heard.metrics[1]
    assert len(heard.metrics) == 2
    assert module.training
    assert all("forward" not in vars(part) for part in module.modules())


@pytest.mark.parametrize(("samples", "passes"), [(4, 2), (6, 3), (7, 12)])
def test_a_watch_may_stop_it_before_the_blocks_have_seen_all_samples(samples, passes, tmp_path):
    module = Regressor()
    calls = count_calls(module)
    with recording(module) as found:
        run = trainer(tmp_path, callbacks=[WatchSamples(found, lambda states: len(states["mse"]) >= samples)])
        with pytest.raises(StoppedEarly) as stopped:
            by_blocks(run, module, dataloaders=regression_loader(batch_size=2))
    assert len(stopped.value.states["mse"]) == 2 * -(-samples // 2)
    blocks = len(model_blocks(module))
    assert len(calls) == 1 + passes * blocks
    assert all("forward" not in vars(part) for part in module.modules())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_half_precision(precision, tmp_path):
    data = make_data("llama", tmp_path)
    require_the_same(trainer(tmp_path, precision=precision), make_model("llama"), datamodule=data)


class Ranked(Regressor):
    """With a metric that keeps every score, and fails without any."""

    def __init__(self):
        super().__init__()
        self.auroc = BinaryAUROC()

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.auroc.update(self(batch[0])[:, 0].sigmoid(), (batch[1][:, 0] > 0).int())

    def on_validation_epoch_end(self):
        self.log("auroc", self.auroc.compute())
        self.auroc.reset()


def test_a_metric_that_keeps_scores(tmp_path):
    require_the_same(trainer(tmp_path), Ranked(), dataloaders=regression_loader())


class UsesEachBlock(Regressor):
    def forward(self, x):
        x = self.inlet(x)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return self.head(sum(outputs))


class SkipsABlock(Regressor):
    def forward(self, x):
        x = self.inlet(x)
        blocks = list(self.blocks)
        for block in blocks if len(x) == 8 else blocks[1:]:
            x = block(x)
        return self.head(x)


class RunsTwice(Regressor):
    """What it runs on depends on what it computed before."""

    def validation_step(self, batch, batch_idx):
        first = self(batch[0])
        self.mse(self(batch[0] + first.mean()), batch[1])
        self.log("mse", self.mse, on_step=False, on_epoch=True)


class InPlace(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return x.add_(self.linear(x))


class WritesToItsInput(Regressor):
    """Its head reads the input of the blocks as well, which they change."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[InPlace(nn.Sequential(nn.Linear(8, 8))) for _ in range(2)])

    def forward(self, x):
        x = self.inlet(x)
        return self.head(self.blocks(x) + x)


class Cached(Regressor):
    """Its blocks get an object that they write to."""

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.forward = self.remember(block.forward)

    def remember(self, forward):
        def remembering(x, cache):
            cache.append(x)
            return forward(x)

        return remembering

    def forward(self, x):
        x, cache = self.inlet(x), CacheOfInputs()
        for block in self.blocks:
            x = block(x, cache)
        return self.head(x + cache[0])


class CacheOfInputs(list):
    pass


@pytest.mark.parametrize("model", [UsesEachBlock, SkipsABlock, RunsTwice, WritesToItsInput, Cached])
def test_a_model_whose_blocks_are_no_chain_is_evaluated_plainly(model, tmp_path):
    module, run = model(), trainer(tmp_path)
    module.inlet.weight.data *= 3
    loader = regression_loader(samples=20)  # the last batch is smaller
    with recording(module) as recorded:
        expected = plain(run, module, dataloaders=loader)
    with recording(module) as found:
        assert by_blocks(run, module, dataloaders=loader) == expected
    assert torch.equal(found["mse"].states[-20:], recorded["mse"].states)
    assert module.training


def test_data_in_another_order_is_evaluated_plainly(tmp_path):
    module, run = Regressor(), trainer(tmp_path)
    loader = torch.utils.data.DataLoader(
        regression_loader().dataset, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    expected = plain(run, module, dataloaders=regression_loader())[0]["mse"]
    assert by_blocks(run, module, dataloaders=loader)[0]["mse"] == pytest.approx(expected, rel=1e-6)


class Fails(Regressor):
    def validation_step(self, batch, batch_idx):
        raise ValueError("the user's own fault")


def test_an_error_of_the_step_is_shown(tmp_path):
    module = Fails()
    with pytest.raises(ValueError, match="the user's own fault"):
        by_blocks(trainer(tmp_path), module, dataloaders=regression_loader())
    assert all("forward" not in vars(part) for part in module.modules())
