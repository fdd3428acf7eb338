"""The compressed-tensors target: codes go over as they are, and transformers computes what the run does."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from exports import checks_here, run_of  # noqa: F401  # a fixture
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pqqp_lightning import load
from pqqp_lightning.algorithms.grid import Grid, decode, encode, fit_grid
from pqqp_lightning.callbacks import RTN
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.export.export_run import FAILED, CheckFailed, export_run
from pqqp_lightning.export.grids import in_groups, in_rows, wider_bits, with_zero_points
from pqqp_lightning.export.targets import compressed_tensors as target_file
from pqqp_lightning.models import CausalLM
from pqqp_lightning.network.constraints import constraints_of

pytest.importorskip("compressed_tensors")

WRITTEN = ["rtn4", "rtn3-asymmetric", "rtn5", "rtn8", "rtn8-asymmetric", "pruned-rtn4", "mixed", "mixed-asymmetric"]
REFUSED = {
    "nf4": "levels of NF4 or FP4",
    "sparse": "has no quantized layer",
    "adapters": "has no quantized layer left .Adapters were merged",
    "uneven": "uneven widths",
    "online": "rotate their inputs",
    "rounded-to-4": "rounds the inputs of 14 layers .* not to 8 bits",
    "rounded-dense": r"rounds the inputs of 8 layers .* without codes.*Quantize these layers too",
    "rounded-groups": "rounds the inputs of 14 layers .* with scales for groups of columns",
    "rounded-asymmetric": "rounds the inputs of 14 layers .* with zero points",
    "rounded-values": "has 4 layers .* that round keys or values",
}


def export(tmp_path, name, **options):
    return export_run(run_of(name), to="compressed-tensors", out=tmp_path / "model", **options)


def codes_in(folder, layer, bits):
    """The codes of one layer as the library unpacks them: uint8 [O, I]."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    tensors = load_file(folder / "model.safetensors")
    shape = tensors[f"{layer}.weight_shape"]
    signed = unpack_from_int32(tensors[f"{layer}.weight_packed"], bits, torch.Size(shape.tolist()))
    return (signed.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)


@pytest.mark.parametrize("name", [*WRITTEN, "quarot"])
def test_transformers_computes_the_same_from_the_codes(name, tmp_path, checks_here):  # noqa: F811
    done = export(tmp_path, name, dtype="float32")
    assert done.agreement.largest_difference == 0
    assert done.agreement.perplexity == done.agreement.own_perplexity


@pytest.mark.parametrize("name", ["rtn4", "rtn3-asymmetric"])
def test_float16_rounds_dense_weights_alone(name, tmp_path, checks_here):  # noqa: F811
    done = export(tmp_path, name)
    assert done.agreement.divergence < 1e-5


@pytest.mark.parametrize(("name", "bits"), [("rtn4", 4), ("pruned-rtn4", 4), ("rtn8", 8), ("rtn8-asymmetric", 8)])
def test_codes_and_scales_are_those_of_the_run(name, bits, tmp_path):
    export(tmp_path, name, check=False)
    written = load_file(tmp_path / "model" / "model.safetensors")
    network = load(run_of(name)).model
    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        module = network.get_submodule(layer)
        grid = constraints_of(module).grid
        assert torch.equal(codes_in(tmp_path / "model", layer, bits), encode(module.weight, grid))
        assert torch.equal(written[f"{layer}.weight_scale"], grid.scale.expand(len(module.weight), -1))


def test_codes_keep_their_width_unless_they_may_be_widened(tmp_path, checks_here):  # noqa: F811
    done = export(tmp_path, "rtn5", widen=False, dtype="float32")
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == 5
    assert done.agreement.largest_difference == 0
    assert any("no kernel for the bits" in remark for remark in done.remarks)


def test_joined_layers_get_one_width(tmp_path):
    done = export(tmp_path, "mixed", check=False)
    groups = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]["config_groups"]
    bits = {name: group["weights"]["num_bits"] for group in groups.values() for name in group["targets"]}
    layer = "model.layers.0"
    assert bits[f"{layer}.self_attn.q_proj"] == bits[f"{layer}.self_attn.v_proj"] == 8  # 3 and 5 bits
    assert bits[f"{layer}.mlp.up_proj"] == 4  # 3 bits
    assert any("joins 4 layers" in remark for remark in done.remarks)  # k_proj and gate_proj stay dense


def test_several_settings_with_zero_points_need_widening(tmp_path):
    with pytest.raises(RecipeError, match=r"widen=False keeps zero points in several settings.*Use --widen true"):
        export(tmp_path, "mixed-asymmetric", widen=False)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_format_does_not_have_is_refused(name, tmp_path):
    with pytest.raises(RecipeError, match=REFUSED[name]):
        export(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_zeros_take_the_place_of_removed_channels(tmp_path, checks_here):  # noqa: F811
    done = export(tmp_path, "uneven", pad=True, dtype="float32")
    assert done.agreement.largest_difference == 0


def rounded_by_127_and_a_half(layer, args):
    scale = args[0].abs().amax(-1, keepdim=True) / 127.5
    return (args[0] / scale).round().clamp(-128, 127) * scale


@pytest.mark.parametrize(("name", "layers"), [("rounded", 14), ("rounded-rtn4", 14), ("rounded-mlp", 6)])
def test_transformers_rounds_the_inputs_of_layers_as_the_run_does(name, layers, tmp_path, checks_here):  # noqa: F811
    """With one difference: it divides a token's largest value by 127.5 for the scale, and the run by 127."""
    done = export(tmp_path, name, dtype="float32")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    rounding = [group for group in settings["config_groups"].values() if group.get("input_activations")]
    assert [group["format"] for group in rounding] == ["int-quantized"]
    assert rounding[0]["input_activations"]["dynamic"] is True
    assert settings["format"] == ("int-quantized" if layers == 14 else "mixed-precision")
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert sum(tensor.dtype == torch.int8 for tensor in written.values()) == layers
    assert any("127.5" in remark for remark in done.remarks)

    network = load(run_of(name)).model
    module = network.get_submodule("model.layers.0.mlp.up_proj")
    grid = replace(constraints_of(module).grid, bits=8)
    codes = encode(module.weight, grid).to(torch.int16) - 128
    assert torch.equal(written["model.layers.0.mlp.up_proj.weight"].to(torch.int16), codes)
    ids = torch.arange(32)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(input_ids=ids).logits
    for layer in network.modules():
        if layer._forward_pre_hooks:
            layer._forward_pre_hooks.clear()
            layer.register_forward_pre_hook(rounded_by_127_and_a_half)
    assert torch.allclose(network(input_ids=ids).logits, loaded, atol=1e-5)


def test_rounded_inputs_of_narrow_codes_need_widening(tmp_path):
    with pytest.raises(RecipeError, match=r"widen=False leaves 14 layers .* in bits that no kernel reads"):
        export(tmp_path, "rounded-rtn4", widen=False)


def test_a_folder_that_rounds_inputs_is_not_read_back(tmp_path):
    export(tmp_path, "rounded", check=False)
    with pytest.raises(RecipeError, match=r"rounds activations while it runs.*The stage ActivationQuantization"):
        CausalLM(str(tmp_path / "model"))


def test_scales_that_bfloat16_would_change_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"dtype='bfloat16' changes the scales of 14 layers.*Use --dtype float16"):
        export(tmp_path, "rtn4", dtype="bfloat16")


def test_a_writer_that_rounds_again_fails_its_check(tmp_path, monkeypatch):
    """A grid fitted to the rounded weights has other scales: what quantizers do that start from dense weights."""
    original = target_file._packed

    def requantized(weight, grid, dtype):
        return original(weight, in_rows(fit_grid(weight, grid.bits, group_size=grid.group_size), len(weight)), dtype)

    monkeypatch.setattr(target_file, "_packed", requantized)
    with pytest.raises(CheckFailed, match="entries differ"):
        export(tmp_path, "pruned-rtn4")
    assert (tmp_path / "model" / FAILED).exists()


def test_a_missing_library_is_named_with_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(target_file.CompressedTensors, "requires", ("no_such_library",))
    with pytest.raises(RecipeError, match=r"no-such-library, which is not installed.*pqqp-lightning\[export\]"):
        export(tmp_path, "rtn4")


# --- codes ---


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_wider_codes_stand_for_the_same_values(bits, symmetric):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (6, 8), generator=generator).to(torch.uint8)
    zero = None if symmetric else torch.randint(0, 2**bits, (6, 2), generator=generator).to(torch.uint8)
    grid = Grid(bits, torch.rand(6, 2, generator=generator) + 0.1, zero, 8)
    weight = decode(codes, grid)
    for wider in (replace(grid, bits=8), in_groups(grid, 4), with_zero_points(grid), in_rows(grid, 6)):
        assert torch.equal(decode(encode(weight, wider), wider), weight)


def test_the_width_is_that_of_the_widest_joined_layer():
    def grid(bits):
        return Grid(bits, torch.ones(1, 1), None, 4)

    grids = {"a.q_proj": grid(3), "a.k_proj": grid(5), "a.v_proj": grid(2), "a.o_proj": grid(2), "b.q_proj": grid(3)}
    assert wider_bits(grids, (4, 8)) == {"a.q_proj": 8, "a.k_proj": 8, "a.v_proj": 8, "a.o_proj": 4, "b.q_proj": 4}


def test_quantized_layers_that_are_not_linear_are_written_as_values(tmp_path, checks_here):  # noqa: F811
    """GPT-2's Conv1D holds its weight transposed: codes of it would be another matrix."""
    settings = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    data = tiny.make_data("llama", tmp_path)
    tiny.trainer(tmp_path / "run", RTN(4)).fit(CausalLM(settings), datamodule=data)
    with pytest.raises(RecipeError, match=r"no quantized layer left .The codes of .* not Linear"):
        export_run(tmp_path / "run", to="compressed-tensors", out=tmp_path / "model")
    done = export_run(tmp_path / "run", to="hf", out=tmp_path / "model", dtype="float32")
    assert done.agreement.largest_difference < 1e-5
