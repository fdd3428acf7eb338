"""What both models share: imports, the command line, optimizers; and the causal language model built from a dict."""

import json
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.cli import ReduceLROnPlateau as Plateau
from torch.utils.data import DataLoader

import pqqp_lightning.models as models
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.models import CausalLM, ImageClassifier
from pqqp_lightning.models.transformers_bridge import skip_initialization

TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 64,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 64,
}


def ids(rows=2, length=16):
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def quiet_trainer(**options):
    silent = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", **silent, **options)


def run_cli(model_arguments):
    arguments = ["--model", *model_arguments, "--trainer.logger=false"]
    cli = LightningCLI(LightningModule, subclass_mode_model=True, run=False, save_config_callback=None, args=arguments)
    return cli.model


def test_importing_a_model_does_not_import_the_libraries_of_others():
    code = (
        "import sys; from pqqp_lightning.models import CausalLM; import pqqp_lightning.data; "
        "print([name for name in ('timm', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="CausalML"):
        _ = models.CausalML
    assert "CausalLM" in dir(models)


@pytest.mark.parametrize("name", ["CausalLM", "pqqp_lightning.models.CausalLM"])
def test_the_command_line_builds_a_causal_lm(name):
    model = run_cli([name, f"--model.model={json.dumps(TINY)}", "--model.dtype=bfloat16"])
    assert isinstance(model, CausalLM)
    assert model.model.lm_head.weight.dtype is torch.bfloat16
    assert model.configure_optimizers()["optimizer"].defaults["lr"] == 1e-4


def test_the_command_line_sets_optimizer_and_schedule():
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
    schedule = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 3}}
    given = [f"--model.optimizer={json.dumps(optimizer)}", f"--model.lr_scheduler={json.dumps(schedule)}"]
    built = run_cli(["CausalLM", f"--model.model={json.dumps(TINY)}", *given]).configure_optimizers()
    assert built["optimizer"].defaults["lr"] == 0.5
    assert built["lr_scheduler"]["scheduler"].step_size == 3


def test_the_command_line_takes_a_network_by_name_or_by_class_path():
    by_name = run_cli(
        ["ImageClassifier", "--model.model=resnet18", "--model.pretrained=false", "--model.num_classes=7"]
    )
    assert by_name.num_classes == 7
    own = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 4, "out_features": 6}}
    model = run_cli(["ImageClassifier", f"--model.model={json.dumps(own)}"])
    assert isinstance(model, ImageClassifier)
    assert isinstance(model.model, torch.nn.Linear)
    assert model.num_classes == 6


def test_only_what_requires_a_gradient_is_optimized():
    model = CausalLM(TINY)
    model.model.model.requires_grad_(False)
    optimizer = model.configure_optimizers()["optimizer"]
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [model.model.lm_head.weight.shape]
    model.requires_grad_(False)
    with pytest.raises(RecipeError, match="no parameter of the model requires a gradient"):
        model.configure_optimizers()


def test_a_plateau_schedule_carries_its_monitor():
    model = CausalLM(TINY, lr_scheduler=lambda o: Plateau(o, monitor="perplexity"))
    assert model.configure_optimizers()["lr_scheduler"]["monitor"] == "perplexity"


@pytest.mark.parametrize("settings", [TINY, OPT, {**TINY, "tie_word_embeddings": True}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_skeleton_rebuilds_the_model_bit_for_bit(settings, dtype):
    torch.manual_seed(0)
    model = CausalLM(settings, dtype=dtype).eval()
    skeleton = json.loads(json.dumps(model.skeleton()))
    assert skeleton["class_path"] == "pqqp_lightning.models.CausalLM"
    with skip_initialization():
        rebuilt = CausalLM(**skeleton["init_args"]).eval()
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(ids()), rebuilt(ids()))
    assert len(list(rebuilt.parameters())) == len(list(model.parameters())), "tied weights are tied again"
    for (name, one), (_, other) in zip(model.named_buffers(), rebuilt.named_buffers(), strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


@pytest.mark.parametrize("convert", [lambda m: m.bfloat16(), lambda m: m.to("cpu", torch.bfloat16)])
def test_a_model_converted_later_is_rebuilt_bit_for_bit(convert):
    torch.manual_seed(0)
    model = convert(CausalLM(TINY).eval())
    assert model.model.model.rotary_emb.inv_freq.dtype is torch.float32
    skeleton = model.skeleton()
    assert skeleton["init_args"]["dtype"] == "bfloat16"
    rebuilt = CausalLM(**skeleton["init_args"]).eval()
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(ids()), rebuilt(ids()))


def test_building_follows_the_seed():
    torch.manual_seed(3)
    one = CausalLM(TINY)
    torch.manual_seed(3)
    assert torch.equal(one(ids()), CausalLM(TINY)(ids()))


def test_evaluation_logs_the_perplexity_of_all_next_tokens(monkeypatch):
    torch.manual_seed(0)
    model = CausalLM(TINY)
    batches = DataLoader([{"input_ids": row} for row in ids(5)], batch_size=3)
    losses = torch.nn.functional.cross_entropy(
        model.eval()(ids(5))[:, :-1].flatten(0, 1).double(), ids(5)[:, 1:].flatten()
    )
    trainer = quiet_trainer()
    for run in (trainer.validate, trainer.test):
        [metrics] = run(model, batches, verbose=False)
        assert metrics["perplexity"] == pytest.approx(losses.exp().item(), rel=1e-5)
    seen = []
    monkeypatch.setattr("pqqp_lightning.models.causal_lm.LOGITS_AT_ONCE", 1)
    model.model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(len(out)))
    [metrics] = trainer.validate(model, batches, verbose=False)
    assert metrics["perplexity"] == pytest.approx(losses.exp().item(), rel=1e-5)
    assert set(seen) == {1}, "sequences go through the head one at a time when the logits would be large"


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = CausalLM(TINY, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    batches = DataLoader([{"input_ids": row} for row in ids(4)], batch_size=4)
    trainer = quiet_trainer(max_epochs=10)
    trainer.fit(model, batches)
    assert trainer.callback_metrics["train_loss"] < 0.8 * torch.log(torch.tensor(64.0))


def test_calibration_runs_the_decoder_without_the_head():
    model = CausalLM(TINY)
    model.model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    assert model.calibration_step({"input_ids": ids()}, 0).shape == (2, 16, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**TINY, "model_type": "lama"}, r"'lama'.*Did you mean 'llama'"),
        ({"hidden_size": 32}, r"model_type='' .*For instance: llama"),
        ({**TINY, "model_type": "vit"}, r"model_type='vit' is not a causal language model"),
        ({**TINY, "num_attention_heads": "four"}, r"no llama model has this configuration"),
        ({**TINY, "quantization_config": {"quant_method": "gguf"}}, r"quantization_config is set"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        CausalLM(settings)


def test_a_model_without_a_tokenizer_says_where_to_name_one():
    with pytest.raises(RecipeError, match=r"no tokenizer\. Set data\.tokenizer"):
        _ = CausalLM(TINY).tokenizer


def test_an_unknown_dtype_is_refused():
    with pytest.raises(RecipeError, match=r"dtype='float61'.*Did you mean 'float16'"):
        CausalLM(TINY, dtype="float61")
