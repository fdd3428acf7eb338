"""The bitsandbytes target: NF4 and FP4 codes as they are, and transformers computes what the run does."""

import pytest
import tiny
import torch
from exports import checks_here, run_of  # noqa: F401  # a fixture

from pqqp_lightning.callbacks import FP4, NF4, Magnitude
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.export.export_run import export_run

pytest.importorskip("bitsandbytes")
NARROW = ["*k_proj", "*v_proj", "*lm_head"]
"""Layers of 16 rows in the tiny model."""
REFUSED = {
    "nf4": "rows are not a multiple of 32",
    "rtn4": "with integer codes",
    "sparse": "has no quantized layer",
    "online": "rotate their inputs",
}


@pytest.mark.parametrize(
    "stages",
    [
        [NF4(32, ignore=NARROW)],
        [FP4(32, ignore=NARROW)],
        [Magnitude(0.5), NF4(32, ignore=NARROW)],
        [NF4(32, targets=["*mlp*"])],
    ],
    ids=["nf4", "fp4", "pruned", "half"],
)
def test_transformers_computes_the_same_from_the_codes(stages, tmp_path, checks_here):  # noqa: F811
    module = tiny.make_model("llama")
    tiny.trainer(tmp_path / "run", *stages).fit(module, datamodule=tiny.make_data("llama", tmp_path))
    done = export_run(tmp_path / "run", to="bitsandbytes", out=tmp_path / "model", dtype="float32")
    assert done.agreement.divergence < 1e-6
    assert done.agreement.largest_difference < 1e-2  # its kernel for processors computes in bfloat16
    half = export_run(tmp_path / "run", to="bitsandbytes", out=tmp_path / "half")
    assert half.agreement.divergence < 1e-4
    assert half.size_bytes < done.size_bytes


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_format_does_not_have_is_refused(name, tmp_path):
    with pytest.raises(RecipeError, match=REFUSED[name]):
        export_run(run_of(name), to="bitsandbytes", out=tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_both_codebooks_in_one_model_are_refused(tmp_path):
    stages = [NF4(32, targets=["*mlp*"]), FP4(32, targets=["*self_attn*"])]
    tiny.trainer(tmp_path / "run", *stages).fit(tiny.make_model("llama"), datamodule=tiny.make_data("llama", tmp_path))
    with pytest.raises(RecipeError, match="mixes NF4 and FP4"):
        export_run(tmp_path / "run", to="bitsandbytes", out=tmp_path / "model")


def test_the_packed_codes_are_those_of_the_library(tmp_path):
    """bitsandbytes quantizes the dense weight to the same bytes."""
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import load_file

    stage = NF4(64, targets=["*down_proj"])
    tiny.trainer(tmp_path / "run", stage).fit(tiny.make_model("llama"), datamodule=tiny.make_data("llama", tmp_path))
    export_run(tmp_path / "run", to="bitsandbytes", out=tmp_path / "model", check=False)
    name = "model.layers.0.mlp.down_proj.weight"
    written = load_file(tmp_path / "model" / "model.safetensors")[name]
    dense = tiny.make_model("llama").model.state_dict()[name]
    packed, _ = quantize_4bit(dense, blocksize=64, quant_type="nf4")
    assert torch.equal(written, packed)
