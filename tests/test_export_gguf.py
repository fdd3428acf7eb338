"""The GGUF target: our codes in llama.cpp's blocks, and llama.cpp computes what the run does."""

import importlib.util

import numpy as np
import pytest
import tiny
import torch
from exports import checks_here, run_of  # noqa: F401  # a fixture

from pqqp_lightning import load
from pqqp_lightning.callbacks import RTN, SLEB, ChannelPruning
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.export.export_run import CheckFailed, export_run
from pqqp_lightning.export.targets import gguf as target_file
from pqqp_lightning.models import CausalLM
from pqqp_lightning.models.gguf import write_vocabulary

LLAMA_CPP = importlib.util.find_spec("xllamacpp") is not None
BLOCK_TYPES = {
    "rtn4": "Q4_0",
    "rtn3-asymmetric": "Q4_0",
    "rtn4-asymmetric": "Q5_0",
    "rtn5": "Q5_0",
    "rtn8": "Q8_0",
    "pruned-rtn4": "Q4_0",
}
UNEVEN = ["uneven", "narrow", "sublayer", "no-first-attention", "no-attention", "no-mlp", "no-last-block"]
OTHERS = ["dense", "sparse", "sleb", "channels", "basis", "quarot", "adapters", "mixed"]
REFUSED = {"nf4": "levels of NF4 or FP4", "online": "rotate their inputs"}
F32 = {"dtype": "float32"}
LONGEST_DIFFERENCE = 2e-2
"""Of a logit: llama.cpp rounds activations to 8 bits in front of quantized layers."""


def read(path):
    """Tensors of a GGUF file by name."""
    from gguf import GGUFReader

    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def export(tmp_path, name, **options):
    return export_run(run_of(name), to="gguf", out=tmp_path / "model.gguf", **options)


@pytest.mark.parametrize("name", [*BLOCK_TYPES, *OTHERS, *UNEVEN])
def test_llama_cpp_computes_the_same(name, tmp_path, checks_here):  # noqa: F811
    done = export(tmp_path, name, dtype="float32")
    if LLAMA_CPP:
        assert done.agreement.largest_difference < LONGEST_DIFFERENCE
        assert done.agreement.perplexity == pytest.approx(done.agreement.own_perplexity, rel=1e-2)
    else:
        assert "pip install xllamacpp" in done.checks[-1]


@pytest.mark.skipif(not LLAMA_CPP, reason="the package xllamacpp is not installed")
@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_llamas_kin_are_written_too(kind, tmp_path, checks_here):  # noqa: F811
    done = export_run(run_of_kind(kind, tmp_path, RTN(4, group_size=32)), to="gguf", out=tmp_path / "m.gguf", **F32)
    assert done.agreement.largest_difference < 5 * LONGEST_DIFFERENCE
    assert done.agreement.divergence < 1e-4


@pytest.mark.skipif(not LLAMA_CPP, reason="the package xllamacpp is not installed")
def test_uneven_blocks_with_a_tied_head_are_written_too(tmp_path, checks_here):  # noqa: F811
    done = export_run(run_of("no-attention", tied=True), to="gguf", out=tmp_path / "model.gguf", **F32)
    assert "output.weight" not in read(tmp_path / "model.gguf")
    assert done.agreement.divergence < 1e-3


@pytest.mark.skipif(not LLAMA_CPP, reason="the package xllamacpp is not installed")
@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_llamas_kin_keep_uneven_widths(kind, tmp_path, checks_here):  # noqa: F811
    stages = [
        ChannelPruning(0.3, head_ratio=0.5, targets=["*.1.*"]),
        SLEB(1, granularity="sublayer", targets=["*.0.self_attn"]),
    ]
    done = export_run(run_of_kind(kind, tmp_path, *stages), to="gguf", out=tmp_path / "m.gguf", **F32)
    assert done.agreement.largest_difference < 5 * LONGEST_DIFFERENCE
    assert done.agreement.divergence < 1e-4


def test_an_architecture_with_one_width_takes_zeros(tmp_path, checks_here):  # noqa: F811
    run = run_of_kind("qwen3", tmp_path, ChannelPruning(0.5, targets=["*.1.mlp.*"]))
    with pytest.raises(RecipeError, match="Set --pad true"):
        export_run(run, to="gguf", out=tmp_path / "m.gguf")
    export_run(run, to="gguf", out=tmp_path / "m.gguf", pad=True, **F32)


def run_of_kind(kind, folder, *stages):
    """The folder of a run of a small model of type ``kind``."""
    settings = tiny.LLAMA | {"model_type": kind, "head_dim": 16, "sliding_window": None}
    if kind == "qwen2":
        del settings["head_dim"]
    torch.manual_seed(1)
    module = CausalLM(settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # biases are zeros at first
    tiny.trainer(folder / "run", *stages).fit(module, datamodule=tiny.make_data("llama", folder))
    return folder / "run"


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_levels_are_those_of_the_run(name, tmp_path):
    from gguf.quants import dequantize

    export(tmp_path, name, check=False)
    tensor = read(tmp_path / "model.gguf")["blk.1.ffn_down.weight"]
    assert tensor.tensor_type.name == BLOCK_TYPES[name]
    own = load(run_of(name)).model.model.layers[1].mlp.down_proj.weight
    assert np.array_equal(dequantize(tensor.data, tensor.tensor_type), own.detach().numpy())


def test_a_folder_gets_the_file_and_a_model_card(tmp_path, checks_here):  # noqa: F811
    done = export_run(run_of("rtn4"), to="gguf", out=tmp_path / "a folder")
    assert sorted(file.name for file in (tmp_path / "a folder").iterdir()) == ["README.md", "model.gguf"]
    assert 'llama-cli -m "a folder/model.gguf"' in (tmp_path / "a folder" / "README.md").read_text()
    assert done.out == tmp_path / "a folder"


def test_a_file_stands_alone_and_one_that_exists_is_refused(tmp_path):
    export(tmp_path, "rtn4", check=False)
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
    with pytest.raises(RecipeError, match="exists already"):
        export(tmp_path, "rtn4", check=False)


@pytest.mark.parametrize(("dtype", "kind"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32")])
def test_dense_layers_have_the_dtype_and_norms_float32(dtype, kind, tmp_path, checks_here):  # noqa: F811
    export(tmp_path, "rtn4", dtype=dtype)
    tensors = read(tmp_path / "model.gguf")
    assert tensors["token_embd.weight"].tensor_type.name == kind
    assert tensors["output_norm.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize("name", REFUSED)
def test_what_gguf_does_not_have_is_refused(name, tmp_path):
    with pytest.raises(RecipeError, match=REFUSED[name]):
        export(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_zeros_take_the_place_of_removed_sublayers(tmp_path, checks_here):  # noqa: F811
    done = export(tmp_path, "sublayer", pad=True, dtype="float32")
    if LLAMA_CPP:
        assert done.agreement.largest_difference < LONGEST_DIFFERENCE


def test_an_opt_model_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="holds a model of type opt"):
        export_run(run_of("rtn4", "opt"), to="gguf", out=tmp_path / "model.gguf")


def refusal_of(stage, tmp_path, **options):
    """The text of the refusal of a run with ``stage``."""
    module = tiny.make_model("llama")
    tiny.trainer(tmp_path / "run", stage).fit(module, datamodule=tiny.make_data("llama", tmp_path))
    with pytest.raises(RecipeError) as refusal:
        export_run(tmp_path / "run", to="gguf", out=tmp_path / "model.gguf", **options)
    return str(refusal.value)


def test_groups_that_are_no_blocks_are_refused(tmp_path):
    assert "not multiples of 32" in refusal_of(RTN(4, group_size=16), tmp_path)


def test_codes_are_widened_only_if_they_may_be(tmp_path):
    words = refusal_of(RTN(3), tmp_path, widen=False)
    assert "whose codes GGUF has only with 4 bits" in words
    assert words.endswith("Use --widen true.")


def test_levels_beyond_signed_bytes_are_refused():
    assert target_file._block_type(np.array([-128, 127])).name == "Q8_0"
    assert target_file._block_type(np.array([0, 128])) is None


def test_requantized_blocks_fail_the_check(tmp_path, monkeypatch):
    """llama.cpp's own quantizer starts from the values: it finds other scales, and other codes."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    def requantized(levels, scales, kind):
        values = levels * np.repeat(scales.astype(np.float32), 32, axis=1)
        return quantize(values.astype(np.float32), GGMLQuantizationType[kind.name])

    monkeypatch.setattr(target_file, "_blocks", requantized)
    with pytest.raises(CheckFailed, match=r"entries differ.*The file is .*model\.gguf\.failed"):
        export(tmp_path, "pruned-rtn4")
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf.failed"]


# --- the tokenizer ---


def test_the_vocabulary_of_a_gguf_file_is_kept_as_it_is(tmp_path):
    from gguf import GGUFReader, GGUFWriter

    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "Ġb", "größer"])
    writer.add_token_types([1, 1, 3])
    writer.add_bos_token_id(2)
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    write_vocabulary(tmp_path / "model.gguf", tmp_path / "tokenizer.gguf")
    kept = GGUFReader(tmp_path / "tokenizer.gguf").fields
    assert "llama.block_count" not in kept
    for field in GGUFReader(tmp_path / "model.gguf").fields.values():
        if field.name.startswith("tokenizer."):
            assert kept[field.name].contents() == field.contents()
