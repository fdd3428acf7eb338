"""Exported folders, and those of other programs, load as models: their codes are decoded."""

import json
import re
import sys

import pytest
import tiny
import torch
from command_line import prepare, run
from exports import run_of
from safetensors.torch import load_file, save_file
from torch import nn

from pqqp_lightning import load
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.export.export_run import export_run
from pqqp_lightning.models import CausalLM, packed_folders

pytest.importorskip("compressed_tensors")

TARGETS = ("hf", "compressed-tensors", "gptq")
RUNS = ["rtn4", "rtn3-asymmetric", "mixed", "quarot"]


def export(tmp_path, name, to, dtype="float32"):
    export_run(run_of(name), to=to, out=tmp_path / "a model", dtype=dtype, check=False)
    return tmp_path / "a model"


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", RUNS)
def test_a_loaded_folder_computes_what_the_run_does(name, to, tmp_path):
    loaded = CausalLM(str(export(tmp_path, name, to))).eval()
    ids = tiny.token_rows(2)
    assert torch.equal(loaded(ids), load(run_of(name)).eval()(ids)) or name == "quarot"
    assert torch.allclose(loaded(ids), load(run_of(name)).eval()(ids), atol=1e-5)
    assert {type(module) for module in loaded.modules() if hasattr(module, "weight")} >= {nn.Linear, nn.Embedding}


@pytest.mark.parametrize("to", TARGETS)
def test_codes_are_decoded_without_rounding_in_a_float16_folder(to, tmp_path):
    loaded = CausalLM(str(export(tmp_path, "rtn4", to, "float16")))
    name = "model.layers.0.mlp.up_proj.weight"
    own = load(run_of("rtn4")).model.get_parameter(name)
    wanted = own.half().float() if to == "hf" else own
    assert torch.equal(loaded.model.get_parameter(name), wanted)


def perplexity(words):
    return float(re.findall(r"perplexity\D+([\d.]+)", words)[-1])


def test_validate_of_the_exported_folder_gives_the_runs_metric_again(tmp_path, monkeypatch, capsys):
    prepare(tmp_path, monkeypatch)
    assert run("fit", "--config", "recipe.yaml") == 0
    capsys.readouterr()
    assert run("validate", "--run_dir", "run") == 0
    own = perplexity(capsys.readouterr().out)
    for to in TARGETS:
        assert run("export", "run", "--to", to, "--out", to, "--dtype", "float32", "--check", "false") == 0
        (tmp_path / f"{to}.yaml").write_text(RECIPE_OF_A_FOLDER.format(model=to))
        capsys.readouterr()
        assert run("validate", "--config", f"{to}.yaml") == 0
        assert perplexity(capsys.readouterr().out) == own


RECIPE_OF_A_FOLDER = """\
model: {{class_path: CausalLM, init_args: {{model: {model}}}}}
data:
  class_path: TokenData
  init_args: {{calibration: calibration.npy, evaluation: evaluation.npy}}
trainer: {{accelerator: cpu, devices: 1, enable_progress_bar: false}}
"""


def test_a_folder_of_another_program_loads(tmp_path):
    """As llm-compressor writes it: groups named by expressions, a format for each, 8-bit codes not packed."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(0)
    dense = CausalLM(tiny.LLAMA).model
    dense.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(file)
    groups = {
        "group_0": (
            ["re:.*self_attn.*"],
            "pack-quantized",
            QuantizationArgs(num_bits=4, group_size=16, strategy="group"),
        ),
        "group_1": (["re:.*mlp.*"], "int-quantized", QuantizationArgs(num_bits=8, strategy="channel")),
    }
    written = {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        targets, kind, arguments = groups["group_0" if "self_attn" in name else "group_1"]
        weight = tensors.pop(name)
        groups_of = weight.unflatten(1, (-1, arguments.group_size or weight.shape[1]))
        scale = groups_of.abs().amax(-1) / (2 ** (arguments.num_bits - 1) - 1)
        scheme = QuantizationScheme(targets=targets, weights=arguments)
        compressor = BaseCompressor.get_value_from_registry(kind)
        parts = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        layer = name.removesuffix(".weight")
        tensors.update({f"{layer}.{part}": tensor.contiguous() for part, tensor in parts.items()})
        written[layer] = (groups_of / scale[..., None]).round().mul(scale[..., None]).flatten(1)
    save_file(tensors, file, metadata={"format": "pt"})
    config_groups = {}
    for group, (targets, kind, arguments) in groups.items():
        weights = arguments.model_dump(mode="json", exclude_none=True)
        config_groups[group] = {"targets": targets, "weights": weights, "format": kind}
    edit(
        tmp_path / "theirs",
        {"quant_method": "compressed-tensors", "config_groups": config_groups, "format": "mixed-precision"},
    )
    loaded = CausalLM(str(tmp_path / "theirs")).model
    for layer, weight in written.items():
        assert torch.allclose(loaded.get_submodule(layer).weight, weight, atol=1e-6), layer


def edit(folder, quantization):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))


def linear_group(**settings):
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    return {"group_0": {"targets": ["Linear"], "weights": weights, **settings}}


CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes"}, r"already quantized \(bitsandbytes\), and only compressed-tensors and gptq"),
        ({"bits": 4}, r"already quantized \(unknown\)"),
        (CT | {"config_groups": linear_group(input_activations={"num_bits": 8})}, "rounds activations while it runs"),
        (CT | {"config_groups": linear_group(), "kv_cache_scheme": {"num_bits": 8}}, "rounds keys and values"),
        (CT | {"transform_config": {"config_groups": {"R1": {}}}}, "rotates activations while it runs"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "has codes of 3 bits, and only 4 and 8 are decoded"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, "in the format gptq_v2"),
    ],
)
def test_what_is_not_decoded_is_refused_with_the_way_out(settings, message, tmp_path):
    CausalLM(tiny.LLAMA).model.save_pretrained(tmp_path)
    edit(tmp_path, settings)
    with pytest.raises(RecipeError, match=message) as refusal:
        CausalLM(str(tmp_path))
    assert all(problem.way_out and problem.argument == "model" for problem in refusal.value.problems)


def test_a_missing_library_is_named_with_what_installs_it(tmp_path, monkeypatch):
    folder = export(tmp_path, "rtn4", "compressed-tensors")
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    monkeypatch.setattr(packed_folders.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"compressed-tensors, which is not installed. Install it: pip install"):
        CausalLM(str(folder))


def test_codes_that_do_not_fit_the_configuration_are_refused(tmp_path):
    folder = export(tmp_path, "rtn4", "gptq")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.qweight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="cannot be read"):
        CausalLM(str(folder))
