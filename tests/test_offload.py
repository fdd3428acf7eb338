"""Offloading: a model whose weights lie on disk is compressed to the same bits, and its pages leave memory."""

import json
import math
from pathlib import Path

import pytest
import torch
from interrupt import Died
from tiny import LLAMA, trainer, write_tokens

from pqqp_lightning.callbacks import GPTQ, BlockMatching, SparseGPT
from pqqp_lightning.checkpoint import finished_blocks
from pqqp_lightning.data import TokenData
from pqqp_lightning.models import CausalLM
from pqqp_lightning.network import offload
from pqqp_lightning.network.constraints import constrained_layers
from pqqp_lightning.network.offload import offload_of
from pqqp_lightning.storage.run_folder import WEIGHTS, RunFolder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a model ``large``, of matrices larger than ``SMALLEST``, one ``tiny``, and token files."""
    folder = tmp_path_factory.mktemp("offload")
    torch.manual_seed(0)
    CausalLM(LLAMA).model.save_pretrained(folder / "tiny")
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    CausalLM(LLAMA | wide).model.save_pretrained(folder / "large")
    (folder / "data.json").write_text(json.dumps(write_tokens(folder)))
    return folder


@pytest.fixture
def all_sizes(monkeypatch):
    """Tensors of every size are offloaded."""
    monkeypatch.setattr(offload, "SMALLEST", 1)


def on_disk(model, **options):
    module = CausalLM(str(model) if isinstance(model, Path) else model, offload="disk", **options)
    offload_of(module).connect(CPU)
    return module


def resident_kb(tensor) -> tuple[int, int]:
    """Memory of the mapping that holds ``tensor``, and how much of it belongs to this process alone, in kB."""
    inside, found = False, {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name:
            start, end = (int(address, 16) for address in name.split("-"))
            inside = start <= tensor.data_ptr() < end
        elif inside:
            found[name] = int(rest.split()[0]) if rest.split()[0].isdigit() else 0
    return found["Rss:"], found["Anonymous:"]


def test_a_turn_ends_with_no_page_of_the_block_in_memory(folder):
    module = on_disk(folder / "large")
    block = module.model.model.layers[0]
    weight = block.mlp.up_proj.weight
    assert resident_kb(weight)[0] == 0
    before = weight.clone()
    assert resident_kb(weight)[0] >= weight.nbytes // 1024
    with offload_of(module).turn(block):
        weight.data.mul_(2)
        assert resident_kb(weight)[1] >= weight.nbytes // 1024
    assert block.mlp.up_proj.weight is weight
    assert resident_kb(weight) == (0, 0)
    assert torch.equal(weight, 2 * before)
    with offload_of(module).turn(block):  # now it lies in a scratch file, which takes what is written
        weight.data.mul_(2)
        assert resident_kb(weight)[1] == 0
    assert resident_kb(weight) == (0, 0)
    assert torch.equal(weight, 4 * before)
    assert torch.equal(CausalLM(str(folder / "large"), offload="none").model.model.layers[0].mlp.up_proj.weight, before)


def test_what_is_written_outside_of_a_turn_is_kept(folder):
    module = on_disk(folder / "large")
    weight = module.model.model.layers[1].mlp.up_proj.weight
    weight.data[3, 5] = -0.0
    module(torch.zeros(1, 4, dtype=torch.long))  # the block has a turn for its forward pass
    assert weight[3, 5].signbit()
    assert weight[3, 5] == 0
    assert resident_kb(weight)[1] == 0


def fit(model, folder, run, stages, choice, **options) -> tuple[CausalLM, list]:
    torch.manual_seed(1)
    module = CausalLM(str(model), offload=choice, **options)
    one = trainer(run, *stages)
    one.fit(module, datamodule=TokenData(**json.loads((folder / "data.json").read_text())))
    return module, [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]


def assert_same(folder, tmp_path, stages, **options):
    """A run of ``stages``, a function, on disk gives the same weights, records and checkpoint as one in memory."""
    plain, records = fit(folder / "tiny", folder, tmp_path / "none", stages(), "none", **options)
    offloaded, others = fit(folder / "tiny", folder, tmp_path / "disk", stages(), "disk", **options)
    assert offload_of(offloaded).mode == "disk"
    own = dict(offloaded.state_dict())
    assert list(own) == list(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, own[name]), name
    varying = ("elapsed_s", "peak_memory_bytes")
    for record in records + others:
        for name in varying:
            record.pop(name)
    assert records == others
    weights = [(RunFolder(tmp_path / mode).model / WEIGHTS).read_bytes() for mode in ("none", "disk")]
    assert weights[0] == weights[1]
    return offloaded


def test_a_run_on_disk_is_the_same_bit_for_bit(folder, tmp_path, all_sizes):
    module = assert_same(folder, tmp_path, lambda: [SparseGPT(0.5), GPTQ(4, group_size=16), BlockMatching(1)])
    for _, layer, constraints in constrained_layers(module):
        for tensor in (layer.weight, constraints.mask_bits, constraints.grid.scale):
            assert resident_kb(tensor)[1] == 0


def test_a_killed_run_on_disk_resumes_at_the_block_that_was_not_finished(folder, tmp_path, all_sizes, monkeypatch):
    monkeypatch.setattr(finished_blocks, "PAUSE_S", 0.0)
    monkeypatch.setattr(finished_blocks, "SHARE", math.inf)
    data = json.loads((folder / "data.json").read_text())
    quantized = []
    original = GPTQ.compress_layer

    def dying(stage, inputs):
        if ".layers.1." in inputs.name and len(quantized) == 7:
            raise Died
        quantized.append(inputs.name)
        return original(stage, inputs)

    def run(name, ckpt_path=None):
        torch.manual_seed(1)
        module = CausalLM(str(folder / "tiny"), offload="disk")
        trainer(tmp_path / name, SparseGPT(0.5), GPTQ(4, group_size=16)).fit(
            module, datamodule=TokenData(**data), ckpt_path=ckpt_path
        )
        return (RunFolder(tmp_path / name).model / WEIGHTS).read_bytes()

    whole = run("whole")
    quantized.clear()
    monkeypatch.setattr(GPTQ, "compress_layer", dying)
    with pytest.raises(Died):
        run("died")
    quantized.append("dead")
    assert run("died", "last") == whole
    assert sum(".layers.0." in name for name in quantized) == 7
