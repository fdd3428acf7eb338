"""A model whose weights do not fit twice in memory is compressed and saved: nothing in the engine copies it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import LLAMA, trainer, write_tokens

import pqqp_lightning
from pqqp_lightning.calibration.dense_weights import DenseWeights, mark_layers
from pqqp_lightning.data import TokenData
from pqqp_lightning.models import CausalLM

BIG = LLAMA | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 20, "num_attention_heads": 8}
ROOM = 1.6
"""Memory that the process may take after its imports, in weights of the model."""

LIMITED = """
import copy, json, resource, sys
from pathlib import Path

folder, room, control = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:] == ["copies"]
import torch
torch.set_num_threads(1)
from pqqp_lightning import Trainer
from pqqp_lightning.callbacks import GPTQ, SparseGPT
from pqqp_lightning.calibration.dense_weights import DenseWeights, mark_layers
from pqqp_lightning.data import TokenData
from pqqp_lightning.models import CausalLM

def used():  # private writable memory, in bytes
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmData"))

def fit(module, data, run, **options):
    stages = [SparseGPT(0.5), GPTQ(4, group_size=16)]
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}
    Trainer(callbacks=stages, default_root_dir=str(run), **quiet).fit(module, datamodule=data)

data = json.loads((folder / "data.json").read_text())
fit(CausalLM(json.loads((folder / "tiny.json").read_text())), TokenData(**data), folder / "warm-up")
weights = (folder / "model" / "model.safetensors").stat().st_size
limit = used() + int(room * weights)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
module = CausalLM(str(folder / "model"))
copied = copy.deepcopy(module) if control else None
print("loaded", flush=True)
fit(module, TokenData(**data), folder / f"run-{len(sys.argv)}")
print("finished", flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    CausalLM(BIG).model.save_pretrained(folder / "model")
    arguments = write_tokens(folder, calibration=4, evaluation=2)
    (folder / "data.json").write_text(json.dumps(arguments))
    (folder / "tiny.json").write_text(json.dumps(LLAMA))
    return folder


def run_limited(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    gapless = {
        "MALLOC_MMAP_THRESHOLD_": "65536"
    }  # what is freed is given back, so that the limit is about what is used
    environment = os.environ | gapless | {"PYTHONPATH": str(Path(pqqp_lightning.__file__).parents[1])}
    command = [sys.executable, "-c", LIMITED, str(folder), str(ROOM), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's private memory this way")


@on_linux
def test_a_model_that_does_not_fit_twice_is_compressed_and_saved(folder):
    result = run_limited(folder)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "finished" in result.stdout
    report = json.loads((folder / "run-3" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["dense", "sparsegpt", "gptq"]
    assert report["stages"][-1]["sparsity"] >= 0.5
    loaded = pqqp_lightning.load(folder / "run-3")
    data = TokenData(**json.loads((folder / "data.json").read_text()))
    measured = trainer(folder / "again", logger=False).validate(loaded, datamodule=data, verbose=False)
    assert measured[0]["perplexity"] == report["stages"][-1]["metrics"]["perplexity"]


@on_linux
def test_the_limit_would_stop_a_copy_of_the_model(folder):
    result = run_limited(folder, "copies")
    assert result.returncode != 0
    assert "loaded" not in result.stdout
    assert "DefaultCPUAllocator" in result.stderr or "MemoryError" in result.stderr


def resident_file_pages() -> int:
    """Bytes of mapped files that count as this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says what is resident")
def test_dense_weights_that_were_read_do_not_stay_resident(tmp_path):
    size = 1 << 20
    module = torch.nn.Sequential(*(torch.nn.Linear(1024, size // 1024, bias=False) for _ in range(8)))
    mark_layers(module)
    weights = DenseWeights(module, tmp_path)
    expected = [layer.weight.detach().clone() for layer in module]
    before = resident_file_pages()
    for layer, dense in zip(module, expected, strict=True):
        layer.weight.data.zero_()  # a stage changed the model
        assert torch.equal(weights.of(layer), dense)
    assert resident_file_pages() - before < 2 * 4 * size  # all eight have 8 * 4 * size bytes
