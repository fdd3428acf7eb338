"""Offloading: a model whose weights lie on disk is compressed to the same bits, and its pages leave memory."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from command_line import prepare, run
from interrupt import Died
from tiny import LLAMA, trainer, write_tokens

from pqqp_lightning.callbacks import (
    FP4,
    GPTQ,
    INT8,
    NF4,
    RTN,
    SLEB,
    ActivationQuantization,
    BasisSharing,
    BlockMatching,
    ChannelPruning,
    LoRA,
    Magnitude,
    MixedPrecision,
    Polish,
    QuaRot,
    Refit,
    SparseGPT,
    Wanda,
)
from pqqp_lightning.checkpoint import finished_blocks
from pqqp_lightning.checkpoint.load import load_weights
from pqqp_lightning.data import TokenData
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.experiments import OrderOptions, search_orders
from pqqp_lightning.models import CausalLM
from pqqp_lightning.network import free_memory, offload, weight_files
from pqqp_lightning.network.constraints import constrained_layers
from pqqp_lightning.network.offload import Offload, offload_of
from pqqp_lightning.runs.run_data import RunData
from pqqp_lightning.stages import LayerwiseStage
from pqqp_lightning.storage.run_folder import WEIGHTS, RunFolder
from pqqp_lightning.trials.fingerprint import base_fingerprint, training_fingerprint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with two models, of which ``large`` has matrices larger than ``SMALLEST``, and token files."""
    folder = tmp_path_factory.mktemp("offload")
    torch.manual_seed(0)
    CausalLM(LLAMA | {"num_hidden_layers": 3}).model.save_pretrained(folder / "tiny")
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    CausalLM(LLAMA | wide).model.save_pretrained(folder / "large")
    (folder / "data.json").write_text(json.dumps(write_tokens(folder)))
    return folder


@pytest.fixture
def all_sizes(monkeypatch):
    """Tensors of every size are offloaded."""
    for module in (offload, weight_files):
        monkeypatch.setattr(module, "SMALLEST", 1)


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


def fit(model, folder, run_folder, stages, choice, **options) -> tuple[CausalLM, list]:
    torch.manual_seed(1)
    module = CausalLM(str(model), offload=choice, **options)
    one = trainer(run_folder, *stages)
    one.fit(module, datamodule=TokenData(**json.loads((folder / "data.json").read_text())))
    return module, [json.loads(line) for line in (run_folder / "records.jsonl").read_text().splitlines()]


def assert_same(folder, tmp_path, stages, mode="disk", **options):
    """An offloaded run of ``stages``, a function, gives the same weights, records and checkpoint as one in memory."""
    plain, records = fit(folder / "tiny", folder, tmp_path / "none", stages(), "none", **options)
    offloaded, others = fit(folder / "tiny", folder, tmp_path / mode, stages(), mode, **options)
    assert offload_of(offloaded).mode == mode
    own = dict(offloaded.state_dict())
    assert list(own) == list(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, own[name]), name
    varying = ("elapsed_s", "peak_memory_bytes")
    for record in records + others:
        for name in varying:
            record.pop(name)
    assert records == others
    weights = [(RunFolder(tmp_path / name).model / WEIGHTS).read_bytes() for name in ("none", mode)]
    assert weights[0] == weights[1]
    return offloaded


ATTENTION, MLP = ["self_attn"], ["mlp"]
SEQUENCES = {
    "sweeps": lambda: [SparseGPT(0.5), GPTQ(4, group_size=16)],
    "rotation": lambda: [QuaRot(online=True), ActivationQuantization(), Wanda(0.5), RTN(4)],
    "grids": lambda: [Magnitude(0.3), NF4(targets=ATTENTION), FP4(targets=["gate_proj"]), INT8(targets=["up_proj"])],
    "removal": lambda: [SLEB(1), ChannelPruning(0.25), MixedPrecision(average_bits=4.0, sensitivity="output")],
    "narrower": lambda: [ChannelPruning(0.25, importance="activation", head_ratio=0.5), BasisSharing(0.2)],
    "repair": lambda: [SparseGPT(0.5), Refit(), GPTQ(4, group_size=16), Polish(), BlockMatching(1)],
}


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_a_run_on_disk_is_the_same_bit_for_bit(sequence, folder, tmp_path, all_sizes):
    module = assert_same(folder, tmp_path, SEQUENCES[sequence])
    for _, layer, constraints in constrained_layers(module):
        parts = [layer.weight, constraints.mask_bits, None if constraints.grid is None else constraints.grid.scale]
        for tensor in parts:
            assert tensor is None or resident_kb(tensor)[1] == 0


def test_a_model_of_another_dtype_is_converted_weight_by_weight(folder, tmp_path, all_sizes):
    assert_same(folder, tmp_path, lambda: [GPTQ(4)], dtype="bfloat16")


def test_a_model_without_files_lies_in_scratch_files(folder, tmp_path, all_sizes):
    torch.manual_seed(2)
    module = CausalLM(LLAMA, offload="disk")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    offload_of(module).connect(CPU)
    for name, tensor in module.named_parameters():
        assert torch.equal(before[name], tensor)
        offload_of(module).settle(module)
        assert resident_kb(tensor) == (0, 0)


def test_a_checkpoint_is_loaded_into_files(folder, tmp_path, all_sizes):
    """A killed run resumes with another mode."""
    fit(folder / "tiny", folder, tmp_path / "run", [SparseGPT(0.5)], "none")
    module = CausalLM(str(folder / "tiny"), offload="disk")
    one = trainer(tmp_path / "run", SparseGPT(0.5))
    one.fit(module, datamodule=TokenData(**json.loads((folder / "data.json").read_text())), ckpt_path="last")
    saved = load_weights(tmp_path / "run")
    for name, tensor in module.named_parameters():
        assert torch.equal(saved[name], tensor)
        assert resident_kb(tensor)[1] == 0


def test_stages_that_need_the_whole_model_are_refused(folder, tmp_path):
    stages = [
        Magnitude(0.5, scope="global"),
        Wanda(0.5, allocation="sensitivity"),
        MixedPrecision(),
        ChannelPruning(importance="taylor"),
        LoRA(),
    ]
    with pytest.raises(RecipeError) as error:
        fit(folder / "large", folder, tmp_path / "run", stages, "disk")
    refused = [problem for problem in error.value.problems if "whole model" in problem.text]
    assert [problem.argument for problem in refused] == ["scope", "allocation", "sensitivity", "importance", "epochs"]
    assert "model.offload: none" in refused[0].way_out
    assert "scope: layer" in refused[0].way_out
    assert "MB of gradients" in refused[-1].text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("free", "mode"), [(1 << 40, "none"), (1 << 20, "disk"), (None, "none")])
def test_auto_chooses_what_fits(free, mode, folder, monkeypatch, capsys):
    monkeypatch.setattr(offload, "free_memory", lambda: free)
    module = CausalLM(str(folder / "large"))
    said = []
    monkeypatch.setattr(offload, "rank_zero_info", said.append)
    offload_of(module).connect(CPU)
    assert offload_of(module).mode == mode
    assert len(said) == (mode == "disk")
    if said:
        assert said[0].startswith("model.offload: disk, since ")


class Far(Offload):
    """A device with a memory of its own, on a machine that has none: turns copy weights to other tensors and back."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.copies = {}

    def _chosen(self, model, device):
        return self._choice

    def _is_elsewhere(self):
        return True

    def _to_device(self, home):
        copy = home.clone()
        self.copies[copy.data_ptr()] = copy
        return copy

    def _at_home(self, tensor):
        return super()._at_home(tensor.clone())

    def _is_home(self, tensor):
        return tensor.data_ptr() not in self.copies


@pytest.mark.parametrize("mode", ["host", "disk"])
def test_a_turn_on_a_device_brings_weights_and_returns_what_changed(mode, folder, all_sizes):
    module = CausalLM(str(folder / "tiny"), offload="none")
    far = Far(module, mode)
    far.connect(CPU)
    first, second, _ = module.model.model.layers
    weight = first.mlp.up_proj.weight
    home, before = weight.data_ptr(), weight.clone()
    with far.turn(first, second):
        assert not far._is_home(weight)
        with far.turn(first.mlp), far.turn(first):  # nested turns leave it to the outermost
            pass
        assert not far._is_home(weight)
        weight.data.add_(1)
        first.mlp.gate_proj.weight = torch.nn.Parameter(far._to_device(torch.ones(3, 32)))
        fetched = [copy.data_ptr() for _, _, copy in far._ahead[second]]
    assert far._is_home(weight)
    assert torch.equal(weight, before + 1)
    assert far._is_home(first.mlp.gate_proj.weight)
    assert torch.equal(first.mlp.gate_proj.weight, torch.ones(3, 32))
    assert (weight.data_ptr() == home) == (mode == "host")  # a file of the model's is never written to
    with torch.no_grad():
        second.mlp.up_proj.weight.mul_(3)  # after it was fetched
    with far.turn(second, read_only=True):
        brought = {id(p): p.data_ptr() for p in second.parameters()}
        assert sum(pointer in fetched for pointer in brought.values()) == len(brought) - 1
    assert torch.equal(
        second.mlp.up_proj.weight, 3 * CausalLM(str(folder / "tiny")).model.model.layers[1].mlp.up_proj.weight
    )
    unmoved = far.staying(lambda tensor: tensor.to("meta"))
    assert unmoved(weight) is weight
    assert unmoved(module.model.model.embed_tokens.weight).is_meta


@pytest.mark.parametrize("mode", ["host", "disk"])
@pytest.mark.parametrize("sequence", ["rotation", "removal", "narrower"])
def test_a_run_on_a_device_brings_every_change_home(sequence, mode, folder, tmp_path, all_sizes, monkeypatch):
    monkeypatch.setattr(offload, "Offload", Far)
    assert_same(folder, tmp_path, SEQUENCES[sequence], mode)


def test_offloading_does_not_tell_runs_apart(folder, tmp_path):
    fingerprints = set()
    for choice in ("none", "disk"):
        module = CausalLM(str(folder / "tiny"), offload=choice)
        data = RunData(module, datamodule=TokenData(**json.loads((folder / "data.json").read_text())))
        one = trainer(tmp_path)
        one.recipe = {}
        data.read(one)
        fingerprints.add((base_fingerprint(one, data, []), training_fingerprint(one, data)))
    assert len(fingerprints) == 1


def test_free_memory_is_that_of_the_machine_and_of_its_control_groups(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   5000 kB\n")
    (tmp_path / "cgroup").write_text("4:cpu:/a\n3:memory:/b/c\n0::/d\n")
    monkeypatch.setattr(free_memory, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(free_memory, "_GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(free_memory, "_GROUPS", tmp_path)
    assert free_memory.free_memory() == 5000 * 1024
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "memory.max").write_text("max\n")
    assert free_memory.free_memory() == 5000 * 1024
    (tmp_path / "d" / "memory.max").write_text("4000000\n")
    assert free_memory.free_memory() == 4000000
    (tmp_path / "memory" / "b" / "c").mkdir(parents=True)
    (tmp_path / "memory" / "b" / "c" / "memory.limit_in_bytes").write_text("3000000\n")
    assert free_memory.free_memory() == 3000000
    monkeypatch.setattr(free_memory, "_MEMORY", tmp_path / "nothing")
    monkeypatch.setattr(free_memory, "_GROUPS", tmp_path / "nothing")
    assert free_memory.free_memory() is None


def test_a_full_disk_is_an_error_with_a_way_out(folder, monkeypatch):
    module = on_disk(folder / "large")

    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_files.tempfile, "TemporaryFile", full)
    layer = module.model.model.layers[0].mlp.up_proj
    with pytest.raises(RecipeError, match=r"No space left on device\. Free some space"), offload_of(module).turn(layer):
        layer.weight.data.mul_(2)


def test_a_copy_of_an_offloaded_model_is_a_model_of_its_own(folder, all_sizes):
    module = on_disk(folder / "tiny")
    copied = copy.deepcopy(module)
    assert offload_of(copied).mode == "none"
    ids = torch.arange(8)[None]
    before = module(ids)
    copied.model.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert torch.equal(module(ids), before)
    assert not torch.equal(copied(ids), before)


def test_a_search_of_orders_is_the_same(folder, tmp_path, all_sizes):
    """Each order begins with the dense model, whose modules are then made anew."""
    found = {}
    for choice in ("none", "disk"):
        module = CausalLM(str(folder / "tiny"), offload=choice)
        data = TokenData(**json.loads((folder / "data.json").read_text()))
        one = trainer(tmp_path / choice, ChannelPruning(0.25), RTN(4))
        search_orders(one, module, data, OrderOptions(store=str(tmp_path / f"store-{choice}")))
        assert offload_of(module).mode == choice
        answer = json.loads((tmp_path / choice / "order.json").read_text())
        found[choice] = []
        for order in answer["orders"]:
            found[choice].append([(stage["name"], stage["metrics"], stage["size_bytes"]) for stage in order["stages"]])
        if choice == "disk":
            for parameter in module.parameters():
                assert resident_kb(parameter)[1] == 0
            ids = torch.arange(8)[None]
            module(ids)
            assert resident_kb(module.model.model.layers[0].mlp.up_proj.weight)[0] == 0  # its block still has turns
    assert len(found["none"]) == 2
    assert found["none"] == found["disk"]


def test_a_run_is_resumed_with_weights_elsewhere(tmp_path, monkeypatch):
    """The recipe's option does not change results, and so not the identity of the run."""
    work = prepare(tmp_path, monkeypatch)
    assert run("fit", "--config", "recipe.yaml", "--model.offload", "disk") == 0
    before = (work / "run" / "report.json").stat().st_mtime_ns
    command = ("fit", "--config", "recipe.yaml", "--ckpt_path", "last")
    assert run(*command, "--model.offload", "none") == 0
    assert (work / "run" / "report.json").stat().st_mtime_ns > before
    assert len((work / "run" / "records.jsonl").read_text().splitlines()) == 3


def test_a_killed_run_on_disk_resumes_at_the_block_that_was_not_finished(folder, tmp_path, all_sizes, monkeypatch):
    monkeypatch.setattr(finished_blocks, "PAUSE_S", 0.0)
    monkeypatch.setattr(finished_blocks, "SHARE", math.inf)
    data = json.loads((folder / "data.json").read_text())
    quantized = []
    original = LayerwiseStage._row_groups

    def dying(stage, name, *arguments):
        if isinstance(stage, GPTQ):
            if ".layers.1." in name and len(quantized) == 7:
                raise Died
            quantized.append(name)
        return original(stage, name, *arguments)

    def compress(name, ckpt_path=None):
        torch.manual_seed(1)
        module = CausalLM(str(folder / "tiny"), offload="disk")
        trainer(tmp_path / name, SparseGPT(0.5), GPTQ(4, group_size=16)).fit(
            module, datamodule=TokenData(**data), ckpt_path=ckpt_path
        )
        return (RunFolder(tmp_path / name).model / WEIGHTS).read_bytes()

    whole = compress("whole")
    quantized.clear()
    monkeypatch.setattr(LayerwiseStage, "_row_groups", dying)
    with pytest.raises(Died):
        compress("died")
    quantized.append("dead")
    assert compress("died", "last") == whole
    assert sum(".layers.0." in name for name in quantized) == 7
