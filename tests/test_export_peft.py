"""The peft target: an adapter folder with its base, which PEFT puts together to the run's model."""

import json

import pytest
import tiny
import torch
from exports import checks_here, run_of  # noqa: F401  # a fixture
from safetensors.torch import load_file

import pqqp_lightning.callbacks as c
from pqqp_lightning import load
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.export.export_run import CheckFailed, export_run
from pqqp_lightning.export.targets import peft as target_file
from pqqp_lightning.models import CausalLM

LAYER = "model.layers.1.mlp.up_proj"


def export(run, tmp_path, **options):
    return export_run(run, to="peft", out=tmp_path / "a model", **{"dtype": "float32"} | options)


def made(tmp_path, *stages, model=None):
    """The folder of a run of these stages."""
    torch.manual_seed(0)
    module = CausalLM(model or tiny.LLAMA)
    tiny.trainer(tmp_path / "run", *stages).fit(module, datamodule=tiny.make_data("llama", tmp_path))
    return tmp_path / "run"


@pytest.mark.parametrize("base", ["hf", "compressed-tensors"])
def test_peft_computes_the_runs_outputs_from_base_and_adapter(base, tmp_path, checks_here):  # noqa: F811
    pytest.importorskip("compressed_tensors")
    done = export(run_of("adapters"), tmp_path, base=base)
    assert done.agreement.largest_difference < 1e-5
    assert f"belongs to the model in base ({base})" in done.remarks[0]


def test_the_base_keeps_the_codes_of_the_run(tmp_path):
    export(run_of("adapters"), tmp_path, base="gptq", check=False)
    written = load_file(tmp_path / "a model" / "base" / "model.safetensors")
    assert f"{LAYER}.qweight" in written
    assert not any("lora" in name for name in written)


def test_qlora_is_what_bitsandbytes_and_peft_load(tmp_path, checks_here):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    wide = tiny.LLAMA | {"hidden_size": 64, "intermediate_size": 128}
    run = made(tmp_path, c.QLoRA(learning_rate=0.05), model=wide)
    done = export(run, tmp_path, base="bitsandbytes")
    assert done.agreement.divergence < 1e-3


def test_the_adapter_is_the_runs(tmp_path):
    export(run_of("adapters"), tmp_path, check=False)
    written = load_file(tmp_path / "a model" / "adapter_model.safetensors")
    wrapper = load(run_of("adapters")).model.get_submodule(LAYER)
    (name,) = wrapper.active_adapters
    assert torch.equal(written[f"base_model.model.{LAYER}.lora_A.weight"], wrapper.lora_A[name].weight)
    assert torch.equal(written[f"base_model.model.{LAYER}.lora_B.weight"], wrapper.lora_B[name].weight)
    config = json.loads((tmp_path / "a model" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_several_adapters_of_other_ranks_become_one(tmp_path, checks_here):  # noqa: F811
    first = c.LoRA(rank=4, merge=False, learning_rate=0.05, targets=["*q_proj", "*.0.mlp.*"])
    second = c.LoRA(rank=2, alpha=3.0, merge=False, learning_rate=0.05, targets=["*.mlp.*"])
    done = export(made(tmp_path, first, second), tmp_path)
    assert done.agreement.largest_difference < 1e-5
    config = json.loads((tmp_path / "a model" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {
        **{f"model.layers.0.mlp.{name}_proj": 6 for name in ("gate", "up", "down")},
        **{f"model.layers.1.mlp.{name}_proj": 2 for name in ("gate", "up", "down")},
    }


def test_adapters_on_transposed_weights_are_written_too(tmp_path, checks_here):  # noqa: F811
    settings = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    run = made(tmp_path, c.LoRA(merge=False, learning_rate=0.05), model=settings)
    assert export(run, tmp_path).agreement.largest_difference < 1e-5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rtn4", {}, "keeps no adapters apart: they are merged, or there are none. Set merge: false"),
        ("adapters", {"base": "gguf"}, "base='gguf' is not one of hf, compressed-tensors, bitsandbytes, gptq"),
        ("adapters", {"base": "bitsandbytes"}, "integer codes, which this format does not have"),
        ("adapters", {"base": "gptq", "dtype": "bfloat16"}, "dtype='bfloat16' changes the scales"),
    ],
)
def test_what_cannot_be_written_is_refused(name, options, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        export(run_of(name), tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_base_of_several_settings_has_other_formats(tmp_path, checks_here):  # noqa: F811
    pytest.importorskip("compressed_tensors")
    quantize = c.RTN(4, group_size=16, targets=["*mlp*"])
    rest = c.RTN(8, targets=["*self_attn*"])
    run = made(tmp_path, quantize, rest, c.LoRA(merge=False, learning_rate=0.05))
    with pytest.raises(RecipeError, match=r"several settings.* Use --base hf or gptq"):
        export(run, tmp_path, base="compressed-tensors")
    assert export(run, tmp_path, base="gptq").checks[0].endswith("equal the run's in float32.")


def test_an_adapter_of_another_scale_fails_the_check(tmp_path, checks_here, monkeypatch):  # noqa: F811
    original = target_file._config
    monkeypatch.setattr(target_file, "_config", lambda model: original(model) | {"lora_alpha": 160})
    with pytest.raises(CheckFailed, match="Outputs differ too much"):
        export(run_of("adapters"), tmp_path)
