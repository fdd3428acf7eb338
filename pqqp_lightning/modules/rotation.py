"""A decoder's weights rewritten for a rotated residual stream, and the structure that goes with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pqqp_lightning.algorithms.hadamard import Rotation, make_rotation, small_factor
from pqqp_lightning.algorithms.quarot import (
    Map,
    centre,
    mean_direction,
    rewrite_linear,
    rotate_across,
    rotate_gain,
    rotate_heads,
)
from pqqp_lightning.modules.decoder import Attention, Decoder, Sublayer, norm_parts
from pqqp_lightning.modules.transforms import ProjectedEmbedding, RotateInput

ROWS_AT_ONCE = 4096
"""Rows of an embedding that are in float64 at a time."""

Change = tuple[str, dict[str, Any]]
"""A Linear layer's name and the options of ``rewrite_linear``."""


def plan_structure(model: nn.Module, decoder: Decoder, *, online: bool, seed: int) -> dict[str, Any]:
    """What :func:`rotate_structure` needs to know to do its work on a fresh model.

    Args:
        model: holds the decoder; its weights are not read.
        decoder: from :func:`~pqqp_lightning.modules.decoder.describe_decoder`.
        online: rotate the inputs of each sublayer's last layer as well: all of an MLP's, the heads of an attention.
        seed: of the rotations.
    """
    folded = [(s.norm, s.reads) for s in decoder.sublayers] + (
        [] if decoder.tied else [(decoder.norm, (decoder.head,))]
    )
    shifted = [name for norm, reads in folded for name in reads if _norm(model, norm)[1] is not None]
    rotated = decoder.sublayers if online else []
    plan: dict[str, Any] = {
        "seed": seed,
        "hidden_size": decoder.hidden_size,
        "norms": {name: _norm(model, name)[2] for name in decoder.norms},
        "biases": [name for name in shifted if _linear(model, name).bias is None],
        "gain": [decoder.norm, _norm(model, decoder.norm)[1] is not None] if decoder.tied else None,
        "projected": decoder.embedding if decoder.tied and decoder.centred else None,
        "online": {s.writes: _parts(_linear(model, s.writes), s) for s in rotated},
    }
    for order in sorted({order for order, _ in plan["online"].values()}):
        if small_factor(order) is None:  # its random matrix is stored: another machine may compute other digits
            plan[f"factor.{order}"] = make_rotation(order, _generator(seed), random_signs=False).factor
    return plan


def rotate_structure(model: nn.Module, plan: dict[str, Any]) -> None:
    """Norms without gains, a layer for a tied head's gain, biases where norms had some, online rotations."""
    for name in plan["biases"]:
        layer = _linear(model, name)
        bias = layer.weight.detach().new_zeros(layer.out_features)
        layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
    for name, epsilon in plan["norms"].items():
        bare = nn.RMSNorm(plan["hidden_size"], epsilon, elementwise_affine=False)
        last = plan["gain"] is not None and name == plan["gain"][0]
        _replace(model, name, _with_gain(bare, _norm(model, name)[0], plan["gain"][1]) if last else bare)
    if plan["projected"]:
        embedding = model.get_submodule(plan["projected"])
        assert isinstance(embedding, nn.Embedding)
        _replace(model, plan["projected"], ProjectedEmbedding(embedding))
    hooks: dict[tuple[int, int], RotateInput] = {}
    for name, (order, width) in plan["online"].items():
        hook = hooks.get((order, width)) or RotateInput(online_rotation(plan, order), width)
        hooks.setdefault((order, width), hook).attach(model.get_submodule(name))


def online_rotation(plan: dict[str, Any], order: int) -> Rotation:
    """The rotation of ``order`` at run time: a plain Hadamard matrix where there is one."""
    factor = plan.get(f"factor.{order}")
    if factor is not None:
        return Rotation(factor.cpu(), order)
    return make_rotation(order, _generator(plan["seed"]), random_signs=False)


@torch.no_grad()
def rotate_decoder(model: nn.Module, decoder: Decoder, plan: dict[str, Any]) -> None:
    """Give ``model`` the structure of ``plan`` and its weights the values that keep its function."""
    embedding = model.get_submodule(decoder.embedding)
    assert isinstance(embedding, nn.Embedding)
    device, generator = embedding.weight.device, _generator(plan["seed"])
    stream = make_rotation(decoder.hidden_size, generator).to(device)
    last = _norm(model, decoder.norm)
    changes = list(_changes(model, decoder, plan, stream))
    if not decoder.tied:
        changes.append((decoder.head, {"gain": last[0], "shift": last[1], "inputs": [stream.apply]}))
    rotate_structure(model, plan)
    for name, options in changes:
        _rewrite(_linear(model, name), options)
    for table in filter(None, (decoder.embedding, decoder.positions)):
        keep_mean = decoder.tied and table == decoder.embedding
        _rotate_rows(model.get_submodule(table).weight, stream, centred=decoder.centred and not keep_mean)
    if decoder.tied:
        _write(model.get_submodule(f"{decoder.norm}.gain"), *rotate_gain(stream, last[0], last[1]))
    if plan["projected"]:
        model.get_submodule(plan["projected"]).direction.copy_(mean_direction(stream))  # type: ignore[operator, union-attr]


def _changes(model: nn.Module, decoder: Decoder, plan: dict[str, Any], stream: Rotation) -> Iterator[Change]:
    """How each Linear layer on the stream is rewritten."""
    device = stream.factor.device
    writes = [centre, stream.apply] if decoder.centred else [stream.apply]
    for sublayer in decoder.sublayers:
        gain, shift, _ = _norm(model, sublayer.norm)
        between: list[Map] = []
        values = None
        if isinstance(sublayer, Attention):
            heads = make_rotation(sublayer.head_dim, _generator(plan["seed"]), random_signs=False).to(device)
            values, between = sublayer.values, [rotate_heads(heads)]
        for name in sublayer.reads:
            outputs = between if name == values else []
            yield name, {"gain": gain, "shift": shift, "inputs": [stream.apply], "outputs": outputs}
        if sublayer.writes in plan["online"]:
            order, width = plan["online"][sublayer.writes]
            between = [*between, rotate_across(online_rotation(plan, order).to(device), width)]
        yield sublayer.writes, {"inputs": between, "outputs": writes}


def _parts(layer: nn.Linear, sublayer: Sublayer) -> list[int]:
    """[n, width]: how many parts of the layer's input are mixed at run time, and how wide each is."""
    width = sublayer.head_dim if isinstance(sublayer, Attention) else 1
    return [layer.in_features // width, width]


def _rewrite(layer: nn.Linear, options: dict[str, Any]) -> None:
    _write(layer, *rewrite_linear(layer.weight, layer.bias, **options))


def _write(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)


def _rotate_rows(table: Any, rotation: Rotation, *, centred: bool) -> None:
    for rows in table.split(ROWS_AT_ONCE):
        wide = rows.double()
        rows.copy_(rotation.apply(centre(wide) if centred else wide))


def _with_gain(norm: nn.Module, gain: Tensor | None, bias: bool) -> nn.Sequential:
    """``norm`` and a layer behind it, named ``gain``."""
    assert gain is not None
    layer = nn.utils.skip_init(nn.Linear, len(gain), len(gain), bias, device=gain.device, dtype=gain.dtype)
    layer.requires_grad_(gain.requires_grad)
    sequence = nn.Sequential()
    sequence.add_module("norm", norm)
    sequence.add_module("gain", layer)
    return sequence


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _norm(model: nn.Module, name: str) -> tuple[nn.Parameter | None, nn.Parameter | None, float]:
    return norm_parts(model.get_submodule(name))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the module ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new.train(model.get_submodule(name).training))
