"""Padding is not data: statistics of padded batches equal those of the same samples without padding."""

from __future__ import annotations

import copy
from collections import UserDict
from functools import partial

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from pqqp_lightning import Trainer
from pqqp_lightning.calibration.channel_scores import mean_squared_inputs
from pqqp_lightning.calibration.layer_errors import layer_errors
from pqqp_lightning.calibration.token_mask import TokenMask, token_masks
from pqqp_lightning.calibration.walk import Walk
from pqqp_lightning.callbacks import MixedPrecision, SparseGPT, Wanda
from pqqp_lightning.errors import RecipeError
from pqqp_lightning.network.blocks import model_blocks
from pqqp_lightning.network.constraints import constraints_of
from pqqp_lightning.storage.records import read_records

LENGTH = 24


def samples(count: int = 24) -> list[torch.Tensor]:
    """Token ids of different lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, LENGTH - 4, (count,), generator=generator).tolist()
    return [torch.randint(1, 64, (length,), generator=generator) for length in lengths]


def collate(rows: list[torch.Tensor], length: int | None, left: bool, mask_name: str) -> dict[str, torch.Tensor]:
    """Pad ``rows`` with zeros, to the longest one or to ``length``."""
    width = length or max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = row
        mask[i, place] = 1
    return {"input_ids": ids, mask_name: mask}


MASK_NAMES = {"batch": "attention_mask", "call": "shown", "position": "shown", "module": "present"}
"""Where the mask comes from, and its name in the batch: the engine knows the first one only."""


def loader(padding: str, source: str = "batch") -> DataLoader:
    """The samples one by one without padding ("tight"), or in batches padded on one side."""
    length = None if padding == "tight" else LENGTH
    pad = partial(collate, length=length, left=padding == "left", mask_name=MASK_NAMES[source])
    return DataLoader(samples(), batch_size=1 if padding == "tight" else 8, collate_fn=pad)


class Reader(LightningModule):
    """A BERT whose attention mask comes from the batch, from the call, or from the module's own method."""

    def __init__(self, source: str = "batch") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.source = source
        config = transformers.BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.net = transformers.BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(32, 1)
        if source == "module":
            self.calibration_mask = lambda batch: batch["present"].bool()

    def forward(self, batch):
        present = batch[MASK_NAMES[self.source]]
        positions = (present.cumsum(1) - 1).clamp(min=0)  # the same positions with padding on either side
        ids = batch["input_ids"]
        if self.source == "position":
            states = self.net(ids, present, None, positions)[0]
        elif self.source == "module":  # additive, as a user's own model may take it
            additive = (1.0 - present[:, None, None].float()) * torch.finfo(torch.float32).min
            states = self.net(ids, attention_mask=additive, position_ids=positions)[0]
        else:
            states = self.net(input_ids=ids, attention_mask=present, position_ids=positions)[0]
        return (self.head(states)[..., 0] * present).sum(1) / present.sum(1)

    def training_step(self, batch, index):
        return self(batch).square().mean()

    def validation_step(self, batch, index):
        self.log("loss", self(batch).square().mean(), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def compress(tmp_path, stage, padding: str, source: str = "batch") -> tuple[Reader, list]:
    """Compress a reader, calibrated on the samples with this padding; returns it with the records."""
    data = loader(padding, source)
    module = Reader(source)
    folder = tmp_path / f"{padding}-{source}"
    trainer = Trainer(
        callbacks=[stage], accelerator="cpu", devices=1, default_root_dir=str(folder), enable_progress_bar=False
    )
    trainer.fit(module, data, data)
    return module, read_records(folder)


@pytest.mark.parametrize("source", MASK_NAMES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_mask_does_not_depend_on_padding(tmp_path, padding, source):
    tight, _ = compress(tmp_path, Wanda(0.5), "tight", source)
    padded, records = compress(tmp_path, Wanda(0.5), padding, source)
    masks = [
        constraints_of(layer).mask()
        for model in (tight, padded)
        for layer in model.net.modules()
        if isinstance(layer, nn.Linear)
    ]
    half = len(masks) // 2
    differ = sum(int((a != b).sum()) for a, b in zip(masks[:half], masks[half:], strict=True))
    assert differ <= 0.001 * sum(mask.numel() for mask in masks[:half])  # ties and the order of summation
    assert records[-1]["notes"] == []


@pytest.mark.parametrize("stage", [SparseGPT(0.5), MixedPrecision()])
def test_weights_do_not_depend_on_padding(tmp_path, stage):
    tight, _ = compress(tmp_path, copy.deepcopy(stage), "tight")
    padded, _ = compress(tmp_path, copy.deepcopy(stage), "right")
    for (name, a), (_, b) in zip(tight.state_dict().items(), padded.state_dict().items(), strict=True):
        assert a.shape == b.shape, name
        assert torch.isclose(a, b, rtol=1e-3, atol=1e-4).float().mean() > 0.99, name


def walk_of(module: Reader, padding: str) -> Walk:
    """A walk over all samples."""
    batches = list(loader(padding))
    probe = next(iter(loader("tight")))
    return Walk(module, model_blocks(module), batches, probe, module, progress=False)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_channel_scores_and_layer_errors_do_not_depend_on_padding(padding):
    module = Reader().eval()
    name = "net.encoder.layer.0.intermediate.dense"
    halved = copy.deepcopy(module.get_submodule(name))
    halved.weight.data[::2] *= 0.5
    squares, errors = {}, {}
    for kind in ("tight", padding):
        squares[kind] = mean_squared_inputs(walk_of(module, kind), [name])[name]
        errors[kind] = layer_errors(walk_of(module, kind), {"halved": {name: halved}})[name]["halved"]
    assert torch.allclose(squares[padding], squares["tight"], rtol=1e-4)
    assert errors[padding] == pytest.approx(errors["tight"], rel=1e-4)


def test_positions_are_found_in_every_layout():
    counts = torch.tensor([[True, True, False], [True, False, False]])
    mask = TokenMask(counts)
    states = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    expected = torch.stack([states[0, 0], states[0, 1], states[1, 0]])
    assert torch.equal(mask.select(states), expected)
    assert torch.equal(mask.select(states.flatten(0, 1)), expected)
    assert torch.equal(mask.select(states.transpose(0, 1)).sum(0), expected.sum(0))  # [T, B, C]
    heads = states[:, None].expand(2, 5, 3, 4)
    assert mask.select(heads).shape == (15, 4)
    pooled = torch.ones(2, 4)
    assert mask.select(pooled) is pooled
    assert not mask.misses(pooled)
    assert mask.misses(torch.ones(4, 4))  # four of six positions, as a router sends them to an expert


def test_only_two_dimensional_masks_of_integers_count():
    model = nn.Identity()
    run = model.__call__
    causal = {"x": torch.ones(2, 3), "attention_mask": torch.ones(2, 1, 3, 3).tril().bool()}
    additive = {"x": torch.ones(2, 3), "attention_mask": torch.zeros(2, 3)}
    padding = {"key_padding_mask": torch.tensor([[False, False, True], [False, True, True]])}
    assert token_masks(model, [causal, additive], causal, run) == [None, None]
    (mask,) = token_masks(model, [padding], padding, run)
    assert mask is not None
    assert mask.counts.tolist() == [[True, True, False], [True, False, False]]
    tokenized = UserDict(padding)  # as a tokenizer's BatchEncoding
    assert token_masks(model, [tokenized], tokenized, run)[0] is not None
    whole = {"attention_mask": torch.ones(2, 3, dtype=torch.long)}
    assert token_masks(model, [whole], whole, run) == [None]


@pytest.mark.parametrize("wrong", [[True], torch.ones(4), torch.tensor([[0.0, -1e9]]), "mask"])
def test_a_calibration_mask_of_another_form_is_refused(wrong):
    model = nn.Identity()
    model.calibration_mask = lambda batch: wrong
    with pytest.raises(RecipeError, match=r"calibration_mask returned .* instead of a bool tensor"):
        token_masks(model, [{}], {}, model)


def test_a_mask_of_floats_counts_if_it_says_yes_or_no():
    model = nn.Identity()
    floats = {"attention_mask": torch.tensor([[1.0, 1.0, 0.0]])}
    (mask,) = token_masks(model, [floats], floats, model)
    assert mask is not None
    assert mask.counts.tolist() == [[True, True, False]]
