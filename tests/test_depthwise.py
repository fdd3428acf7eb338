"""Depthwise convolutions: few weights, much accuracy at few bits; the record names them, and a pattern selects them."""

import pytest
import timm
import torch
from test_batch_norm import Network, loader
from tiny import trainer
from torch import nn

from pqqp_lightning.callbacks.gptq import GPTQ
from pqqp_lightning.callbacks.magnitude import Magnitude
from pqqp_lightning.callbacks.mixed_precision import MixedPrecision
from pqqp_lightning.callbacks.nf4 import NF4
from pqqp_lightning.callbacks.rtn import RTN
from pqqp_lightning.network.blocks import find_blocks, find_layers
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.network.layers import is_depthwise
from pqqp_lightning.storage.records import read_records


class Depthwise(Network):
    """A depthwise and a pointwise convolution, named by their places."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 1))


def notes_of(folder, *stages):
    module = Depthwise()
    trainer(folder, *stages).fit(module, loader(), loader(seed=1))
    found = [note for record in read_records(folder) for note in record["notes"] if "depthwise" in note]
    return module, found


def bits_of(module):
    grids = [constraints_of(layer).grid for layer in module.features if isinstance(layer, nn.Conv2d)]
    return [grid and grid.bits for grid in grids]


@pytest.mark.parametrize("stage", [RTN(4), GPTQ(3), NF4()], ids=["RTN", "GPTQ", "NF4"])
def test_few_bits_are_noted_with_the_way_out(tmp_path, stage):
    _, notes = notes_of(tmp_path / "run", stage)
    assert len(notes) == 1
    assert notes[0].startswith("1 layer (features.1): ")
    assert "targets: [depthwise]" in notes[0]


@pytest.mark.parametrize(
    "stages",
    [
        [RTN(8)],
        [Magnitude(0.5)],
        [RTN({"features.1": 8, "*": 4})],
        [MixedPrecision(bits=[4, 8], average_bits=4.1)],  # it has compared them
    ],
    ids=["8 bits", "pruning", "by name", "by sensitivity"],
)
def test_other_stages_have_nothing_to_say(tmp_path, stages):
    assert notes_of(tmp_path / "run", *stages)[1] == []


def test_two_stages_give_them_8_bits_and_the_rest_4(tmp_path):
    module, notes = notes_of(tmp_path / "run", RTN(8, targets=["depthwise"]), RTN(4, ignore=["depthwise", "head"]))
    assert bits_of(module) == [4, 8, 4]
    assert notes == []


def test_the_pattern_selects_by_kind_whatever_the_name():
    with torch.device("meta"):
        network = timm.create_model("mobilenetv2_050")
    layers = find_layers(network, ["depthwise"], None, find_blocks(network))
    assert len(layers) == 17
    assert all(is_depthwise(layer) for layer in layers.values())
    rest = find_layers(network, ["*"], ["depthwise"], find_blocks(network))
    assert not any(is_depthwise(layer) for layer in rest.values())
    assert not is_depthwise(nn.Conv2d(1, 8, 3))  # one channel, one group: an ordinary convolution
    assert not is_depthwise(nn.Conv2d(8, 8, 3, groups=2))


def test_the_pattern_is_refused_where_there_is_none(tmp_path):
    problems = RTN(4, targets=["depthwise"]).check(Network(), None, [])
    assert [(problem.argument, problem.value) for problem in problems] == [("targets", "depthwise")]


def test_a_word_in_place_of_a_list_is_refused():
    (problem,) = RTN(4, targets="depthwise").check(Network(), None, [])
    assert str(problem) == "targets='depthwise' is not a list. Write targets=['depthwise']."
