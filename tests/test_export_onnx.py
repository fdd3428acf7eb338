"""--to onnx: codes as they are, outputs as the run's in two programs."""

import shutil

import numpy as np
import pytest
import torch
from command_line import prepare, refused
from exports import checks_here, run_of  # noqa: F401  # a fixture
from safetensors.torch import load_file

import pqqp_lightning
from pqqp_lightning import load
from pqqp_lightning.algorithms.grid import encode
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.export import onnx_graph
from pqqp_lightning.export.export_run import CheckFailed, export_run
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.layers import weight_matrix
from pqqp_lightning.storage.run_folder import RunFolder

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


def close(done, limit=1e-5):
    """Assert that both programs computed what the run does."""
    assert set(done.agreements) == {"ONNX Runtime", "OpenVINO"}
    for agreement in done.agreements.values():
        assert agreement.relative_difference < limit


def arrays(out):
    """The stored tensors of the written file: (type, integers or numbers) by name."""
    stored = onnx.load(out).graph.initializer
    names = onnx.TensorProto.DataType.Name
    return {t.name: (names(t.data_type), onnx.numpy_helper.to_array(t).astype(np.float32)) for t in stored}


def own_codes(layer):
    """The codes of a run's layer, signed if its grid is symmetric."""
    grid = constraints_of(layer).grid
    return encode(weight_matrix(layer), grid).float() - (grid.middle if grid.zero is None else 0)


@pytest.mark.parametrize(
    ("name", "type_name"),
    [("rtn4-rows", "INT4"), ("rtn3-asymmetric", "UINT4"), ("rtn5", "INT8"), ("rtn8-asymmetric", "UINT8")],
)
def test_codes_go_over_as_they_are_into_the_next_width(name, type_name, tmp_path, checks_here):  # noqa: F811
    done = export_run(run_of(name, "convolutions"), to="onnx", out=tmp_path / "a model.onnx")
    close(done)
    stored = arrays(tmp_path / "a model.onnx")
    module = load(run_of(name, "convolutions"))
    for layer in ("inlet", "depthwise", "grouped", "fc"):
        kind, codes = stored[f"{layer}.weight.codes"]
        codes = torch.from_numpy(codes)
        assert kind == type_name
        assert torch.equal(
            codes if codes.dim() == 2 else codes.movedim(1, -1).flatten(1), own_codes(module.get_submodule(layer))
        )
    assert any("stored in more bits" in remark for remark in done.remarks) == (name in ("rtn3-asymmetric", "rtn5"))


def test_scales_of_groups_of_columns_go_over_too(tmp_path, checks_here):  # noqa: F811
    close(export_run(run_of("grouped-convolution", "convolutions"), to="onnx", out=tmp_path / "convolutions.onnx"))
    assert arrays(tmp_path / "convolutions.onnx")["grouped.weight.scale"][1].shape == (32, 2)
    close(export_run(run_of("grouped", "deit"), to="onnx", out=tmp_path / "model.onnx"))
    kind, codes = arrays(tmp_path / "model.onnx")["model.blocks.0.attn.qkv.weight.codes"]
    assert (kind, codes.shape) == ("INT4", (144, 48))


def test_the_file_holds_no_source_code_of_the_machine(tmp_path):
    export_run(run_of("rtn5", "convolutions"), to="onnx", out=tmp_path / "model.onnx", check=False)
    assert b".py" not in (tmp_path / "model.onnx").read_bytes()


def test_a_residual_network_is_written_with_dense_weights(tmp_path, checks_here):  # noqa: F811
    done = export_run(run_of("sparse", "resnet"), to="onnx", out=tmp_path, weights="dense")
    close(done)
    assert done.agreement.samples == 32
    assert done.agreement.top1 == done.agreement.own_top1  # the labels are kept, too
    assert "% zeros are kept as values" in done.remarks[0]
    card = (tmp_path / "README.md").read_text()
    assert "library_name: onnx" in card


def test_integers_keep_codes_and_multiply_norms_into_scales(tmp_path, checks_here):  # noqa: F811
    done = export_run(run_of("rtn8", "convolutions"), to="onnx", out=tmp_path / "model.onnx", weights="qdq")
    close(done, limit=0.1)
    assert done.agreement.relative_difference > 1e-5  # activations are rounded
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert "BatchNormalization" not in operators
    assert operators.count("QuantizeLinear") >= 4
    stored = arrays(tmp_path / "model.onnx")
    module = load(run_of("rtn8", "convolutions"))
    sign = module.norm.weight.detach().sign()[:, None]
    assert (sign < 0).any()
    depthwise = torch.from_numpy(stored["depthwise.weight_quantized"][1]).movedim(1, -1).flatten(1)
    assert torch.equal(depthwise, own_codes(module.depthwise) * sign)


def test_activations_of_a_run_that_rounds_them_get_fixed_ranges(tmp_path, checks_here):  # noqa: F811
    done = export_run(run_of("rounded", "deit"), to="onnx", out=tmp_path / "model.onnx", weights="qdq")
    close(done, limit=0.3)
    assert any("here ranges are fixed" in remark for remark in done.remarks)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rtn3-asymmetric", {"weights": "qdq"}, "with zero points, which integer kernels lack"),
        ("grouped-convolution", {"weights": "qdq"}, "with scales for groups of columns, which integer kernels lack"),
        ("sparse", {"weights": "qdq"}, "has no layer with integer codes"),
        ("rtn5", {"widen": False}, "in bits that ONNX does not have"),
        ("rtn5", {"dtype": "float16"}, "dtype='float16' is not written by --to onnx. Use float32."),
        ("rtn5", {"pad": True}, "means nothing for --to onnx"),
        ("rtn5", {"example": "3x32y32"}, "is neither a shape nor a file"),
        ("rtn5", {"example": "1x8x8"}, "does not take inputs of 1x8x8"),
        ("rtn5", {"weights": "int8"}, "is not one of dense, dequantize, qdq"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_written(name, options, message, tmp_path):
    with pytest.raises(RecipeError) as refusal:
        export_run(run_of(name, "convolutions"), to="onnx", out=tmp_path / "model.onnx", **options)
    assert message in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_an_earlier_run_folder_is_tried_on_the_samples_of_its_checkpoint(tmp_path, checks_here):  # noqa: F811
    shutil.copytree(run_of("rtn5", "convolutions"), tmp_path / "run")
    RunFolder(tmp_path / "run").inputs.unlink()
    done = export_run(tmp_path / "run", to="onnx", out=tmp_path / "model.onnx")
    assert done.agreement.samples >= 1
    (tmp_path / "run" / "model" / "probe.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"keeps no samples of its inputs.*--example 3x224x224"):
        export_run(tmp_path / "run", to="onnx", out=tmp_path / "again.onnx")
    done = export_run(tmp_path / "run", to="onnx", out=tmp_path / "again.onnx", example="3x32x32")
    assert "8 random samples" in done.checks[-1]


def test_a_run_keeps_inputs_labels_and_normalisation(tmp_path):
    kept = load_file(RunFolder(run_of("rtn5", "convolutions")).inputs)
    assert {name: list(tensor.shape) for name, tensor in kept.items()} == {
        "input.0": [32, 3, 32, 32],
        "labels": [32],
        "calibration.input.0": [32, 3, 32, 32],
    }


def test_a_file_that_computes_something_else_fails_its_check(tmp_path, checks_here, monkeypatch):  # noqa: F811
    def store(model, name, weight, grid, layout, bits):
        right(model, name, weight, grid, layout, bits)
        scale = onnx_graph.initializers(model.graph)[f"{name}.scale"]
        array = onnx.numpy_helper.to_array(scale) * np.float32(1.5)
        scale.CopyFrom(onnx.numpy_helper.from_array(array, scale.name))

    right = onnx_graph.store_codes
    monkeypatch.setattr("pqqp_lightning.export.targets.onnx.store_codes", store)
    with pytest.raises(CheckFailed, match=r"fc\.weight: .* entries differ"):
        export_run(run_of("rtn5", "convolutions"), to="onnx", out=tmp_path / "model.onnx")


def test_a_language_model_is_refused_with_the_targets_for_it(tmp_path, monkeypatch):
    prepare(tmp_path, monkeypatch)
    for target in ("onnx", "timm", "torchvision"):
        problems = refused("export", str(run_of("rtn8")), "--to", target, "--out", "x")
        assert "holds a language model" in str(problems[0])
        assert "Use --to hf" in str(problems[0])


def test_the_checks_run_in_processes_of_their_own(tmp_path):
    done = pqqp_lightning.export(run_of("rtn5", "convolutions"), to="onnx", out=tmp_path / "a model.onnx")
    close(done)
    assert "OpenVINO" in done.checks[-1]
    assert "in a process of its own" in done.checks[-1]
