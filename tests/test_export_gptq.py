"""The gptq target: codes go over as they are, in the words that the format's description says."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from exports import run_of
from safetensors.torch import load_file

from pqqp_lightning import load
from pqqp_lightning.algorithms.grid import Grid
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.export.export_run import CheckFailed, export_run
from pqqp_lightning.export.targets import gptq as target_file
from pqqp_lightning.network.constraints import constraints_of

WRITTEN = ["rtn4", "rtn3-asymmetric", "rtn4-asymmetric", "rtn5", "rtn8", "pruned-rtn4", "mixed"]
REFUSED = {
    "nf4": "levels of NF4 or FP4",
    "sparse": "has no quantized layer",
    "adapters": "has no quantized layer left .Adapters were merged",
    "uneven": "uneven widths",
    "rtn8-asymmetric": "with zero points and 8 bits",
    "online": "rotate their inputs",
}
UP = "model.layers.1.mlp.up_proj"


def export(tmp_path, name, **options):
    return export_run(run_of(name), to="gptq", out=tmp_path / "model", **options)


def settings_in(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def slowly_decoded(tensors, layer, bits):
    """The weight of one layer, entry by entry: float32 [O, I]."""
    qweight, qzeros, scales, g_idx = (tensors[f"{layer}.{part}"] for part in target_file.PARTS)
    per_word = 32 // bits
    columns, rows = len(g_idx), qweight.shape[1]
    weight = np.zeros((rows, columns), dtype=np.float32)
    for i in range(columns):
        group = int(g_idx[i])
        for o in range(rows):
            code = (int(qweight[i // per_word, o]) >> (bits * (i % per_word))) % 2**bits
            zero = (int(qzeros[group, o // per_word]) >> (bits * (o % per_word))) % 2**bits + 1
            weight[o, i] = float(scales[group, o]) * (code - zero)
    return torch.from_numpy(weight)


@pytest.mark.parametrize("name", [*WRITTEN, "mixed-asymmetric", "quarot"])
def test_every_tensor_decodes_to_the_runs(name, tmp_path):
    done = export(tmp_path, name, dtype="float32")
    assert done.checks[0].endswith("equal the run's in float32.")


@pytest.mark.parametrize(("name", "bits"), [("rtn4", 4), ("rtn3-asymmetric", 4), ("rtn8", 8)])
def test_an_independent_decoder_reads_the_runs_weights(name, bits, tmp_path):
    export(tmp_path, name, check=False)
    weight = load(run_of(name)).model.get_submodule(UP).weight
    assert torch.equal(slowly_decoded(load_file(tmp_path / "model" / "model.safetensors"), UP, bits), weight)


def test_shapes_and_settings_are_those_of_the_format(tmp_path):
    export(tmp_path, "rtn4", check=False)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    rows, columns = load(run_of("rtn4")).model.get_submodule(UP).weight.shape
    assert tensors[f"{UP}.qweight"].shape == (columns // 8, rows)
    assert tensors[f"{UP}.qzeros"].shape == (columns // 32, rows // 8)
    assert tensors[f"{UP}.scales"].dtype == torch.float16
    assert torch.equal(tensors[f"{UP}.g_idx"], torch.arange(columns, dtype=torch.int32) // 32)
    assert set(tensors[f"{UP}.qzeros"].unique().tolist()) == {0x77777777}  # 8 - 1 eight times
    settings = settings_in(tmp_path / "model")
    assert settings == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
    }


def test_layers_that_differ_have_rules_that_also_name_what_vllm_joins(tmp_path):
    done = export(tmp_path, "mixed")
    settings = settings_in(tmp_path / "model")
    assert settings["dynamic"][r"-:model\.layers\.0\.mlp\.down_proj$"] == {}
    assert settings["bits"] == 8
    assert settings["dynamic"][r"+:model\.layers\.0\.mlp\.(?:up_proj|gate_up_proj)$"]["bits"] == 4
    assert "model.layers.0.self_attn.q_proj" in settings["modules_in_block_to_quantize"][0]
    assert any("Layers differ in bits" in remark for remark in done.remarks)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_format_does_not_have_is_refused(name, tmp_path):
    with pytest.raises(RecipeError, match=REFUSED[name]):
        export(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_narrow_codes_need_widening(tmp_path):
    with pytest.raises(RecipeError, match=r"widen=False keeps codes of other widths .* 14 layers.*Use --widen true"):
        export(tmp_path, "rtn5", widen=False)


def test_scales_that_bfloat16_would_change_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"dtype='bfloat16' changes the scales of 14 layers.*Use --dtype float16"):
        export(tmp_path, "rtn4", dtype="bfloat16")


def test_zero_points_become_one_bit_more(tmp_path):
    """Of both signs: programs refuse zero points in this format."""
    for name, bits in (("rtn3-asymmetric", 4), ("rtn4-asymmetric", 8)):
        export_run(run_of(name), to="gptq", out=tmp_path / name, dtype="float32")
        settings = settings_in(tmp_path / name)
        assert (settings["bits"], settings["sym"]) == (bits, True)


def test_odd_groups_and_widths_are_refused_together():
    grid = Grid(4, torch.ones(12, 5), None, 60)
    words = " ".join(text for text, _ in target_file._reasons(torch.zeros(12, 60), grid, 4))
    assert "multiple of 8" in words
    assert "groups GPTQModel does not read" in words


def test_a_writer_that_forgets_the_offset_of_zero_points_fails_its_check(tmp_path, monkeypatch):
    original = target_file._packed

    def forgetful(weight, grid):
        parts = original(weight, grid)
        return parts | {"qzeros": parts["qzeros"] + 0x11111111}

    monkeypatch.setattr(target_file, "_packed", forgetful)
    with pytest.raises(CheckFailed, match="entries differ"):
        export(tmp_path, "rtn4")


def test_a_program_that_needs_a_tokenizer_is_not_asked_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(target_file.GPTQFolder, "runtime", replace(target_file.GPTQFolder.runtime, modules=()))
    done = export(tmp_path, "rtn4")
    assert done.checks[-1] == "Not checked in GPTQModel: it needs a tokenizer, and the run has none."


def test_constraints_of_the_run_are_not_touched(tmp_path):
    before = constraints_of(load(run_of("rtn4-asymmetric")).model.get_submodule(UP)).grid.zero
    export(tmp_path, "rtn4-asymmetric", check=False)
    assert torch.equal(constraints_of(load(run_of("rtn4-asymmetric")).model.get_submodule(UP)).grid.zero, before)
