"""The packed checkpoint: bit-identical, as small as counted, and refused when damaged."""

import gzip
import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pqqp_lightning import load
from pqqp_lightning.callbacks import (
    GPTQ,
    RTN,
    SLEB,
    ActivationQuantization,
    BasisSharing,
    ChannelPruning,
    Finetune,
    LoRA,
    Magnitude,
    QuaRot,
    SparseGPT,
    Wanda,
)
from pqqp_lightning.checkpoint.encoding import encode_weight
from pqqp_lightning.checkpoint.format import digest_of_manifest
from pqqp_lightning.checkpoint.load import load_weights
from pqqp_lightning.checkpoint.save import save_checkpoint
from pqqp_lightning.checkpoint.size import measure_size
from pqqp_lightning.data import TokenData
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.models import CausalLM, ImageClassifier
from pqqp_lightning.network.constraints import broken_constraints, collect_constraints
from pqqp_lightning.storage.files import sha256_of
from pqqp_lightning.storage.run_folder import MANIFEST, WEIGHTS

LARGER = tiny.LLAMA | {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 256, "num_hidden_layers": 3}

CHAINS = {
    "dense": [],
    "bitmask": [Magnitude(0.6)],
    "2:4": [Magnitude(pattern="2:4")],
    "1:4": [Wanda(pattern="1:4")],
    "int4": [RTN(4)],
    "int3 asymmetric groups": [GPTQ(3, group_size=16, symmetric=False)],
    "int5 per tensor": [RTN(5, group_size="tensor")],
    "pruned then quantized": [SparseGPT(0.5), GPTQ(4)],
    "quantized then 2:4": [GPTQ(8, group_size=16), SparseGPT(pattern="2:4")],
    "part of the layers": [Magnitude(0.5, targets=["mlp"]), RTN(bits={"q_proj": 8, "*": 2}, targets=["self_attn"])],
}


def run(tmp_path, stages, config=tiny.LLAMA, dtype="float32"):
    module = CausalLM(config, dtype=dtype)
    data = TokenData(**tiny.write_tokens(tmp_path))
    tiny.trainer(tmp_path / "run", *stages).fit(module, datamodule=data)
    return module, tmp_path / "run"


def assert_equal(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_loads_bit_identical_from_its_folder_alone(tmp_path, chain, dtype):
    module, folder = run(tmp_path, CHAINS[chain], dtype=dtype)
    moved = shutil.move(folder, tmp_path / "elsewhere")
    loaded = load(moved)
    assert_equal(module, loaded)
    tokens = tiny.token_rows(2)
    assert torch.equal(module.eval()(tokens), loaded(tokens))
    before, after = collect_constraints(module), collect_constraints(loaded)
    assert before.keys() == after.keys()
    assert not broken_constraints(loaded, before)
    assert not broken_constraints(module, after)
    assert all(before[n].pattern == after[n].pattern and before[n].kept() == after[n].kept() for n in before)


def as_format_1(folder):
    """Rewrite a checkpoint as earlier versions wrote it: its small tensors in one."""
    manifest = json.loads(gzip.decompress((folder / MANIFEST).read_bytes()))
    tensors = load_file(folder / WEIGHTS)
    small = {name: tensor for name, tensor in tensors.items() if tensor.nbytes < 1 << 16}
    for name in small:
        del tensors[name]
    tensors["bundle"] = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in small.values()])
    save_file(tensors, folder / WEIGHTS)
    manifest |= {"format": 1, "small": [(n, str(t.dtype).removeprefix("torch."), t.shape) for n, t in small.items()]}
    manifest["weights"] = {"bytes": (folder / WEIGHTS).stat().st_size, "sha256": sha256_of(folder / WEIGHTS)}
    del manifest["sha256"]
    manifest["sha256"] = digest_of_manifest(manifest)
    (folder / MANIFEST).write_bytes(gzip.compress(json.dumps(manifest).encode()))


@pytest.mark.parametrize("chain", CHAINS)
def test_checkpoints_of_format_1_load(tmp_path, chain):
    module, folder = run(tmp_path, CHAINS[chain])
    as_format_1(folder / "model")
    assert_equal(module, load(folder))
    assert set(load_weights(folder)) == set(module.state_dict())


@pytest.mark.parametrize("chain", CHAINS)
def test_files_are_as_small_as_counted(tmp_path, chain):
    module, folder = run(tmp_path, CHAINS[chain], LARGER)
    counted = measure_size(module, []).size_bytes
    assert tiny.tensor_bytes(folder / "model") == pytest.approx(counted, rel=0.01)  # plans hold a little more


def test_counted_bytes_are_the_sum_of_their_parts():
    module = CausalLM(tiny.LLAMA)
    layer = module.model.model.layers[0].mlp.up_proj  # 64 x 32
    dense = measure_size(module, ["model.model.layers.0.mlp.up_proj"])
    RTN(4, group_size=16, symmetric=False, targets=["layers.0.mlp.up_proj"]).compress(module, _context())
    Magnitude(0.5, targets=["layers.0.mlp.up_proj"]).compress(module, _context())
    size = measure_size(module, ["model.model.layers.0.mlp.up_proj"])
    groups = 64 * 32 // 16
    expected = 64 * 32 // 2 * 4 // 8 + 64 * 32 // 8 + groups * 2 + groups * 4 // 8  # codes, mask, float16 scales, zeros
    assert size.layers[0].size_bytes == expected
    assert dense.size_bytes - size.size_bytes == layer.weight.numel() * 4 - expected
    assert size.bits_per_weight == 8 * expected / (64 * 32)
    assert size.nominal_rate(32) == pytest.approx(16.0)


def test_tied_weights_are_stored_and_counted_once(tmp_path):
    tied, untied = (CausalLM(tiny.LLAMA | {"tie_word_embeddings": tie}) for tie in (True, False))
    embedding = 64 * 32 * 4
    assert measure_size(untied, []).size_bytes - measure_size(tied, []).size_bytes == embedding
    save_checkpoint(tied, tmp_path / "tied")
    loaded = load(tmp_path / "tied")
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert set(load_weights(tmp_path / "tied")) == set(tied.state_dict())


@pytest.mark.parametrize("stages", [[Magnitude(0.5), RTN(4)], [RTN(8), Magnitude(pattern="2:4", ignore=["conv1"])]])
def test_convolutions_and_batch_norm_state_are_kept(tmp_path, stages):
    network = {"model": "resnet18", "pretrained": False, "num_classes": 10}
    module = ImageClassifier(**network, model_args={"stem_width": 8, "channels": [8, 16, 16, 16]})
    for stage in stages:
        stage.compress(module, _context())
    module.train()
    module.model(torch.randn(4, 3, 32, 32))  # moves running statistics
    save_checkpoint(module, tmp_path / "model")
    assert_equal(module, load(tmp_path / "model"))


def test_a_module_that_cannot_be_built_is_asked_for(tmp_path):
    class Needy(tiny.Regressor):
        def __init__(self, network, width):
            super().__init__()
            self.network = network

    save_checkpoint(Needy(nn.Linear(2, 2), 2), tmp_path / "model")
    with pytest.raises(RecipeError, match=r"does not say how to build its module. Pass one: load\(run, module=...\)"):
        load(tmp_path / "model")
    other = Needy(nn.Linear(2, 2), 2)
    assert load(tmp_path / "model", other) is other


def damage_weights(folder):
    path = folder / WEIGHTS
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate(WEIGHTS), r"model\.safetensors: has \d+ bytes instead of \d+: truncated or altered"),
        (damage_weights, r"model\.safetensors: its checksum differs: altered"),
        (truncate(MANIFEST), r"manifest\.json\.gz: is truncated or altered"),
        (lambda f: (f / MANIFEST).unlink(), r"has no checkpoint \(manifest\.json\.gz is missing\)"),
        (lambda f: (f / WEIGHTS).unlink(), r"has 0 bytes instead of"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage, message):
    save_checkpoint(CausalLM(tiny.LLAMA), tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(RecipeError, match=message):
        load(tmp_path / "model")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save_checkpoint(CausalLM(tiny.LLAMA), tmp_path / "model")
    with pytest.raises(RecipeError, match=r"is of another model: \d+ layers"):
        load(tmp_path / "model", CausalLM(tiny.OPT))
    wider = CausalLM(tiny.LLAMA | {"intermediate_size": 128})
    with pytest.raises(RecipeError, match=r"has shape \[64, 32\] instead of \[128, 32\]"):
        load(tmp_path / "model", wider)


def test_nm_positions_are_used_where_they_are_not_larger():
    module = CausalLM(tiny.LLAMA)
    for pattern, kind in (("1:4", "positions"), ("2:4", "positions"), ("4:8", "bits")):
        Magnitude(pattern=pattern).compress(module, _context())
        constraints = next(iter(collect_constraints(module).values()))
        if pattern != "4:8":  # 1:4 and 2:4 hold within one another: the tighter one was first
            assert encode_weight(constraints, 32).mask in (kind, "bits")
    fresh = CausalLM(tiny.LLAMA)
    Magnitude(pattern="2:4").compress(fresh, _context())
    encoding = encode_weight(next(iter(collect_constraints(fresh).values())), 32)
    assert encoding.mask == "positions"
    assert encoding.mask_bytes == 32 * 32 // 8  # two bits for each of the two kept of four: one bit a weight


def test_finetuned_zeros_are_packed(tmp_path):
    module, folder = run(tmp_path, [Magnitude(0.5), Finetune(1)])
    assert_equal(module, load(folder))
    assert all(c.mask_bits is not None for c in collect_constraints(load(folder)).values())


def _context():
    from pqqp_lightning.stages.stage import Context

    return Context(walk=None, progress=False)


@pytest.mark.parametrize(
    "first",
    [
        SLEB(1),
        ChannelPruning(0.5),
        QuaRot(online=True),
        BasisSharing(0.2),
        LoRA(2, merge=False),
        ActivationQuantization(4),
    ],
    ids=lambda stage: type(stage).__name__,
)
def test_a_loaded_model_can_be_compressed_further_and_loaded_again(tmp_path, first):
    data = tiny.make_data("llama", tmp_path)
    tiny.trainer(tmp_path / "first", first).fit(tiny.make_model("llama"), datamodule=data)
    module = load(tmp_path / "first")
    tiny.trainer(tmp_path / "second", RTN(4), Magnitude(0.5)).fit(module, datamodule=data)
    again = load(tmp_path / "second")
    tokens = tiny.token_rows(2, 7)
    assert torch.equal(module.eval()(tokens), again(tokens))
    tiny.trainer(tmp_path / "third", Magnitude(0.6)).fit(again, datamodule=data)
    assert torch.equal(again.eval()(tokens), load(tmp_path / "third")(tokens))
