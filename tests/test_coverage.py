"""What a stage covers of a model, counted by hand; zeros and bits of the whole model; how pages say it."""

from __future__ import annotations

import json

import pytest
from tiny import LLAMA, OPT, RegressionData, Regressor, make_data, make_model, trainer, write_tokens
from torch import nn
from torch.nn.utils import parametrizations

from pqqp_lightning.callbacks import RTN, Finetune, LoRA, Magnitude
from pqqp_lightning.data import TokenData
from pqqp_lightning.models import CausalLM
from pqqp_lightning.network.coverage import count_parameters, measure_coverage
from pqqp_lightning.report.coverage import coverage_notes, coverage_text
from pqqp_lightning.report.markdown import to_markdown
from pqqp_lightning.report.pages import read_page
from pqqp_lightning.storage.records import read_records

LAYERS = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)  # of LLAMA: q and o, k and v, the MLP
EMBEDDING = 64 * 32
NORMS = (2 * 2 + 1) * 32


def covered_by(stage, model):
    return measure_coverage(model, stage.find_layers(model).values())


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_is_counted_as_by_hand(tied):
    coverage = covered_by(Magnitude(0.5), CausalLM(LLAMA | {"tie_word_embeddings": tied}))
    heads = {} if tied else {"output head": EMBEDDING}  # a tied head is the embedding, which counts once
    assert coverage.left == {"embeddings": EMBEDDING, **heads, "normalization": NORMS}
    assert coverage.covered == LAYERS
    assert coverage.parameters == LAYERS + NORMS + EMBEDDING * (1 if tied else 2)


def test_layers_that_targets_leave_are_named():
    coverage = covered_by(Magnitude(0.5, targets=["mlp"]), CausalLM(LLAMA))
    assert coverage.covered == 2 * 3 * 32 * 64
    assert coverage.left["linear layers"] == LAYERS - coverage.covered


class Experts(nn.Module):
    """As transformers 5 keeps the experts of a mixture."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(nn.init.normal_(nn.Linear(1, 1).weight.new_empty(4, 6, 8)))
        self.gate_up_proj_bias = nn.Parameter(self.gate_up_proj.new_zeros(4, 6))


class Positions(nn.Module):
    """As a vision transformer keeps what it adds to its tokens."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(nn.Linear(1, 1).weight.new_zeros(1, 5, 8))
        self.cls_token = nn.Parameter(self.pos_embed.new_zeros(1, 1, 8))


KINDS = {
    "embeddings": (lambda: nn.Embedding(7, 8), {"embeddings": 56}),
    "positions": (Positions, {"embeddings": 48}),
    "experts": (Experts, {"3-D expert weights": 192, "biases": 24}),
    "in_proj": (lambda: nn.MultiheadAttention(8, 2), {"attention in_proj": 192, "biases": 32}),
    "recurrent": (lambda: nn.GRU(8, 4), {"recurrent weights": 12 * 12, "biases": 24}),
    "1-d": (lambda: nn.Conv1d(2, 3, 5), {"1-d convolutions": 30, "biases": 3}),
    "3-d": (lambda: nn.Conv3d(2, 3, 2), {"3-d convolutions": 48, "biases": 3}),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 2), {"transposed convolutions": 24, "biases": 3}),
    "normalization": (lambda: nn.BatchNorm2d(6), {"normalization": 12}),
    "others": (nn.PReLU, {"other parameters": 1}),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_no_stage_touches_is_said_by_kind(name):
    make, left = KINDS[name]
    model = nn.ModuleDict({"layer": nn.Linear(3, 3, bias=False), "rest": make()})
    coverage = measure_coverage(model, [model["layer"]])
    if name == "in_proj":  # out_proj is a Linear layer that no stage was given
        left = left | {"linear layers": 64}
    assert coverage.left == left
    assert (coverage.covered, coverage.parameters) == (9, 9 + sum(left.values()))


def test_a_parametrized_weight_is_covered_whole():
    layer = parametrizations.weight_norm(nn.Linear(3, 2, bias=False))
    assert measure_coverage(nn.Sequential(layer), [layer]).covered == 3 * 2 + 2


def test_a_head_is_a_head_outside_of_the_blocks_alone():
    coverage = covered_by(Magnitude(0.5, targets=["up"]), Regressor())
    assert coverage.left == {"linear layers": 8 * 8 + 2 * 8 * 16, "biases": 8 + 2 * (16 + 8) + 2, "output head": 16}


def test_zeros_and_bits_are_also_those_of_the_whole_model(tmp_path):
    model = CausalLM(OPT)
    data = TokenData(**write_tokens(tmp_path))
    total, embeddings = count_parameters(model), (64 + 66) * 32  # tied with the head; positions
    before = int(sum((p == 0).sum() for p in model.parameters()))  # biases begin as zeros
    trainer(tmp_path / "run", Magnitude(0.5), RTN(4)).fit(model, datamodule=data)
    dense, prune, quantize = read_records(tmp_path / "run")
    covered = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert prune["coverage"] == quantize["coverage"]
    assert prune["coverage"]["covered"] == covered
    assert prune["coverage"]["left"]["embeddings"] == embeddings
    assert (dense["sparsity"], dense["model_sparsity"]) == (0, pytest.approx(before / total))
    assert prune["sparsity"] == 0.5
    assert prune["model_sparsity"] == pytest.approx((covered / 2 + before) / total)
    for record in (dense, prune, quantize):
        assert record["model_bits_per_weight"] == pytest.approx(8 * record["size_bytes"] / total)
    bits = (32 * (total - covered) + quantize["bits_per_weight"] * covered) / total
    assert quantize["model_bits_per_weight"] == pytest.approx(bits)
    assert json.loads((tmp_path / "run/report.json").read_text())["stages"] == [dense, prune, quantize]


def test_running_statistics_are_no_parameters(tmp_path):
    trainer(tmp_path / "run").fit(make_model("resnet"), datamodule=make_data("resnet", tmp_path))
    assert read_records(tmp_path / "run")[0]["model_bits_per_weight"] == 32


def test_adapters_count_as_bits_and_not_as_parameters(tmp_path):
    stages = Magnitude(0.5), LoRA(rank=2, merge=False, epochs=1, learning_rate=0.01), Finetune(epochs=1)
    trainer(tmp_path / "run", *stages).fit(Regressor(), datamodule=RegressionData())
    _, prune, adapt, tune = read_records(tmp_path / "run")
    assert adapt["coverage"]["parameters"] == prune["coverage"]["parameters"]
    assert adapt["model_bits_per_weight"] > prune["model_bits_per_weight"]
    assert adapt["model_sparsity"] == pytest.approx(prune["model_sparsity"], abs=0.01)
    assert "coverage" not in tune  # it trains all


def test_little_coverage_is_said_once_for_stages_that_leave_the_same():
    left = {"3-D expert weights": 8500, "embeddings": 400, "normalization": 30}
    little = {"parameters": 10000, "covered": 1070, "left": left}
    assert coverage_text(little) == "11% of the parameters; left: 3-D expert weights 85%, embeddings 4%"
    nearly_all = {"parameters": 10000, "covered": 9000, "left": {"embeddings": 1000}}
    nearly_none = {"parameters": 10000, "covered": 1, "left": {"embeddings": 9999}}
    coverages = {"prune": little, "quantize": little, "tune": None, "rotate": nearly_all, "last": nearly_none}
    records = [{"name": name} | ({"coverage": c} if c else {}) for name, c in coverages.items()]
    assert coverage_notes([*records, records[0]]) == [  # a sweep measures a stage more than once
        ("prune, quantize", f"cover {coverage_text(little)}."),
        ("last", "covers less than 1% of the parameters; left: embeddings 100%."),
    ]


def test_the_page_shows_both_where_they_differ_and_reads_older_records(tmp_path):
    model = CausalLM(LLAMA)
    stage = Magnitude(0.5, targets=["down_proj"])
    trainer(tmp_path / "run", stage).fit(model, datamodule=TokenData(**write_tokens(tmp_path)))
    record = read_records(tmp_path / "run")[1]
    page = to_markdown(read_page(tmp_path / "run"))
    assert f"50.0% ({100 * record['model_sparsity']:.1f}%) | 17.00 ({record['model_bits_per_weight']:.2f})" in page
    assert "- magnitude: covers 18% of the parameters; left: linear layers 63%, embeddings 9%, output head 9%" in page
    report = tmp_path / "run/report.json"
    older = json.loads(report.read_text())
    for stage_record in older["stages"]:
        for key in ("coverage", "model_sparsity", "model_bits_per_weight"):
            stage_record.pop(key, None)
    report.write_text(json.dumps(older))
    page = to_markdown(read_page(tmp_path / "run"))
    assert "| 50.0% | 17.00 |" in page
    assert "covers" not in page
